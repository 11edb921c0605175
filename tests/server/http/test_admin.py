"""POST /admin/adapter: which keys may load an adapter, and from which paths."""

from pathlib import Path

import httpx
import pytest

from server.config import ConfigError, load_settings
from server.errors import BadRequestError
from server.http import api_keys
from tests.support.doubles import ScriptedGenerator
from tests.support.serving import app_over, client_of, pipeline

ADAPTER = "/admin/adapter"


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


async def post(
    generator: ScriptedGenerator, keys_file: Path, path: str, *, admin: bool = True, root: Path | None = None
) -> httpx.Response:
    key = api_keys.new_key(keys_file, "key", admin=admin)
    app = app_over(pipeline(generator), keys_file=keys_file, adapter_root=root or keys_file.parent)
    async with client_of(app, key) as client:
        return await client.post(ADAPTER, json={"path": path}, headers={"Authorization": f"Bearer {key}"})


async def test_an_admin_loads_an_adapter_below_the_root(keys_file: Path) -> None:
    generator = ScriptedGenerator(["word"])
    reply = await post(generator, keys_file, "run/v2")
    loaded = str(keys_file.parent / "run" / "v2")
    assert (reply.status_code, reply.json()) == (200, {"path": loaded, "version": "version-1"})
    assert generator.adapters == [loaded]


async def test_a_key_without_admin_rights_is_403(keys_file: Path) -> None:
    generator = ScriptedGenerator(["word"])
    reply = await post(generator, keys_file, "v2", admin=False)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "forbidden")
    assert "--admin" in reply.json()["error"]["message"]
    assert generator.adapters == []


@pytest.mark.parametrize("path", ["/etc", "..", "../elsewhere", "link", "a\0b", "inside/../../x"])
async def test_a_path_that_leads_out_of_the_root_is_400(keys_file: Path, path: str) -> None:
    root = keys_file.parent / "root"
    root.mkdir()
    (root / "link").symlink_to("/")
    generator = ScriptedGenerator(["word"])
    reply = await post(generator, keys_file, path, root=root)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "path")
    assert generator.adapters == []


async def test_an_error_of_the_engine_is_the_reply(keys_file: Path) -> None:
    generator = ScriptedGenerator(["word"], refusal=BadRequestError("It has rank 99."))
    reply = await post(generator, keys_file, "v2")
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "It has rank 99.")


@pytest.mark.parametrize("port", [None, 9])
async def test_it_is_not_served_without_keys_or_on_the_metrics_port(port: int | None) -> None:
    app = app_over(pipeline(ScriptedGenerator(["word"])), metrics_port=port)
    async with client_of(app) as client:
        base_url = f"http://nbest:{port}" if port else "http://nbest"
        port_client = httpx.AsyncClient(transport=client._transport, base_url=base_url)
        assert (await port_client.post(ADAPTER, json={"path": "v2"})).status_code == 404


def test_an_adapter_root_without_a_keys_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nbest keys new NAME --admin"):
        load_settings({"adapter_root": tmp_path})


def test_adapters_are_refused_with_an_upstream_generator(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapters need the embedded engine"):
        load_settings({"adapter": tmp_path, "generator": "openai", "base_url": "http://x"})
