"""Adapters are loaded and removed while requests run; an adapter that cannot be served changes nothing."""

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
    """Records the adapters that it holds (number -> path), and those that were added and removed."""

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
    """Saves an adapter for a layer of 4 inputs and 6 outputs."""
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


async def test_requests_keep_their_version_and_it_is_removed_when_they_have_ended(
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
    await adapters.removals_done()
    assert set(engine.held) == {1, 2}
    adapters.end(b)
    await adapters.removals_done()
    assert set(engine.held) == {2}
    assert not a.adapter.path.exists()
    adapters.end(c)
    await adapters.removals_done()
    assert set(engine.held) == {2}, "the newest version stays without requests"


async def test_a_version_without_requests_is_removed_at_once(
    engine: ScriptedLoraEngine, adapters: EngineAdapters, tmp_path: Path
) -> None:
    for content in (1, 2, 3):
        await adapters.load(save(tmp_path / "v", content))
    assert (set(engine.held), engine.removed) == ({3}, [1, 2])


async def test_the_same_files_have_the_same_version_and_are_loaded_once(
    engine: ScriptedLoraEngine, adapters: EngineAdapters, tmp_path: Path
) -> None:
    versions = [await adapters.load(save(tmp_path / name, 1)) for name in ("here", "there", "here")]
    assert versions == [version_at("load_adapter", tmp_path / "here")] * 3
    assert len(engine.added) == 1


async def test_a_version_that_requests_still_use_can_become_the_current_one_again(
    engine: ScriptedLoraEngine, adapters: EngineAdapters, tmp_path: Path
) -> None:
    await adapters.load(save(tmp_path / "v1", 1))
    first = adapters.begin()
    await adapters.load(save(tmp_path / "v2", 2))
    await adapters.load(str(tmp_path / "v1"))
    assert adapters.begin() is first
    assert (len(engine.added), set(engine.held)) == (2, {1})


async def test_overwriting_a_loaded_adapter_does_not_change_the_engines_copy(
    engine: ScriptedLoraEngine, adapters: EngineAdapters, tmp_path: Path
) -> None:
    version = await adapters.load(save(tmp_path / "v", 1))
    save(tmp_path / "v", 2)
    assert version_at("load_adapter", Path(engine.held[1])) == version


async def test_the_next_engine_loads_the_same_adapter(engine: ScriptedLoraEngine, tmp_path: Path) -> None:
    weight_store, next_engine = WeightStore(), ScriptedLoraEngine()
    version = await EngineAdapters(engine, weight_store, lambda: POLICY, max_rank=8).load(save(tmp_path / "v", 1))
    save(tmp_path / "v", 2)
    adapters = EngineAdapters(next_engine, weight_store, lambda: POLICY, max_rank=8)
    await adapters.resume()
    assert next_engine.added == [version]
    assert adapters.begin() is not None


async def test_an_adapter_that_the_engine_refuses_is_removed_and_the_previous_stays(
    engine: ScriptedLoraEngine, adapters: EngineAdapters, tmp_path: Path
) -> None:
    first = await adapters.load(save(tmp_path / "v1", 1))
    engine.refusal = "No DoRA."
    with pytest.raises(BadRequestError, match=r"cannot serve the adapter .*v2: No DoRA\."):
        await adapters.load(save(tmp_path / "v2", 2))
    current = adapters.begin()
    assert current is not None
    assert (current.adapter.version, set(engine.held), engine.removed) == (first, {1}, [2])


@pytest.mark.parametrize(
    ("changes", "message"),
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
    engine: ScriptedLoraEngine, adapters: EngineAdapters, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(BadRequestError, match=message):
        await adapters.load(save(tmp_path / "v", 1, **changes))  # type: ignore[arg-type]
    assert (engine.added, adapters.begin()) == ([], None)


async def test_missing_or_damaged_files_are_an_error_that_names_them(adapters: EngineAdapters, tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match=r"has no adapter_config\.json that can be read \(No such file"):
        await adapters.load(str(tmp_path / "nowhere"))
    path = Path(save(tmp_path / "v"))
    (path / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(BadRequestError, match="v cannot be read"):
        await adapters.load(str(path))


async def test_more_versions_than_an_engine_holds_are_refused_for_now(adapters: EngineAdapters, tmp_path: Path) -> None:
    for content in range(4):
        await adapters.load(save(tmp_path / "v", content))
        adapters.begin()
    with pytest.raises(OverloadedError, match="Requests still use 3 earlier versions"):
        await adapters.load(save(tmp_path / "v", 5))


async def test_an_engine_without_adapters_loads_none(engine: ScriptedLoraEngine, tmp_path: Path) -> None:
    adapters = EngineAdapters(engine, WeightStore(), lambda: POLICY, max_rank=None)
    with pytest.raises(BadRequestError, match="started without adapters"):
        await adapters.load(save(tmp_path / "v"))
