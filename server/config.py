"""The settings: defaults < the TOML file named by --config or NBEST_CONFIG < environment (NBEST_*) < flags.

`Settings` is the one list of them. The flags of `nbest serve` and docs/settings.md are made from its fields, so a
setting is added by adding a field. A later source replaces a value whole; nothing is merged below the setting.
"""

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from reranker.scorers.spec import OWN_POLICY, JudgeSpec, parse, parse_all

ENV_PREFIX = "NBEST_"
CONFIG_VARIABLE = "NBEST_CONFIG"
OTHER_VARIABLES = {
    CONFIG_VARIABLE: "TOML file of settings, where --config is not given.",
    "NBEST_CACHE": "Folder of the prepared models; default: nbest in the user's cache.",
}
"""Variables of the same prefix that are no settings of the server."""


class ConfigError(Exception):
    """The server cannot be set up as asked. The message names the setting, where it came from and the way out."""


def _named_specs(value: object) -> object:
    """NAME=SPEC items (a list from repeated flags, a spaced string from the environment) as a dict in that order."""
    items = value.split() if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        return items
    specs: dict[str, str] = {}
    for item in items:
        name, equals, spec = str(item).partition("=")
        if not (name and equals and spec):
            raise ValueError(f"{item!r} should read NAME=SPEC")
        if name in specs:
            raise ValueError(f"the name {name!r} is given twice")
        specs[name] = spec
    return specs


def _checked_specs(specs: dict[str, str]) -> dict[str, str]:
    parse_all(specs)
    return specs


_REPLICAS = "A number, or MIN-MAX to have as many as the load needs."


def _checked_replicas(replicas: str) -> str:
    replica_range(replicas)
    return replicas


def replica_range(replicas: str) -> tuple[int, int]:
    """The fewest and the most replicas: N is both of them, MIN-MAX leaves the number to the load.

    Raises:
        ValueError: it is neither.
    """
    fewest, dash, most = replicas.partition("-")
    most = most if dash else fewest
    if not (fewest.isdecimal() and most.isdecimal() and 1 <= int(fewest) <= int(most)):
        raise ValueError("should read N or MIN-MAX with 1 <= MIN <= MAX, such as 2 or 1-4")
    return int(fewest), int(most)


Replicas = Annotated[str, BeforeValidator(str), AfterValidator(_checked_replicas)]


class Settings(BaseSettings):
    """Everything about a server that is not said in a request. The unit is in the name.

    Built directly it reads the environment beneath its arguments, but no file: that is `load_settings`.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    model: str = Field(
        default="smollm2-135m-instruct",
        min_length=1,
        description="Policy: a prepared model's name, a directory or a hub id.",
    )
    served_model_name: str | None = Field(
        default=None, min_length=1, description="Name clients call the policy by; default: the model's."
    )
    adapter: Path | None = Field(
        default=None, description="LoRA adapter over the policy: a directory that PEFT has written."
    )
    adapter_root: Path | None = Field(
        default=None,
        description="Directory below which POST /admin/adapter finds adapters to load while serving; needs a key with "
        "`admin`. docs/adapters.md.",
    )
    max_lora_rank: int | None = Field(
        default=None, ge=1, le=512, description="Highest rank of an adapter; default: that of --adapter, or 16."
    )
    reward_models: Annotated[
        dict[str, str], NoDecode, BeforeValidator(_named_specs), AfterValidator(_checked_specs)
    ] = Field(
        default={"movie-sentiment": "movie-sentiment"},
        min_length=1,
        description="Served scorers, NAME=SPEC, the first the default. SPEC: prepared name, directory, hub id, "
        "vllm:URL, judge:MODEL, pairwise:judge:MODEL, python:FILE_OR_MODULE:FUNCTION, logprob, self_certainty, "
        "ensemble:HOW:NAME,NAME with HOW mean, min or mean-std:K, cascade:KEEP:CHEAP,EXPENSIVE. "
        "docs/scorers.md tells them apart.",
    )
    judge_base_url: str | None = Field(
        default=None,
        pattern="^https?://",
        description="Address of the OpenAI-compatible server with the MODEL of judge:MODEL.",
    )
    judge_api_key: SecretStr | None = Field(default=None, description="Key sent to the judge's server.")
    verifier_timeout_s: float = Field(
        default=10.0, gt=0, description="Longest time for one call of a python: function, in seconds."
    )
    generator: Literal["vllm", "openai"] = Field(
        default="vllm",
        description="Where candidates come from: the embedded vLLM engine, or any OpenAI-compatible server.",
    )
    base_url: str | None = Field(
        default=None,
        pattern="^https?://",
        description="Address of the OpenAI-compatible server, with --generator openai.",
    )
    api_key: SecretStr | None = Field(default=None, description="Key sent to that server.")
    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes any free one.")
    default_best_of: int = Field(default=4, ge=1, description="Candidates drawn when a request does not say.")
    default_stopping: str | None = Field(
        default=None,
        description="JSON of the nbest.stopping that holds where a request leaves it, best_of, the strategy and the "
        "reward model open; nbest calibrate writes it.",
    )
    max_best_of: int = Field(default=64, ge=1, description="Most candidates one request may ask for.")
    max_body_bytes: int = Field(default=2_000_000, ge=1, description="Largest request body.")
    max_header_bytes: int = Field(default=16_384, ge=256, description="Largest request line and headers together.")
    max_concurrent_requests: int = Field(
        default=256,
        ge=1,
        description="Requests of /v1 under way at once, those whose body still arrives included; more get 429.",
    )
    client_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="Longest time a client may take to send its headers, to send its body, or to accept what is sent.",
    )
    max_running_candidates: int | None = Field(
        default=None, ge=1, description="Candidates under way at once; default: max_num_seqs."
    )
    max_queued_candidates: int | None = Field(
        default=None,
        ge=0,
        description="Candidates of requests that wait their turn; more get 429. Default: half of those that may run.",
    )
    max_queued_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens that waiting requests may ask for; default: 2048 for each candidate that may wait.",
    )
    keys_file: Path | None = Field(
        default=None,
        description="TOML file of API keys and their budgets, from `nbest keys new`; without it no key is asked for.",
    )
    metrics_host: str = Field(
        default="127.0.0.1", min_length=1, description="Address to listen on for metrics, with --metrics-port."
    )
    metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Port of its own for /metrics, which the main one then does not serve, and, without a key, for "
        "/ready and /health.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where models run; auto takes CUDA if present.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Precision of the policy; auto takes what this device computes fastest."
    )
    reward_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Precision of reward models; auto takes what this device computes fastest. In bfloat16 a reward "
        "depends a little on what is scored beside it.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Context length in tokens; default: the model's own.",
    )
    kv_cache_gib: float = Field(
        default=2.0,
        gt=0,
        description="Memory of the engine's key-value cache on a CPU, in GiB.",
    )
    block_size: int = Field(
        default=32,
        ge=1,
        description="Tokens a key-value block; small blocks share more of the prompt.",
    )
    max_num_seqs: int = Field(default=128, ge=1, description="Candidates the engine advances at once.")
    tensor_parallel_size: int = Field(default=1, ge=1, description="Devices over which the engine splits the policy.")
    score_batch_tokens: int = Field(
        default=4096,
        ge=1,
        description="Most tokens, padding included, in one scoring batch.",
    )
    score_max_wait_ms: float = Field(
        default=5.0,
        ge=0,
        description="Longest wait of a candidate for others to score with.",
    )
    score_cache_entries: int = Field(
        default=0,
        ge=0,
        description="Rewards that each scorer remembers, so that the same text for the same prompt is scored once; for "
        "judges and functions that are dear, and answers that come again.",
    )
    trust_remote_code: bool = Field(default=False, description="Run code that comes with a model. Leave it off.")
    drain_s: float = Field(
        default=10.0, ge=0, description="Longest wait for requests under way when the server is stopped, in seconds."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="warning", description="Least severe message that is logged; info adds a line per HTTP request."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines for people, or one JSON object each for machines."
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern="^https?://",
        description="OpenTelemetry collector that traces go to, OTLP over HTTP, such as http://127.0.0.1:4318; "
        "without one nothing is traced.",
    )
    trace_sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Share of the traces begun here that are kept, with --otlp-endpoint."
    )

    ray: bool = Field(default=False, description="Run generator, scorers and router as replicas on Ray Serve.")
    ray_address: str | None = Field(
        default=None,
        min_length=1,
        description="Ray cluster to join, HOST:PORT or auto for the one of this machine; default: a new one here.",
    )
    generator_replicas: Replicas = Field(default="1", description=f"Engines on Ray. {_REPLICAS}")
    generator_cpus: float = Field(
        default=1,
        ge=0,
        description="CPU cores reserved on Ray for each engine's replica; on a cluster that is joined, its threads.",
    )
    generator_gpus: float = Field(
        default=0, ge=0, description="GPUs reserved on Ray for each device of an engine; 1 to serve from GPUs."
    )
    scorer_replicas: Replicas = Field(default="1", description=f"Processes on Ray that hold all scorers. {_REPLICAS}")
    scorer_cpus: float = Field(default=1, ge=0, description="CPU cores reserved on Ray for each scorer replica.")
    scorer_gpus: float = Field(
        default=0, ge=0, description="GPUs, or a share of one, reserved on Ray for each scorer replica."
    )
    router_replicas: Replicas = Field(
        default="1", description=f"Processes on Ray that hold the HTTP application. {_REPLICAS}"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.default_best_of > self.max_best_of:
            raise ValueError(
                f"default_best_of ({self.default_best_of}) is above max_best_of ({self.max_best_of}); "
                "lower the first or raise the second"
            )
        if self.generator == "openai" and self.base_url is None:
            raise ValueError("generator openai needs the server's address; give --base-url https://HOST/v1")
        if self.generator == "vllm" and self.base_url is not None:
            raise ValueError("base_url is only used by --generator openai; add that or leave base_url out")
        if self.generator == "openai" and (self.adapter or self.adapter_root):
            raise ValueError("adapters are loaded into the embedded engine only; leave adapter and adapter_root out")
        if self.adapter_root is not None and self.keys_file is None:
            raise ValueError(
                "adapter_root needs a key that may load adapters; make one with `nbest keys new NAME --admin` "
                "and give --keys-file"
            )
        if self.ray_address is not None and not self.ray:
            raise ValueError("ray_address is only used on Ray; add --ray or leave ray_address out")
        if self.ray and self.metrics_port is not None:
            raise ValueError("metrics_port is not served on Ray; leave it out, /metrics stands on the main port there")
        if self.metrics_port == self.port:
            raise ValueError(f"metrics_port and port are both {self.port}; choose another for one of them")
        elsewhere = [
            name
            for name, spec in self.reward_models.items()
            if isinstance(judge := parse(spec), JudgeSpec) and judge.model != OWN_POLICY
        ]
        if elsewhere and self.judge_base_url is None:
            raise ValueError(
                f"the judge {elsewhere[0]} needs its server's address; give --judge-base-url https://HOST/v1, or let "
                f"the served policy judge with judge:{OWN_POLICY}"
            )
        return self


@dataclass(frozen=True, slots=True)
class _Source:
    """One layer of settings, and how a user of that layer spells a setting's name."""

    values: Mapping[str, Any]
    spell: Callable[[str], str]


def load_settings(flags: Mapping[str, Any], config_file: Path | None = None) -> Settings:
    """The settings from all sources; `flags` holds only those that were given.

    Raises:
        ConfigError: with one line for each setting that is wrong.
    """
    file = config_file or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    sources = [  # strongest first
        _Source(InitSettingsSource(Settings, dict(flags))(), flag_of),
        _Source(EnvSettingsSource(Settings)(), variable_of),
        _Source(_file_values(file), lambda setting: f"{setting} in {file}"),
    ]
    values: dict[str, Any] = {}
    for source in reversed(sources):
        values |= source.values
    try:
        return Settings(**values)
    except ValidationError as error:
        # Not chained: the cause repeats the values, and one of them may be the key.
        raise ConfigError("\n".join(_sentence(detail, sources) for detail in error.errors())) from None


def _file_values(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    if not file.is_file():
        raise ConfigError(f"The settings file {file} does not exist; correct --config or {CONFIG_VARIABLE}.")
    try:
        return TomlConfigSettingsSource(Settings, file)()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"The settings file {file} cannot be read as TOML: {error}.") from error


def _sentence(detail: ErrorDetails, sources: list[_Source]) -> str:
    reason = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:  # about several settings together
        return f"{reason}."
    setting = str(detail["loc"][0])
    source = next(source for source in sources if setting in source.values)
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(setting, Settings.model_fields, n=1)
        return f"{source.spell(setting)} is not a setting{f'; did you mean {near[0]}?' if near else '.'}"
    field = Settings.model_fields[setting]
    value = "" if is_secret(field) else f" is {source.values[setting]!r}, but"
    reason = reason[0].lower() + reason[1:]
    return f"{source.spell(setting)}{value}: {reason}; change it or leave it out for the default ({field.default})."


def is_secret(field: FieldInfo) -> bool:
    """Whether the value must never be shown; such a setting has no flag, since other users can read command lines."""
    return field.annotation in (SecretStr, SecretStr | None)


def flag_of(setting: str) -> str:
    """The flag of a setting; where it is repeated for each item it reads in the singular."""
    repeated = Settings.model_fields[setting].annotation == dict[str, str]
    return "--" + (setting.removesuffix("s") if repeated else setting).replace("_", "-")


def variable_of(setting: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + setting.upper()


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """NBEST_* variables that set nothing, each with the variable that was perhaps meant.

    They are reported, not refused: Kubernetes adds some for every service that is called nbest.
    """
    known = [*OTHER_VARIABLES, *map(variable_of, Settings.model_fields)]
    strangers = [name for name in environment if name.startswith(ENV_PREFIX) and name not in known]
    return {name: next(iter(difflib.get_close_matches(name, known, n=1)), None) for name in strangers}
