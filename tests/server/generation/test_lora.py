"""Adapters come and go beside requests under way; what cannot be served changes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from server.errors import BadRequestError, OverloadedError
from server.generation.lora import EngineAdapters, EngineRefusedError
from server.generation.weight_store import CONFIG, WEIGHTS, WeightStore, version_at

POLICY = {"model.layers.0.mlp.up_proj": (6, 4), "model.embed_tokens": (9, 4)}


class ScriptedLoraEngine:
    """Remembers the adapters it holds, by number, and what their directories held when they came."""

    def __init__(self) -> None:
        self.held: dict[int, str] = {}
        self.added: list[str] = []
        self.removed: list[int] = []
        self.refusal: str | None = None

    async def add(self, name: str, number: int, path: str) -> str:
        if self.refusal is not None:
            raise EngineRefusedError(self.refusal)
        assert (Path(path) / WEIGHTS).is_file()
        self.added.append(name)
        self.held[number] = path
        return f"request {number}"

    async def remove(self, number: int) -> None:
        self.removed.append(number)
        self.held.pop(number, None)


def save(
    path: Path, content: float = 0.0, *, module: str = "model.layers.0.mlp.up_proj", rank: int = 2, **config: object
) -> str:
    """An adapter over a layer of 4 inputs and 6 outputs."""
    path.mkdir(exist_ok=True)
    stem = f"base_model.model.{module}"
    weights = {
        f"{stem}.lora_A.weight": np.full((rank, 4), content, np.float32),
        f"{stem}.lora_B.weight": np.zeros((6, rank), np.float32),
    }
    save_file(weights, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank} | config))
    return str(path)


@pytest.fixture
def engine() -> ScriptedLoraEngine:
    return ScriptedLoraEngine()


@pytest.fixture
def adapters(engine: ScriptedLoraEngine) -> EngineAdapters:
    return EngineAdapters(engine, WeightStore(), lambda: POLICY, max_rank=8)


async def test_requests_keep_the_version_they_began_with_and_it_goes_when_they_have_ended(
    engine: ScriptedLoraEngine, adapters: EngineAdapters, tmp_path: Path
) -> None:
    first = await adapters.load(save(tmp_path / "v1", 1))
    a, b = adapters.begin(), adapters.begin()
    second = await adapters.load(save(tmp_path / "v2", 2))
    c = adapters.begin()
    assert a is not None
    assert c is not None
    assert (a.request, b is a, c.request) == ("request 1", True, "request 2")
    assert (a.adapter.version, c.adapter.version) == (first, second)
    adapters.end(a)
    await adapters.settled()
    assert set(engine.held) == {1, 2}
    adapters.end(b)
    await adapters.settled()
    assert set(engine.held) == {2}
    assert not a.adapter.path.exists()
    adapters.end(c)
    await adapters.settled()
    assert set(engine.held) == {2}, "the newest stays without requests"


async def test_a_version_nobody_uses_goes_at_once(
    engine: ScriptedLoraEngine, adapters: EngineAdapters, tmp_path: Path
) -> None:
    for content in (1, 2, 3):
        await adapters.load(save(tmp_path / "v", content))
    assert (set(engine.held), engine.removed) == ({3}, [1, 2])


async def test_the_same_files_are_the_same_version_and_are_loaded_once(
    engine: ScriptedLoraEngine, adapters: EngineAdapters, tmp_path: Path
) -> None:
    versions = [await adapters.load(save(tmp_path / name, 1)) for name in ("here", "there", "here")]
    assert versions == [version_at("load_adapter", tmp_path / "here")] * 3
    assert len(engine.added) == 1


async def test_a_version_that_still_draws_can_come_back(
    engine: ScriptedLoraEngine, adapters: EngineAdapters, tmp_path: Path
) -> None:
    await adapters.load(save(tmp_path / "v1", 1))
    drawing = adapters.begin()
    await adapters.load(save(tmp_path / "v2", 2))
    await adapters.load(str(tmp_path / "v1"))
    assert adapters.begin() is drawing
    assert (len(engine.added), set(engine.held)) == (2, {1})


async def test_what_is_written_over_a_loaded_adapter_does_not_reach_the_engine(
    engine: ScriptedLoraEngine, adapters: EngineAdapters, tmp_path: Path
) -> None:
    version = await adapters.load(save(tmp_path / "v", 1))
    save(tmp_path / "v", 2)
    assert version_at("load_adapter", Path(engine.held[1])) == version


async def test_the_next_engine_serves_the_same(engine: ScriptedLoraEngine, tmp_path: Path) -> None:
    shelf, successor = WeightStore(), ScriptedLoraEngine()
    version = await EngineAdapters(engine, shelf, lambda: POLICY, max_rank=8).load(save(tmp_path / "v", 1))
    save(tmp_path / "v", 2)
    after = EngineAdapters(successor, shelf, lambda: POLICY, max_rank=8)
    await after.resume()
    assert successor.added == [version]
    assert after.begin() is not None


async def test_an_adapter_the_engine_refuses_is_taken_back_and_the_one_before_goes_on(
    engine: ScriptedLoraEngine, adapters: EngineAdapters, tmp_path: Path
) -> None:
    first = await adapters.load(save(tmp_path / "v1", 1))
    engine.refusal = "No DoRA."
    with pytest.raises(BadRequestError, match=r"cannot serve the adapter .*v2: No DoRA\."):
        await adapters.load(save(tmp_path / "v2", 2))
    begun = adapters.begin()
    assert begun is not None
    assert (begun.adapter.version, set(engine.held), engine.removed) == (first, {1}, [2])


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"rank": 9}, "has rank 9, and ranks up to 8 are served; start the server with --max-lora-rank 9"),
        ({"rank_pattern": {"up_proj": 16}}, "has rank 16"),
        (
            {"module": "model.layers.1.mlp.up_proj"},
            "changes model.layers.1.mlp.up_proj, which the policy does not have",
        ),
        (
            {"module": "model.embed_tokens"},
            "as a matrix of 6 by 4, and the policy's is 9 by 4; it was made for another",
        ),
        ({"peft_type": "IA3"}, "is of PEFT's type IA3; only LORA can be served"),
    ],
)
async def test_an_adapter_that_does_not_fit_is_refused_with_the_reason(
    engine: ScriptedLoraEngine, adapters: EngineAdapters, tmp_path: Path, made: dict[str, object], told: str
) -> None:
    with pytest.raises(BadRequestError, match=told):
        await adapters.load(save(tmp_path / "v", 1, **made))  # type: ignore[arg-type]
    assert (engine.added, adapters.begin()) == ([], None)


async def test_files_that_are_missing_or_damaged_are_told(adapters: EngineAdapters, tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match=r"has no adapter_config\.json that can be read \(No such file"):
        await adapters.load(str(tmp_path / "nowhere"))
    path = Path(save(tmp_path / "v"))
    (path / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(BadRequestError, match="v cannot be read"):
        await adapters.load(str(path))


async def test_more_versions_than_an_engine_holds_are_put_off(adapters: EngineAdapters, tmp_path: Path) -> None:
    for content in range(4):
        await adapters.load(save(tmp_path / "v", content))
        adapters.begin()
    with pytest.raises(OverloadedError, match="Requests still use 3 earlier versions"):
        await adapters.load(save(tmp_path / "v", 5))


async def test_without_room_for_adapters_none_is_loaded(engine: ScriptedLoraEngine, tmp_path: Path) -> None:
    adapters = EngineAdapters(engine, WeightStore(), lambda: POLICY, max_rank=None)
    with pytest.raises(BadRequestError, match="started without adapters"):
        await adapters.load(save(tmp_path / "v"))
