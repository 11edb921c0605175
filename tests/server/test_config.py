"""The sources of settings and their precedence, the errors for invalid settings, and that every setting is used."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import ConfigError, Settings, flag_of, load_settings, replica_range, unknown_variables
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NBEST_")]:
        monkeypatch.delenv(name)


def toml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "nbest.toml"
    file.write_text(text)
    return file


def test_defaults_serve_the_embedded_models_on_localhost() -> None:
    settings = load_settings({})
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.model == "smollm2-135m-instruct"
    assert settings.reward_models == {"movie-sentiment": "movie-sentiment"}


def test_the_file_overrides_defaults_the_environment_the_file_and_flags_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = toml(tmp_path, "port = 1001\nmax_best_of = 11\nblock_size = 64\n")
    monkeypatch.setenv("NBEST_PORT", "1002")
    monkeypatch.setenv("NBEST_MAX_BEST_OF", "12")
    settings = load_settings({"port": 1003}, file)
    assert (settings.block_size, settings.max_best_of, settings.port) == (64, 12, 1003)


def test_the_environment_may_name_the_file_and_the_flag_overrides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBEST_CONFIG", str(toml(tmp_path, "port = 1001")))
    assert load_settings({}).port == 1001
    other = tmp_path / "other.toml"
    other.write_text("port = 1002")
    assert load_settings({}, other).port == 1002


def test_reward_models_keep_their_order_from_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = toml(tmp_path, '[reward_models]\nz = "dir/z"\na = "a=b"\n')
    assert list(load_settings({}, file).reward_models.items()) == [("z", "dir/z"), ("a", "a=b")]
    monkeypatch.setenv("NBEST_REWARD_MODELS", "y=1 b=2")
    assert list(load_settings({}, file).reward_models.items()) == [("y", "1"), ("b", "2")]
    assert load_settings({"reward_models": ["x=3"]}, file).reward_models == {"x": "3"}


def test_an_empty_variable_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBEST_BASE_URL", "")
    assert load_settings({}).base_url is None


@pytest.mark.parametrize(
    ("flags", "variables", "text", "message"),
    [
        ({"port": 70000}, {}, "", "--port is 70000, but: input should be less than or equal to 65535; change it or"),
        ({}, {"NBEST_PORT": "http"}, "", "NBEST_PORT is 'http', but: input should be a valid integer"),
        ({}, {}, "port = 'x'", "port in {file} is 'x', but: input should be a valid integer"),
        ({}, {}, "prot = 1", "prot in {file} is not a setting; did you mean port?"),
        ({}, {}, "port = ", "The settings file {file} cannot be read as TOML: Invalid value"),
        ({"device": "tpu"}, {}, "", "--device is 'tpu', but: input should be 'auto', 'cpu' or 'cuda'"),
        ({"reward_models": ["movie"]}, {}, "", "--reward-model is ['movie'], but: 'movie' should read NAME=SPEC"),
        ({"reward_models": ["a=1", "a=2"]}, {}, "", "the name 'a' is given twice"),
        ({"max_best_of": 2}, {}, "", "default_best_of (4) is above max_best_of (2); lower the first or raise"),
        ({"generator": "openai"}, {}, "", "generator openai needs the server's address; give --base-url"),
        ({"base_url": "http://x/v1"}, {}, "", "base_url is only used with --generator openai"),
        ({"kv_cache_gib": float("nan")}, {}, "", "--kv-cache-gib is nan, but: input should be"),
    ],
)
def test_the_error_for_an_invalid_value_names_the_setting_the_source_and_the_remedy(
    flags: dict[str, object],
    variables: dict[str, str],
    text: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = toml(tmp_path, text)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_settings(flags, file)
    assert message.format(file=file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_invalid_value_has_its_own_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"port": -1, "block_size": 0})
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == ["--port", "--block-size"]


def test_the_error_for_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml does not exist; correct --config or NBEST_CONFIG"):
        load_settings({}, tmp_path / "nowhere.toml")


def test_a_secret_is_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NBEST_API_KEY", "sk-secret")
    settings = load_settings({})
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "sk-secret"
    assert "sk-secret" not in f"{settings} {settings!r} {settings.model_dump_json()}"

    monkeypatch.delenv("NBEST_API_KEY")
    with pytest.raises(ConfigError) as caught:
        load_settings({}, toml(tmp_path, "api_key = 271828"))
    assert "api_key" in str(caught.value)
    assert "271828" not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_a_flag_that_is_repeated_for_each_item_is_in_the_singular() -> None:
    assert [flag_of(name) for name in ("reward_models", "max_num_seqs", "port")] == [
        "--reward-model",
        "--max-num-seqs",
        "--port",
    ]


def test_variables_that_set_nothing_are_reported_with_the_most_similar_known_one() -> None:
    environment = {"NBEST_MAX_BESTOF": "9", "NBEST_PORT": "1", "NBEST_CONFIG": "x", "HOME": "/root"}
    assert unknown_variables(environment) == {"NBEST_MAX_BESTOF": "NBEST_MAX_BEST_OF"}


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["a=judge:large"], "the judge a needs its server's address; give --judge-base-url https://HOST/v1"),
        (["a=ensemble:min:b,c"], "no scorer 'b' is served"),
        (["a=vllm:gpu"], "a=vllm:gpu needs an address"),
    ],
)
def test_invalid_scorers_are_refused(specs: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"reward_models": specs})
    assert message in str(caught.value)


def test_a_judge_needs_an_address_unless_the_served_policy_judges() -> None:
    flags = {"reward_models": ["a=judge:large"], "judge_base_url": "https://judge/v1"}
    assert load_settings(flags).reward_models == {"a": "judge:large"}
    assert load_settings({"reward_models": ["a=pairwise:judge:self"]}).judge_base_url is None


@pytest.mark.parametrize(("replicas", "bounds"), [("2", (2, 2)), (3, (3, 3)), ("1-4", (1, 4))])
def test_replicas_are_a_number_or_a_range(replicas: str | int, bounds: tuple[int, int]) -> None:
    assert replica_range(load_settings({"scorer_replicas": replicas}).scorer_replicas) == bounds


@pytest.mark.parametrize("replicas", ["0", "4-1", "many", "1-", "-2", ""])
def test_other_values_for_replicas_are_refused(replicas: str) -> None:
    with pytest.raises(ConfigError, match=r"--router-replicas .* should read N or MIN-MAX .*, such as 2 or 1-4"):
        load_settings({"router_replicas": replicas})


def test_a_ray_address_without_ray_is_refused() -> None:
    with pytest.raises(ConfigError, match="add --ray or leave ray_address out"):
        load_settings({"ray_address": "auto"})


def test_a_metrics_port_is_refused_on_ray() -> None:
    with pytest.raises(ConfigError, match="/metrics is on the main port there"):
        load_settings({"ray": True, "metrics_port": 9000})


def settings_read_in(source: str) -> Iterator[str]:
    """The attributes that a module reads from a variable or attribute named `settings` or `_settings`.

    A module that does not import `Settings` from server.config reads none: its settings are something else.
    """
    tree = ast.parse(source)
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "server.config")
    if not any(alias.name == "Settings" for node in imports for alias in node.names):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name.removeprefix("_") == "settings":
                yield node.attr


@pytest.fixture(scope="module")
def settings_read_by_the_server() -> set[str]:
    """config.py checks settings and doctor.py reports them; reading a setting there has no effect on the server."""
    modules = set((ROOT / "server").rglob("*.py")) - {ROOT / "server" / "config.py", ROOT / "server" / "doctor.py"}
    return {name for module in modules for name in settings_read_in(module.read_text())}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_read_by_the_server(name: str, settings_read_by_the_server: set[str]) -> None:
    assert name in settings_read_by_the_server, f"nothing reads settings.{name}, so the setting has no effect"


@pytest.mark.parametrize(
    ("statement", "read"),
    [
        ("print(settings.port)", ["port"]),
        ("print(self._settings.port + server.settings.host)", ["port", "host"]),
        ("# settings.port", []),
        ("print('settings.port')", []),
        ("settings.port = 1", []),
        ("print(address.port, port)", []),
    ],
)
def test_only_a_read_of_the_attribute_counts_as_reading_a_setting(statement: str, read: list[str]) -> None:
    assert sorted(settings_read_in(f"from server.config import Settings\n{statement}")) == sorted(read)
    assert list(settings_read_in(statement)) == []
