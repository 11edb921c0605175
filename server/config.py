"""The settings of the server. They come from four sources, of which a later one overrides an earlier one.

    defaults < the TOML file named by --config or NBEST_CONFIG < environment variables (NBEST_*) < command-line flags

`Settings` is the only list of settings. The flags of `nbest serve` and docs/settings.md are generated from its fields,
so a setting is added by adding a field. A later source replaces the whole value of a setting; values are never merged.
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
    CONFIG_VARIABLE: "TOML file of settings, if --config is not given.",
    "NBEST_CACHE": "Folder of the prepared models; default: nbest in the user's cache.",
}
"""Variables with the same prefix that are not settings of the server."""


class ConfigError(Exception):
    """A setting is invalid. The message names the setting, where its value came from, and what to do."""


def _named_specs(value: object) -> object:
    """NAME=SPEC items as a dict in the same order: a list from repeated flags, or words of an environment variable."""
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


_REPLICAS = "A number, or MIN-MAX to scale with the load."


def _checked_replicas(replicas: str) -> str:
    replica_range(replicas)
    return replicas


def replica_range(replicas: str) -> tuple[int, int]:
    """The minimum and maximum of replicas; for a plain number both are equal.

    Raises:
        ValueError: the text is neither a number nor a range.
    """
    minimum, dash, maximum = replicas.partition("-")
    maximum = maximum if dash else minimum
    if not (minimum.isdecimal() and maximum.isdecimal() and 1 <= int(minimum) <= int(maximum)):
        raise ValueError("should read N or MIN-MAX with 1 <= MIN <= MAX, such as 2 or 1-4")
    return int(minimum), int(maximum)


Replicas = Annotated[str, BeforeValidator(str), AfterValidator(_checked_replicas)]


class Settings(BaseSettings):
    """All settings of a server; names include the unit.

    Constructed directly, arguments override the environment and no file is read; `load_settings` also reads the file.
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
        description="Policy: the name of a prepared model, a directory or a hub id.",
    )
    served_model_name: str | None = Field(
        default=None, min_length=1, description="Name of the policy in the API; default: that of --model."
    )
    adapter: Path | None = Field(default=None, description="LoRA adapter of the policy: a directory written by PEFT.")
    adapter_root: Path | None = Field(
        default=None,
        description="Directory of the adapters that POST /admin/adapter may load while serving; requires a key with "
        "`admin`. See docs/adapters.md.",
    )
    max_lora_rank: int | None = Field(
        default=None, ge=1, le=512, description="Maximum rank of adapters; default: that of --adapter, or 16."
    )
    reward_models: Annotated[
        dict[str, str], NoDecode, BeforeValidator(_named_specs), AfterValidator(_checked_specs)
    ] = Field(
        default={"movie-sentiment": "movie-sentiment"},
        min_length=1,
        description="Served scorers as NAME=SPEC; the first is the default. SPEC: prepared name, directory, hub id, "
        "style:STYLE:SPEC, vllm:URL, judge:MODEL, pairwise:judge:MODEL, python:FILE_OR_MODULE:FUNCTION, "
        "logprob, self_certainty, ensemble:HOW:NAME,NAME with HOW mean, min or mean-std:K, "
        "cascade:KEEP:CHEAP,EXPENSIVE. See docs/scorers.md.",
    )
    judge_base_url: str | None = Field(
        default=None,
        pattern="^https?://",
        description="Address of the OpenAI-compatible server that serves the MODEL of judge:MODEL.",
    )
    judge_api_key: SecretStr | None = Field(default=None, description="API key for the server of the judge.")
    verifier_timeout_s: float = Field(
        default=10.0, gt=0, description="Maximum time of one call of a python: function, in seconds."
    )
    generator: Literal["vllm", "openai"] = Field(
        default="vllm",
        description="What samples candidates: the embedded vLLM engine, or any OpenAI-compatible server.",
    )
    base_url: str | None = Field(
        default=None,
        pattern="^https?://",
        description="Address of the OpenAI-compatible server, with --generator openai.",
    )
    api_key: SecretStr | None = Field(default=None, description="API key for the server of --base-url.")
    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes any free port.")
    default_best_of: int = Field(default=4, ge=1, description="Candidates per request if best_of is not given.")
    default_stopping: str | None = Field(
        default=None,
        description="nbest.stopping, as JSON, of requests that set neither it nor best_of, nbest.strategy or "
        "nbest.reward_model; `nbest calibrate` writes it.",
    )
    max_best_of: int = Field(default=64, ge=1, description="Maximum candidates per request.")
    max_body_bytes: int = Field(default=2_000_000, ge=1, description="Maximum size of a request body.")
    max_header_bytes: int = Field(
        default=16_384, ge=256, description="Maximum size of the request line and the headers together."
    )
    max_concurrent_requests: int = Field(
        default=256,
        ge=1,
        description="Maximum of concurrent requests of /v1, including those still sending their body; more get 429.",
    )
    client_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="Maximum time for a client to send its headers, to send its body, or to read more of the reply.",
    )
    max_running_candidates: int | None = Field(
        default=None, ge=1, description="Maximum of candidates that run at once; default: max_num_seqs."
    )
    max_queued_candidates: int | None = Field(
        default=None,
        ge=0,
        description="Maximum of candidates that wait for admission; more get 429. Default: half of "
        "max_running_candidates.",
    )
    max_queued_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Maximum of estimated tokens of the requests that wait for admission; default: 2048 for each of "
        "max_queued_candidates.",
    )
    keys_file: Path | None = Field(
        default=None,
        description="TOML file of API keys and their budgets, made by `nbest keys new`; without it no key is required.",
    )
    metrics_host: str = Field(
        default="127.0.0.1", min_length=1, description="Address to listen on for metrics, with --metrics-port."
    )
    metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Separate port for /metrics, which the main port then does not serve, and for /ready and /health, "
        "all without a key.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Device of the models; auto is CUDA if it is available.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Precision of the policy; auto is the fastest on the device."
    )
    reward_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Precision of reward models; auto is the fastest on the device. In bfloat16 a reward depends "
        "slightly on the other candidates in its batch.",
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
        description="Tokens per block of the key-value cache; smaller blocks share more of a common prompt.",
    )
    max_num_seqs: int = Field(default=128, ge=1, description="Maximum of candidates that the engine advances at once.")
    tensor_parallel_size: int = Field(default=1, ge=1, description="Devices over which the engine splits the policy.")
    score_batch_tokens: int = Field(
        default=4096,
        ge=1,
        description="Maximum tokens, including padding, of one scoring batch.",
    )
    score_max_wait_ms: float = Field(
        default=5.0,
        ge=0,
        description="Longest time a candidate waits for its scoring batch to fill.",
    )
    score_cache_entries: int = Field(
        default=0,
        ge=0,
        description="Rewards that each scorer keeps in its cache, so that the same text for the same prompt is scored "
        "once; for expensive judges and functions, and repeated answers.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with a model. Leave it off.")
    drain_s: float = Field(
        default=10.0, ge=0, description="Longest wait for requests in flight when the server stops, in seconds."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="warning", description="Lowest level that is logged; info adds a line per HTTP request."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines as text for people, or as JSON objects for machines."
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern="^https?://",
        description="OpenTelemetry collector for traces, by OTLP over HTTP, such as http://127.0.0.1:4318; without it "
        "there is no tracing.",
    )
    trace_sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Share of the traces begun here that are sampled, with --otlp-endpoint."
    )

    ray: bool = Field(default=False, description="Run generator, scorers and router as replicas on Ray Serve.")
    ray_address: str | None = Field(
        default=None,
        min_length=1,
        description="Ray cluster to join: HOST:PORT, or auto for the cluster of this machine; default: start a new "
        "cluster here.",
    )
    generator_replicas: Replicas = Field(default="1", description=f"Number of engines on Ray. {_REPLICAS}")
    generator_cpus: float = Field(
        default=1,
        ge=0,
        description="CPU cores reserved on Ray for each engine; in a joined cluster, also the number of its threads.",
    )
    generator_gpus: float = Field(
        default=0, ge=0, description="GPUs reserved on Ray for each device of an engine; 1 to serve from GPUs."
    )
    scorer_replicas: Replicas = Field(
        default="1", description=f"Number of processes on Ray that each hold all scorers. {_REPLICAS}"
    )
    scorer_cpus: float = Field(default=1, ge=0, description="CPU cores reserved on Ray for each scorer replica.")
    scorer_gpus: float = Field(
        default=0, ge=0, description="GPUs, or a fraction of a GPU, reserved on Ray for each scorer replica."
    )
    router_replicas: Replicas = Field(
        default="1", description=f"Number of processes on Ray that run the HTTP application. {_REPLICAS}"
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.default_best_of > self.max_best_of:
            raise ValueError(
                f"default_best_of ({self.default_best_of}) is above max_best_of ({self.max_best_of}); "
                "lower the first or raise the second"
            )
        if self.generator == "openai" and self.base_url is None:
            raise ValueError("generator openai needs the server's address; give --base-url https://HOST/v1")
        if self.generator == "vllm" and self.base_url is not None:
            raise ValueError("base_url is only used with --generator openai; add that or leave base_url out")
        if self.generator == "openai" and (self.adapter or self.adapter_root):
            raise ValueError("adapters need the embedded engine; leave adapter and adapter_root out")
        if self.adapter_root is not None and self.keys_file is None:
            raise ValueError(
                "adapter_root needs a key with admin rights; make a key with `nbest keys new NAME --admin` and give "
                "--keys-file"
            )
        if self.ray_address is not None and not self.ray:
            raise ValueError("ray_address is only used on Ray; add --ray or leave ray_address out")
        if self.ray and self.metrics_port is not None:
            raise ValueError("there is no metrics_port on Ray; leave it out, /metrics is on the main port there")
        if self.metrics_port == self.port:
            raise ValueError(f"metrics_port and port are both {self.port}; choose another port for one of them")
        remote_judges = [
            name
            for name, spec in self.reward_models.items()
            if isinstance(judge := parse(spec), JudgeSpec) and judge.model != OWN_POLICY
        ]
        if remote_judges and self.judge_base_url is None:
            raise ValueError(
                f"the judge {remote_judges[0]} needs its server's address; give --judge-base-url https://HOST/v1, or "
                f"use judge:{OWN_POLICY}, where the served policy judges"
            )
        return self


@dataclass(frozen=True, slots=True)
class _Source:
    """The settings of one source, and how the name of a setting is spelled there, for error messages."""

    values: Mapping[str, Any]
    spell: Callable[[str], str]


def load_settings(flags: Mapping[str, Any], config_file: Path | None = None) -> Settings:
    """The settings from all sources; `flags` holds only the flags that were given.

    Raises:
        ConfigError: with one line for each invalid setting.
    """
    file = config_file or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    sources = [  # highest precedence first
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
        # Not chained: the cause repeats the values, and one of them may be an API key.
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
    if not detail["loc"]:  # an error of `_check_combinations`
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
    """Whether the value must never be shown. A secret has no flag, since other users can read command lines."""
    return field.annotation in (SecretStr, SecretStr | None)


def flag_of(setting: str) -> str:
    """The flag of a setting; a flag that is repeated for each item is in the singular."""
    repeated = Settings.model_fields[setting].annotation == dict[str, str]
    return "--" + (setting.removesuffix("s") if repeated else setting).replace("_", "-")


def variable_of(setting: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + setting.upper()


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """NBEST_* variables that set nothing, each with the known variable that has the most similar name, if any.

    They are reported, not refused: Kubernetes adds such variables for every service with the name nbest.
    """
    known = [*OTHER_VARIABLES, *map(variable_of, Settings.model_fields)]
    unknown = [name for name in environment if name.startswith(ENV_PREFIX) and name not in known]
    return {name: next(iter(difflib.get_close_matches(name, known, n=1)), None) for name in unknown}
