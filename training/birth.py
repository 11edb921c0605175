"""When, from which commit, on what and with which versions a figure was measured."""

import platform
import shutil
import subprocess
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch


def birth(packages: Iterable[str] = ("torch", "transformers", "peft")) -> dict[str, Any]:
    """The commit has a trailing "+" if tracked files were not as it has them."""
    git = shutil.which("git") or "git"

    def told(*arguments: str) -> str:
        return subprocess.run([git, *arguments], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603

    changed = told("status", "--porcelain", "--untracked-files=no")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": told("rev-parse", "HEAD") + ("+" if changed else ""),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in packages},
    }
