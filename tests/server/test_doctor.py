"""Each check of the doctor on an installation that is well, and on one with that one thing wrong."""

import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from reranker.models.device import computes_bfloat16
from server import doctor
from server.cli import app
from server.config import ConfigError, Settings
from server.doctor import Finding, Report
from server.generation import engine_arguments
from server.http import api_keys


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings in the environment, and an engine that is quick to import."""
    for name in [name for name in os.environ if name.startswith("NBEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "server.generation.vllm_engine", SimpleNamespace())
    monkeypatch.setattr(engine_arguments, "pick_dtype", {"cpu": "float32", "cuda": "auto"}.__getitem__)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory that stands for a model."""
    directory = tmp_path / "model"
    directory.mkdir()
    return str(directory)


def problems(findings: list[Finding]) -> list[Finding]:
    return [one for one in findings if one.level == "problem"]


def test_the_installed_packages_meet_what_is_declared() -> None:
    assert problems(list(doctor.check_packages())) == []


def test_a_package_that_differs_from_its_pin_is_named() -> None:
    installed = {"torch": "2.13.0", "ray": "2.0.0"}
    finding = doctor._against_pins(installed, "# a comment with ==\ntorch==2.13.0\nray==2.60.0\nTyPer==0.29.2\n")
    assert finding.found == "2 of 3 differ: ray 2.0.0 (pinned 2.60.0), TyPer missing (pinned 0.29.2)"
    assert (finding.level, finding.remedy) == ("note", "run `make setup`")
    assert doctor._against_pins({"torch": "2.13.0"}, "torch==2.13.0").found == "all 1 as pinned"


def test_the_dtype_is_told_with_its_reason() -> None:
    told = {one.subject: one.found for one in doctor.check_engine(Settings(device="cpu"))}
    assert told["dtype"] == "float32, the fastest here"
    assert told["device"].startswith("cpu: ")
    told = {one.subject: one.found for one in doctor.check_engine(Settings(device="cpu", dtype="bfloat16"))}
    assert told["dtype"] == "bfloat16, as asked"


def test_the_dtype_of_rewards_is_told_with_its_reason() -> None:
    told = {one.subject: one.found for one in doctor.check_engine(Settings(device="cpu", reward_dtype="float32"))}
    assert told["reward_dtype"] == "float32, as asked"
    told = {one.subject: one.found for one in doctor.check_engine(Settings(device="cpu"))}
    assert told["reward_dtype"] == f"{'bfloat16' if computes_bfloat16('cpu') else 'float32'}, the fastest here"


def test_cuda_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (finding,) = doctor.check_engine(Settings(device="cuda"))
    assert finding.level == "problem"
    assert "leave --device out" in finding.remedy


def test_an_engine_that_cannot_be_imported_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "server.generation.vllm_engine", None)
    (finding,) = doctor.check_engine(Settings())
    assert (finding.level, finding.remedy) == ("problem", "run `make clean setup`")


def test_a_cache_larger_than_the_memory_is_a_problem() -> None:
    (finding,) = problems(list(doctor.check_machine(Settings(kv_cache_gib=1e6))))
    assert finding.subject == "memory"
    assert "lower --kv-cache-gib" in finding.remedy


def test_models_are_found_as_directory_package_or_hub_id(model: str) -> None:
    settings = Settings(model=model, reward_models={"hub": "owner/some-reward-model"})
    assert [(one.subject, one.level) for one in doctor.check_models(settings)] == [
        ("model", "ok"),
        ("reward model hub", "note"),
    ]
    assert next(iter(doctor.check_models(Settings()))).found == "smollm2-135m-instruct, which comes with nbest"


@pytest.mark.parametrize("spec", ["./nowhere", "/nowhere/at/all", "smollm", "~/model", "model/nowhere", "a b/c"])
def test_a_model_that_is_nowhere_stops_serve_with_the_way_out(
    spec: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(model).parent)
    with pytest.raises(ConfigError) as caught:
        doctor.require_models(Settings(model=spec, reward_models={"r": model}))
    assert str(caught.value) == (
        f"The model {spec} is not there; give a directory, a hub id (OWNER/NAME) or one of: smollm2-135m-instruct."
    )


def test_an_adapter_that_cannot_be_read_stops_serve_with_the_way_out(model: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"')
    with pytest.raises(ConfigError) as caught:
        doctor.require_models(Settings(model=model, adapter=tmp_path, reward_models={"r": model}))
    assert str(caught.value).startswith(f"The adapter {tmp_path} cannot be read: ")
    assert str(caught.value).endswith("; save it again with PEFT.")


def test_a_port_in_use_is_a_problem() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        (finding,) = doctor.check_ports(Settings(port=port))
    assert finding.level == "problem"
    assert finding.found == f"Cannot listen on 127.0.0.1:{port}: Address already in use"
    assert finding.remedy.startswith("choose another")
    (finding,) = doctor.check_ports(Settings(port=port))
    assert finding.level == "ok"


@pytest.mark.parametrize(
    ("status", "level", "found"),
    [(200, "ok", "http://up/v1 answers"), (401, "note", "http://up/v1/models answers 401")],
)
def test_the_upstream_is_asked_with_the_key_and_the_key_is_not_told(
    status: int, level: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def get(url: str, *, headers: dict[str, str], timeout: float) -> httpx.Response:
        asked.append(f"{url} {headers['Authorization']}")
        return httpx.Response(status)

    monkeypatch.setattr(httpx, "get", get)
    monkeypatch.setenv("NBEST_API_KEY", "sk-secret")
    (finding,) = doctor.check_upstream(Settings(generator="openai", base_url="http://up/v1"))
    assert asked == ["http://up/v1/models Bearer sk-secret"]
    assert (finding.level, finding.found) == (level, found)
    assert "sk-secret" not in str(finding)


def test_an_upstream_that_is_down_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    (finding,) = doctor.check_upstream(Settings(generator="openai", base_url=f"http://127.0.0.1:{port}/v1"))
    assert finding.level == "note"
    assert finding.remedy.startswith("start it, or correct --base-url")


def test_each_form_of_scorer_is_told(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(httpx, "get", lambda url, **options: httpx.Response(200 if "up" in url else 404))
    settings = Settings(
        model=model,
        judge_base_url="http://up/v1",
        reward_models={
            "remote": "vllm:http://up/score",
            "away": "vllm:http://away/score",
            "large": "judge:large",
            "own": "pairwise:judge:self",
            "check": "python:json:dumps",
            "lost": "python:nowhere.py:check",
            "likely": "logprob",
            "both": "ensemble:min:likely,own",
        },
    )
    told = {one.subject: one for one in doctor.check_models(settings)}
    assert {name.removeprefix("reward model "): one.found for name, one in told.items() if one.level == "ok"} == {
        "model": f"the directory {model}",
        "remote": "http://up/v1 answers",
        "large": "http://up/v1 answers",
        "own": "judged by the served policy itself",
        "check": "the function dumps of json",
        "likely": "logprob of the policy, no model of its own",
        "both": "min of likely, own",
    }
    assert {one.found for one in problems(list(told.values()))} == {
        "http://away/v1/models answers 404",
        "nowhere.py is not there",
    }
    with pytest.raises(ConfigError, match=r"The reward model lost nowhere.py is not there; give a file"):
        doctor.require_models(settings)


def test_a_variable_that_sets_nothing_is_told() -> None:
    (finding,) = doctor.check_environment({"NBEST_PROT": "1"})
    assert (finding.subject, finding.remedy) == ("NBEST_PROT", "did you mean NBEST_PORT?")


def test_only_a_problem_stops_serve_and_the_table_shows_every_word() -> None:
    report = Report((Finding("a", "[found]"), Finding("b", "odd", "note", "mend it")))
    assert report.can_serve
    assert not Report((*report.findings, Finding("c", "broken", "problem", "mend it"))).can_serve
    console = Console(record=True, width=100)
    doctor.show(report, console)
    text = console.export_text()
    assert "[found]" in text
    assert "`nbest serve` would come up." in text


@pytest.mark.parametrize(("spec", "code"), [("", 0), ("./nowhere", 1)])
def test_the_exit_code_and_the_json_agree(spec: str, code: int, model: str) -> None:
    arguments = ["--device", "cpu", "--port", "0", "--model", spec or model, "--reward-model", f"r={model}"]
    result = CliRunner().invoke(app, ["doctor", "--json", *arguments])
    report = json.loads(result.stdout)
    assert result.exit_code == code, report
    assert report["can_serve"] is (code == 0)
    assert {"subject", "found", "level", "remedy"} == set(report["findings"][0])


def test_the_port_of_metrics_is_looked_at_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        findings = list(doctor.check_ports(Settings(port=0, metrics_port=port)))
    assert [(one.subject, one.level) for one in findings] == [("port", "ok"), ("metrics port", "problem")]


def test_keys_are_counted_and_a_file_that_is_none_of_keys_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    (missing,) = doctor.check_keys(Settings(keys_file=file))
    assert (missing.level, missing.remedy) == ("problem", "make it with `nbest keys new NAME`")
    api_keys.new_key(file, "alice")
    (found,) = doctor.check_keys(Settings(keys_file=file))
    assert (found.level, found.found) == ("ok", f"1 in {file}")
    file.write_text("keys = [")
    (broken,) = doctor.check_keys(Settings(keys_file=file))
    assert (broken.level, broken.remedy) == ("problem", "correct it")
