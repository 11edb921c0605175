"""What the generator replicas of one application are to serve, kept where all of them find it: in Ray's own store.

A replica that is started later, or in place of one that died, serves what was loaded before it came; one that missed a
change makes up for it at its next health check. The store is that of the cluster's head and lives as long as it does;
each deployment of the application begins with an empty record.
"""

import json
import uuid
from dataclasses import asdict, dataclass
from typing import Protocol

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from server.generation.weight_store import CHANGES, Change

NAMESPACE = "nbest-weights"


@dataclass(frozen=True, slots=True)
class Loaded:
    """Weights that were loaded from `path`, and their version."""

    path: str
    version: str


Record = dict[Change, Loaded]


class WeightsRecord(Protocol):
    """The record of one deployment."""

    def read(self) -> Record: ...

    def write(self, record: Record) -> None: ...


class RecordOnRay:
    """`WeightsRecord` in the store of the cluster: whoever has this object, in whichever process, has that record."""

    def __init__(self) -> None:
        self._key = uuid.uuid4().hex

    def read(self) -> Record:
        stored: bytes | None = _internal_kv_get(self._key, namespace=NAMESPACE)
        told = json.loads(stored) if stored else {}
        return {change: Loaded(**told[change]) for change in CHANGES if change in told}

    def write(self, record: Record) -> None:
        told = {change: asdict(loaded) for change, loaded in record.items()}
        _internal_kv_put(self._key, json.dumps(told), overwrite=True, namespace=NAMESPACE)
