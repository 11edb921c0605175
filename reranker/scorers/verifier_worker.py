"""The process that runs a verifier function; `reranker.scorers.verifier` starts it and talks to it.

    python -m reranker.scorers.verifier_worker FILE_OR_MODULE FUNCTION

It imports the function, writes `{"ready": true}` to stdout, and then answers each line of stdin with a line:

    {"prompt": "…", "completions": ["…", "…"]}   ->   {"rewards": [1.0, 0.0]}  or  {"error": "ValueError: …"}

What the function prints goes to stderr. The file descriptor of stdout is redirected before the import, so that not even
the output of a C library can mix with the answers.
"""

import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_ERROR_CHARACTERS = 1000
"""Longest message of an exception in an answer; the traceback on stderr has it in full."""


def load(file_or_module: str, function: str) -> Callable[..., Any]:
    """Imports the function; a file can import from its own folder, as if it were run as a script."""
    if file_or_module.endswith(".py"):
        path = Path(file_or_module).resolve()
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(file_or_module)
    loaded: Callable[..., Any] = getattr(module, function)
    if not callable(loaded):
        raise TypeError(f"{function} is not a function")
    return loaded


def rewards(function: Callable[..., Any], prompt: str, completions: list[str]) -> list[float]:
    """One float per completion; the function may return any kind of numbers in any kind of sequence.

    Raises:
        Exception: the function raised it, or did not return one number per completion.
    """
    returned = [float(number) for number in function(prompt, completions)]
    if len(returned) != len(completions):
        raise ValueError(f"{len(returned)} numbers were returned for {len(completions)} completions")
    return returned


def main() -> None:
    """Serves one function until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")

    try:
        function = load(*sys.argv[1:])
    except Exception as error:  # noqa: BLE001 (the user has to see what their module raises)
        traceback.print_exc()
        send({"error": _with_type(error)})
        return
    send({"ready": True})
    for line in sys.stdin:
        try:
            send({"rewards": rewards(function, **json.loads(line))})
        except Exception as error:  # noqa: BLE001 (as above)
            traceback.print_exc()
            send({"error": _with_type(error)})


def _with_type(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]


if __name__ == "__main__":
    main()
