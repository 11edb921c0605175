"""The weights that engines of one server load: LoRA adapters as private copies, versioned by their content.

An adapter is a directory that PEFT wrote: `adapter_config.json` and `adapter_model.safetensors`. Its version is a
digest of the two files. So every replica has the same version for the same weights, loading an adapter again changes
nothing, and a prefix cache that is keyed by the version can never mix two adapters.

The engine reads a copy, because it may read an adapter again at any time and a trainer overwrites its own files. Full
weights are too large to copy: the engine reads them in place.
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

from reranker.fsio import sha256_of
from server.errors import BadRequestError

WeightChange = Literal["reload_weights", "load_adapter"]
"""The methods of a generator that change its weights, in the order in which a new engine repeats them."""
WEIGHT_CHANGES: tuple[WeightChange, ...] = get_args(WeightChange)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VERSION_DIGITS = 12
"""48 bits: two of a million adapters share a version with a probability of 0.2 percent."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """The directory of one adapter, and what its files contain. `shapes`: tensor name -> shape."""

    path: Path
    version: str
    rank: int
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class FullWeights:
    """The directory of a model's full weights, and their version."""

    path: Path
    version: str


class WeightStore:
    """The weights that replace or extend those of the settings; it outlives each engine of the server.

    A new engine loads `reloaded`, the full weights, and `adapter`, where they are not None.
    """

    def __init__(self) -> None:
        self.adapter: Adapter | None = None
        self.reloaded: FullWeights | None = None
        self._directory = Path(tempfile.mkdtemp(prefix="nbest-weights-"))
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)  # at the latest when Python exits

    def copy_adapter(self, source: Path) -> Adapter:
        """A private copy of the adapter in the directory `source`; an existing copy where the files are the same.

        Raises:
            BadRequestError: the directory holds no readable LoRA adapter.
        """
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            incoming = Path(directory) / "adapter"
            incoming.mkdir()
            for name in (CONFIG, WEIGHTS):
                try:
                    shutil.copyfile(source / name, incoming / name)
                except OSError as error:
                    raise BadRequestError(
                        f"The adapter {source} has no {name} that can be read ({error.strerror}); give a directory "
                        "that PEFT's save_pretrained has written."
                    ) from error
            version = digest(incoming / CONFIG, incoming / WEIGHTS)
            copy = self._directory / version
            if not copy.exists():
                read_adapter(incoming, version, source=source)
                incoming.rename(copy)
        return read_adapter(copy, version, source=source)

    def remove(self, adapter: Adapter) -> None:
        """Deletes a copy that no engine will read again."""
        shutil.rmtree(adapter.path, ignore_errors=True)


def digest(*files: Path) -> str:
    """The version of weights: the first digits of the SHA-256 of the files' SHA-256 digests."""
    combined = hashlib.sha256()
    for path in files:
        combined.update(bytes.fromhex(sha256_of(path)))
    return combined.hexdigest()[:VERSION_DIGITS]


def version_at(change: WeightChange, source: Path) -> str:
    """The version of the weights that this change would load from the directory `source`.

    Raises:
        BadRequestError: the directory does not hold them.
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
        BadRequestError: the directory holds no weights.
    """
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise BadRequestError(
            f"{source} has no weights (*.safetensors); give a directory that save_pretrained has written."
        )
    return FullWeights(source, digest(*files))


def read_adapter(path: Path, version: str, *, source: Path) -> Adapter:
    """Reads the adapter in the directory `path`; error messages name it `source`.

    Raises:
        BadRequestError: the files are damaged, or the adapter is not a LoRA adapter.
    """
    try:
        config = json.loads((path / CONFIG).read_bytes())
        with safe_open(path / WEIGHTS, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no dict
    except (ValueError, OSError, SafetensorError) as error:
        raise BadRequestError(f"The adapter {source} cannot be read: {error}; save it again with PEFT.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise BadRequestError(f"The adapter {source} is of PEFT's type {kind}; only LORA can be served.")
    return Adapter(path, version, rank_of(config), shapes)


def rank_of(config: Mapping[str, Any]) -> int:
    """The largest rank in an adapter's configuration."""
    return int(max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()]))
