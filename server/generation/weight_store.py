"""The weights that a running engine is given: LoRA adapters as private copies, each named by what is in it.

An adapter is a directory that PEFT wrote: `adapter_config.json` and `adapter_model.safetensors`. Its version is a
digest of the two files. So every replica calls the same weights by the same version, whoever loads an adapter again
changes nothing, and a prefix cache that is keyed by the version can never mix two.

The engine reads a copy, for it may read an adapter again at any time, and whoever trains writes over theirs. Full
weights are too large for that: they are read where they are.
"""

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open

from server.errors import BadRequestError

Change = Literal["reload_weights", "load_adapter"]
"""The methods of a generator that change its weights, in the order in which a new engine repeats them."""
CHANGES: tuple[Change, ...] = get_args(Change)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VERSION_DIGITS = 12
"""48 bits: two of a million adapters share a version with a probability of 0.2 percent."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter's files, and what they say. `shapes` are those of its tensors, by name."""

    path: Path
    version: str
    rank: int
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class FullWeights:
    """A model's own weights, in its directory."""

    path: Path
    version: str


class WeightStore:
    """What the engines of one server are to serve beside what the settings name; it outlives each of them.

    An engine that starts takes the weights of `reloaded` and the `adapter`, where there are any.
    """

    def __init__(self) -> None:
        self.adapter: Adapter | None = None
        self.reloaded: FullWeights | None = None
        self._directory = Path(tempfile.mkdtemp(prefix="nbest-weights-"))
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)  # at the latest when Python ends

    def keep(self, source: Path) -> Adapter:
        """A copy of the adapter at `source`; the one that is there already where nothing has changed.

        Raises:
            BadRequestError: there is no adapter that could be read.
        """
        with tempfile.TemporaryDirectory(dir=self._directory) as incoming:
            copied = Path(incoming) / "adapter"
            copied.mkdir()
            for name in (CONFIG, WEIGHTS):
                try:
                    shutil.copyfile(source / name, copied / name)
                except OSError as error:
                    raise BadRequestError(
                        f"The adapter {source} has no {name} that can be read ({error.strerror}); give a directory "
                        "that PEFT's save_pretrained has written."
                    ) from error
            version = digest(copied / CONFIG, copied / WEIGHTS)
            kept = self._directory / version
            if not kept.exists():
                read_adapter(copied, version, told_as=source)
                copied.rename(kept)
        return read_adapter(kept, version, told_as=source)

    def drop(self, adapter: Adapter) -> None:
        """Removes a copy that no engine will read again."""
        shutil.rmtree(adapter.path, ignore_errors=True)


def digest(*files: Path) -> str:
    """The version of weights: the first digits of a SHA-256 over the contents."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()[:VERSION_DIGITS]


def version_at(change: Change, source: Path) -> str:
    """The version of what would be loaded from there.

    Raises:
        BadRequestError: it is not there.
    """
    if change == "reload_weights":
        return full_weights(source).version
    try:
        return digest(source / CONFIG, source / WEIGHTS)
    except OSError as error:
        raise BadRequestError(f"The adapter {source} cannot be read: {error.strerror}; correct its path.") from error


def full_weights(source: Path) -> FullWeights:
    """The weights in a model's directory.

    Raises:
        BadRequestError: there are none.
    """
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise BadRequestError(
            f"{source} has no weights (*.safetensors); give a directory that save_pretrained has written."
        )
    return FullWeights(source, digest(*files))


def read_adapter(path: Path, version: str, *, told_as: Path) -> Adapter:
    """What the files of an adapter say, which errors call `told_as`.

    Raises:
        BadRequestError: they are damaged, or of another kind than LoRA.
    """
    try:
        config = json.loads((path / CONFIG).read_bytes())
        with safe_open(path / WEIGHTS, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no dict
    except (ValueError, OSError, SafetensorError) as error:
        raise BadRequestError(f"The adapter {told_as} cannot be read: {error}; save it again with PEFT.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise BadRequestError(f"The adapter {told_as} is of PEFT's type {kind}; only LORA can be served.")
    return Adapter(path, version, rank_of(config), shapes)


def rank_of(config: Mapping[str, Any]) -> int:
    """The largest rank in an adapter's configuration."""
    return int(max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()]))
