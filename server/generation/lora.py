"""Which adapter new requests are drawn with, and when an engine may forget an older one.

    load v1 ──> requests a, b ─────────────> b ends: v1 goes from the engine
                         load v2 ──> requests c, d …

Every version has a name and an id of its own in the engine, whose prefix cache keys blocks by the name: nothing that
one version computed is taken for another's. A version that is loaded again while it still draws is the same one. What
fails to load is taken back, and the version before goes on.

Whether an adapter was made for this policy, told before an engine reads it.

The engine itself would take an adapter of a smaller model, padded, and pass over layers that the policy does not have.
So every matrix of the adapter is compared with the one it changes: A is rank × inputs, B is outputs × rank.
"""

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from server.errors import BadRequestError, NotReadyError, OverloadedError
from server.generation.weight_store import Adapter, WeightStore

PEFT_PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[int, ...]]


def policy_shapes(path: str, *, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every matrix of a model, by the name of its module; its configuration is all that is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):  # no memory for weights
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor) and weight.dim() == 2
    }


def check_fits(adapter: Adapter, policy: Shapes, *, told_as: str) -> None:
    """Compares each pair of matrices with the policy's own; the order of a matrix's sides is the layer's affair.

    Raises:
        BadRequestError: it was made for another model.
    """
    made_for = "; it was made for another model, give the adapter of this one."
    for module, changed in changed_shapes(adapter.shapes).items():
        if module not in policy:
            raise BadRequestError(f"The adapter {told_as} changes {module}, which the policy does not have{made_for}")
        if sorted(changed) != sorted(policy[module]):
            sides, own = (" by ".join(map(str, shape)) for shape in (changed, policy[module]))
            raise BadRequestError(
                f"The adapter {told_as} changes {module} as a matrix of {sides}, and the policy's is {own}{made_for}"
            )


def changed_shapes(tensors: Shapes) -> dict[str, tuple[int, int]]:
    """Module -> outputs and inputs of what B·A adds to it."""
    sides: dict[str, dict[str, int]] = {}
    for name, shape in tensors.items():
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in ("lora_A", "lora_embedding_A"):
            sides.setdefault(stem, {})["inputs"] = shape[1]
        elif kind in ("lora_B", "lora_embedding_B"):
            sides.setdefault(stem, {})["outputs"] = shape[0]
    return {
        stem.removeprefix(PEFT_PREFIX): (found["outputs"], found["inputs"])
        for stem, found in sides.items()
        if len(found) == 2
    }


MAX_VERSIONS = 4
"""Versions an engine holds at once: the newest, and those whose requests have not ended."""
BUSY_RETRY_AFTER_S = 5.0


class EngineRefusedError(Exception):
    """The engine does not take an adapter; the message is its own."""


class LoraEngine(Protocol):
    """An engine's calls for adapters."""

    async def add(self, name: str, number: int, path: str) -> Any:
        """Loads an adapter; what is returned goes with each request that is to use it.

        Raises:
            EngineRefusedError: with the engine's reason.
            NotReadyError: the engine has died.
        """

    async def remove(self, number: int) -> None:
        """Forgets an adapter that no request uses."""


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """One version in the engine. `request` goes with each engine request; `users` are the generations under way."""

    adapter: Adapter
    number: int
    request: Any
    users: int = 0


class EngineAdapters:
    """The adapters of one engine that serves ranks up to `max_rank`; None is an engine without any."""

    def __init__(
        self, engine: LoraEngine, shelf: WeightStore, policy_shapes: Callable[[], Shapes], max_rank: int | None
    ) -> None:
        self._engine = engine
        self._shelf = shelf
        self._policy_shapes = policy_shapes
        self._max_rank = max_rank
        self._numbers = itertools.count(1)
        self._versions: dict[str, LoadedAdapter] = {}
        self._current: LoadedAdapter | None = None
        self._changing = asyncio.Lock()
        self._removals: set[asyncio.Task[None]] = set()

    @property
    def are_possible(self) -> bool:
        """Whether the engine was started with room for them."""
        return self._max_rank is not None

    async def load(self, source: str) -> str:
        """Serves the adapter of that directory from now on.

        Raises:
            BadRequestError: it cannot be served, and what was served goes on.
            OverloadedError: too many earlier versions still draw.
            NotReadyError: the engine has died.
        """
        if self._max_rank is None:
            raise BadRequestError("The server was started without adapters; start it with --adapter or --adapter-root.")
        async with self._changing:
            adapter = await asyncio.to_thread(self._shelf.keep, Path(source))
            try:
                await self._serve(adapter, source)
            except BaseException:
                if adapter.version not in self._versions:
                    self._shelf.drop(adapter)
                raise
        return adapter.version

    async def resume(self) -> None:
        """Serves what the engine before this one served.

        Raises:
            BadRequestError: it cannot be served.
            NotReadyError: the engine has died.
        """
        if self._shelf.adapter is not None:
            await self._serve(self._shelf.adapter, str(self._shelf.adapter.path))

    def begin(self) -> LoadedAdapter | None:
        """The adapter for a generation that begins, until it is told to `end`."""
        if self._current is not None:
            self._current.users += 1
        return self._current

    def end(self, loaded: LoadedAdapter | None) -> None:
        if loaded is None:
            return
        loaded.users -= 1
        if self._is_idle(loaded):
            removal = asyncio.create_task(self._remove_in_turn(loaded))
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)

    async def settled(self) -> None:
        """Returns when the engine has forgotten all that it may."""
        await asyncio.gather(*self._removals)

    async def close(self) -> None:
        """Gives up what is still to be removed; the engine goes as a whole."""
        for removal in self._removals:
            removal.cancel()
        await asyncio.gather(*self._removals, return_exceptions=True)

    async def _serve(self, adapter: Adapter, told_as: str) -> None:
        loaded = self._versions.get(adapter.version) or await self._added(adapter, told_as)
        previous, self._current = self._current, loaded
        self._shelf.adapter = adapter
        if previous is not None and self._is_idle(previous):
            await self._remove(previous)

    async def _added(self, adapter: Adapter, told_as: str) -> LoadedAdapter:
        if self._max_rank is not None and adapter.rank > self._max_rank:
            raise BadRequestError(
                f"The adapter {told_as} has rank {adapter.rank}, and ranks up to {self._max_rank} are served; start "
                f"the server with --max-lora-rank {adapter.rank}."
            )
        check_fits(adapter, await asyncio.to_thread(self._policy_shapes), told_as=told_as)
        if len(self._versions) >= MAX_VERSIONS:
            raise OverloadedError(
                f"Requests still use {MAX_VERSIONS - 1} earlier versions; load the next when some of them have ended.",
                retry_after_s=BUSY_RETRY_AFTER_S,
            )
        number = next(self._numbers)
        try:
            request = await self._engine.add(adapter.version, number, str(adapter.path))
        except EngineRefusedError as error:
            await self._engine.remove(number)  # it may have been half loaded
            raise BadRequestError(f"The engine cannot serve the adapter {told_as}: {error}") from error
        loaded = self._versions[adapter.version] = LoadedAdapter(adapter, number, request)
        return loaded

    def _is_idle(self, loaded: LoadedAdapter) -> bool:
        is_held = self._versions.get(loaded.adapter.version) is loaded
        return is_held and loaded.users == 0 and loaded is not self._current

    async def _remove_in_turn(self, loaded: LoadedAdapter) -> None:
        async with self._changing:
            if self._is_idle(loaded):
                await self._remove(loaded)

    async def _remove(self, loaded: LoadedAdapter) -> None:
        del self._versions[loaded.adapter.version]
        try:
            await self._engine.remove(loaded.number)
        except NotReadyError:
            return  # it has died, and all adapters with it
        self._shelf.drop(loaded.adapter)
