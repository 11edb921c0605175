"""The registry of the weights that all generator replicas of one application serve, kept in Ray's key-value store.

A replica that starts later, or replaces a dead one, loads the registered weights at its start. A replica that missed a
change loads it at its next health check. The store belongs to the head of the cluster and lives as long as the cluster;
each deployment of the application starts with an empty registry.
"""

import json
import uuid
from dataclasses import asdict, dataclass
from typing import Protocol

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from server.generation.weight_store import WEIGHT_CHANGES, WeightChange

NAMESPACE = "nbest-weights"


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """The path from which weights were loaded, and their version."""

    path: str
    version: str


ServedWeights = dict[WeightChange, LoadedWeights]
"""The last weights that each kind of change has loaded."""


class WeightsRegistry(Protocol):
    """The registry of one deployment."""

    def read(self) -> ServedWeights: ...

    def write(self, served: ServedWeights) -> None: ...


class RayWeightsRegistry:
    """A `WeightsRegistry` in the cluster's store: copies of this object in other processes use the same entry."""

    def __init__(self) -> None:
        self._key = uuid.uuid4().hex

    def read(self) -> ServedWeights:
        stored: bytes | None = _internal_kv_get(self._key, namespace=NAMESPACE)
        entries = json.loads(stored) if stored else {}
        return {change: LoadedWeights(**entries[change]) for change in WEIGHT_CHANGES if change in entries}

    def write(self, served: ServedWeights) -> None:
        entries = {change: asdict(loaded) for change, loaded in served.items()}
        _internal_kv_put(self._key, json.dumps(entries), overwrite=True, namespace=NAMESPACE)
