"""The process in which a verifier function runs; `reranker.scorers.verifier` is the other end.

    python -m reranker.scorers.verifier_worker FILE_OR_MODULE FUNCTION

It imports the function, says `{"ready": true}`, and then answers each line of stdin with a line:

    {"prompt": "…", "completions": ["…", "…"]}   ->   {"rewards": [1.0, 0.0]}  or  {"error": "ValueError: …"}

What the function prints goes to stderr: the descriptor of stdout is taken away from it before it is imported, so that
not even a C library's output can get among the answers.
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
"""Of an exception's message; the traceback on stderr has it whole."""


def load(file_or_module: str, function: str) -> Callable[..., Any]:
    """The function; a file's own folder can be imported from, as when it is run."""
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
    found: Callable[..., Any] = getattr(module, function)
    if not callable(found):
        raise TypeError(f"{function} is no function")
    return found


def rewards(function: Callable[..., Any], prompt: str, completions: list[str]) -> list[float]:
    """One float per completion, whatever kind of numbers and sequence the function returns.

    Raises:
        Exception: what the function raised, or that its answer is not one number per completion.
    """
    returned = [float(number) for number in function(prompt, completions)]
    if len(returned) != len(completions):
        raise ValueError(f"{len(returned)} numbers were returned for {len(completions)} completions")
    return returned


def main() -> None:
    """Serves one function until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")

    try:
        function = load(*sys.argv[1:])
    except Exception as error:  # noqa: BLE001 (whatever the user's module raises is theirs to read)
        traceback.print_exc()
        tell({"error": _named(error)})
        return
    tell({"ready": True})
    for line in sys.stdin:
        try:
            tell({"rewards": rewards(function, **json.loads(line))})
        except Exception as error:  # noqa: BLE001 (as above)
            traceback.print_exc()
            tell({"error": _named(error)})


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]


if __name__ == "__main__":
    main()
