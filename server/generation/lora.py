"""The LoRA adapters of one engine: which version new requests use, and when the engine may drop an older one.

    load v1 ──> requests a, b ─────────────> b ends: v1 is removed from the engine
                         load v2 ──> requests c, d …

Every version has its own name and id in the engine, and the engine's prefix cache keys blocks by the name, so no block
that one version computed is used by another. A version that is loaded again while requests still use it is not loaded
twice. An adapter that fails to load is removed, and the previous version stays in use.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from server.errors import BadRequestError, NotReadyError, OverloadedError
from server.generation.adapter_shapes import Shapes, check_fits
from server.generation.weight_store import Adapter, WeightStore

MAX_VERSIONS = 4
"""Versions that an engine holds at once: the newest, and those whose requests have not ended."""
BUSY_RETRY_AFTER_S = 5.0


class EngineRefusedError(Exception):
    """The engine cannot load an adapter; the message is the engine's."""


class LoraEngine(Protocol):
    """An engine's calls for adapters."""

    async def add(self, name: str, number: int, path: str) -> Any:
        """Loads an adapter and returns the object that each request with this adapter passes to the engine.

        Raises:
            EngineRefusedError: the engine cannot load it, with the engine's reason.
            NotReadyError: the engine has died.
        """

    async def remove(self, number: int) -> None:
        """Removes an adapter that no request uses."""


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """One version in the engine.

    `request` is what `LoraEngine.add` returned. `users` is the number of running generations with this version.
    """

    adapter: Adapter
    number: int
    request: Any
    users: int = 0


class EngineAdapters:
    """The adapters of one engine, of rank up to `max_rank`; with None the engine takes no adapters.

    The adapter in use is recorded in `weight_store`, so that the next engine can load it.
    """

    def __init__(
        self, engine: LoraEngine, weight_store: WeightStore, policy_shapes: Callable[[], Shapes], max_rank: int | None
    ) -> None:
        self._engine = engine
        self._weight_store = weight_store
        self._policy_shapes = policy_shapes
        self._max_rank = max_rank
        self._numbers = itertools.count(1)
        self._versions: dict[str, LoadedAdapter] = {}
        self._current: LoadedAdapter | None = None
        self._lock = asyncio.Lock()
        self._removals: set[asyncio.Task[None]] = set()

    @property
    def are_supported(self) -> bool:
        """Whether the engine was started with memory for adapters."""
        return self._max_rank is not None

    async def load(self, source: str) -> str:
        """Uses the adapter in the directory `source` for new requests, and returns its version.

        Raises:
            BadRequestError: the adapter cannot be served; the previous version stays in use.
            OverloadedError: requests still use too many earlier versions.
            NotReadyError: the engine has died.
        """
        if self._max_rank is None:
            raise BadRequestError("The server was started without adapters; start it with --adapter or --adapter-root.")
        async with self._lock:
            adapter = await asyncio.to_thread(self._weight_store.copy_adapter, Path(source))
            try:
                await self._use(adapter, source)
            except BaseException:
                if adapter.version not in self._versions:
                    self._weight_store.remove(adapter)
                raise
        return adapter.version

    async def resume(self) -> None:
        """Loads the adapter that the previous engine used, if there is one.

        Raises:
            BadRequestError: it cannot be served.
            NotReadyError: the engine has died.
        """
        if self._weight_store.adapter is not None:
            await self._use(self._weight_store.adapter, str(self._weight_store.adapter.path))

    def begin(self) -> LoadedAdapter | None:
        """The adapter for a generation that starts; the caller passes it to `end` when the generation has ended."""
        if self._current is not None:
            self._current.users += 1
        return self._current

    def end(self, loaded: LoadedAdapter | None) -> None:
        """Counts one user less; starts the removal of a version that is neither current nor in use."""
        if loaded is None:
            return
        loaded.users -= 1
        if self._is_idle(loaded):
            removal = asyncio.create_task(self._remove_if_idle(loaded))
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)

    async def removals_done(self) -> None:
        """Returns when the engine has removed every idle version."""
        await asyncio.gather(*self._removals)

    async def close(self) -> None:
        """Cancels pending removals; the engine is closed as a whole."""
        for removal in self._removals:
            removal.cancel()
        await asyncio.gather(*self._removals, return_exceptions=True)

    async def _use(self, adapter: Adapter, source: str) -> None:
        loaded = self._versions.get(adapter.version) or await self._add(adapter, source)
        previous, self._current = self._current, loaded
        self._weight_store.adapter = adapter
        if previous is not None and self._is_idle(previous):
            await self._remove(previous)

    async def _add(self, adapter: Adapter, source: str) -> LoadedAdapter:
        """Loads a version into the engine; `source` is the adapter's path in error messages."""
        if self._max_rank is not None and adapter.rank > self._max_rank:
            raise BadRequestError(
                f"The adapter {source} has rank {adapter.rank}, and ranks up to {self._max_rank} are served; start "
                f"the server with --max-lora-rank {adapter.rank}."
            )
        check_fits(adapter, await asyncio.to_thread(self._policy_shapes), source=source)
        if len(self._versions) >= MAX_VERSIONS:
            raise OverloadedError(
                f"Requests still use {MAX_VERSIONS - 1} earlier versions; load the next when some of them have ended.",
                retry_after_s=BUSY_RETRY_AFTER_S,
            )
        number = next(self._numbers)
        try:
            request = await self._engine.add(adapter.version, number, str(adapter.path))
        except EngineRefusedError as error:
            await self._engine.remove(number)  # it may be partly loaded
            raise BadRequestError(f"The engine cannot serve the adapter {source}: {error}") from error
        loaded = self._versions[adapter.version] = LoadedAdapter(adapter, number, request)
        return loaded

    def _is_idle(self, loaded: LoadedAdapter) -> bool:
        is_in_engine = self._versions.get(loaded.adapter.version) is loaded
        return is_in_engine and loaded.users == 0 and loaded is not self._current

    async def _remove_if_idle(self, loaded: LoadedAdapter) -> None:
        async with self._lock:
            if self._is_idle(loaded):
                await self._remove(loaded)

    async def _remove(self, loaded: LoadedAdapter) -> None:
        del self._versions[loaded.adapter.version]
        try:
            await self._engine.remove(loaded.number)
        except NotReadyError:
            return  # the engine has died, and its adapters are gone
        self._weight_store.remove(loaded.adapter)
