"""Each check of `nbest doctor`, on a correct installation and on one with a problem."""

import json
import os
import socket
import sys
from collections.abc import Iterable
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
def _isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes settings from the environment, and replaces the engine by a module that imports at once."""
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
    return [finding for finding in findings if finding.level == "problem"]


def results(findings: Iterable[Finding]) -> dict[str, str]:
    return {finding.subject: finding.result for finding in findings}


def test_the_installed_packages_meet_the_declared_requirements() -> None:
    assert problems(list(doctor.check_packages())) == []


def test_a_package_that_differs_from_its_pin_is_named() -> None:
    installed = {"torch": "2.13.0", "ray": "2.0.0"}
    finding = doctor._compare_with_pins(installed, "# a comment with ==\ntorch==2.13.0\nray==2.60.0\nTyPer==0.29.2\n")
    assert finding.result == "2 of 3 differ: ray 2.0.0 (pinned 2.60.0), TyPer missing (pinned 0.29.2)"
    assert (finding.level, finding.remedy) == ("note", "run `make setup`")
    assert doctor._compare_with_pins({"torch": "2.13.0"}, "torch==2.13.0").result == "all 1 as pinned"


def test_the_dtype_is_reported_with_its_reason() -> None:
    automatic = results(doctor.check_engine(Settings(device="cpu")))
    assert automatic["dtype"] == "float32, the fastest here"
    assert automatic["device"].startswith("cpu: ")
    assert results(doctor.check_engine(Settings(device="cpu", dtype="bfloat16")))["dtype"] == "bfloat16, as set"


def test_the_dtype_of_rewards_is_reported_with_its_reason() -> None:
    explicit = results(doctor.check_engine(Settings(device="cpu", reward_dtype="float32")))
    assert explicit["reward_dtype"] == "float32, as set"
    automatic = results(doctor.check_engine(Settings(device="cpu")))
    assert automatic["reward_dtype"] == f"{'bfloat16' if computes_bfloat16('cpu') else 'float32'}, the fastest here"


def test_missing_cuda_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (finding,) = doctor.check_engine(Settings(device="cuda"))
    assert finding.level == "problem"
    assert "leave --device out" in finding.remedy


def test_an_engine_that_cannot_be_imported_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "server.generation.vllm_engine", None)
    (finding,) = doctor.check_engine(Settings())
    assert (finding.level, finding.remedy) == ("problem", "run `make clean setup`")


def test_a_key_value_cache_larger_than_the_memory_is_a_problem() -> None:
    (finding,) = problems(list(doctor.check_machine(Settings(kv_cache_gib=1e6))))
    assert finding.subject == "memory"
    assert "lower --kv-cache-gib" in finding.remedy


def test_a_model_may_be_a_directory_an_embedded_model_or_a_hub_id(model: str) -> None:
    settings = Settings(model=model, reward_models={"hub": "owner/some-reward-model"})
    assert [(finding.subject, finding.level) for finding in doctor.check_models(settings)] == [
        ("model", "ok"),
        ("reward model hub", "note"),
    ]
    assert next(iter(doctor.check_models(Settings()))).result == "smollm2-135m-instruct, which comes with nbest"


@pytest.mark.parametrize("spec", ["./nowhere", "/nowhere/at/all", "smollm", "~/model", "model/nowhere", "a b/c"])
def test_a_missing_model_stops_serve_with_the_remedy(spec: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(model).parent)
    with pytest.raises(ConfigError) as caught:
        doctor.require_models(Settings(model=spec, reward_models={"r": model}))
    assert str(caught.value) == (
        f"The model {spec} does not exist; give a directory, a hub id (OWNER/NAME) or one of: smollm2-135m-instruct."
    )


def test_an_unreadable_adapter_stops_serve_with_the_remedy(model: str, tmp_path: Path) -> None:
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
    assert finding.result == f"Cannot listen on 127.0.0.1:{port}: Address already in use"
    assert finding.remedy.startswith("choose another")
    (finding,) = doctor.check_ports(Settings(port=port))
    assert finding.level == "ok"


@pytest.mark.parametrize(
    ("status", "level", "result"),
    [(200, "ok", "http://up/v1 answers"), (401, "note", "http://up/v1/models answers 401")],
)
def test_the_upstream_gets_the_key_and_the_report_does_not_contain_it(
    status: int, level: str, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[str] = []

    def get(url: str, *, headers: dict[str, str], timeout: float) -> httpx.Response:
        requests.append(f"{url} {headers['Authorization']}")
        return httpx.Response(status)

    monkeypatch.setattr(httpx, "get", get)
    monkeypatch.setenv("NBEST_API_KEY", "sk-secret")
    (finding,) = doctor.check_upstream(Settings(generator="openai", base_url="http://up/v1"))
    assert requests == ["http://up/v1/models Bearer sk-secret"]
    assert (finding.level, finding.result) == (level, result)
    assert "sk-secret" not in str(finding)


def test_an_upstream_that_is_down_is_a_note_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    (finding,) = doctor.check_upstream(Settings(generator="openai", base_url=f"http://127.0.0.1:{port}/v1"))
    assert finding.level == "note"
    assert finding.remedy.startswith("start it, or correct --base-url")


def test_each_form_of_scorer_is_checked(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
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
    findings = list(doctor.check_models(settings))
    healthy = results(finding for finding in findings if finding.level == "ok")
    assert {subject.removeprefix("reward model "): result for subject, result in healthy.items()} == {
        "model": f"the directory {model}",
        "remote": "http://up/v1 answers",
        "large": "http://up/v1 answers",
        "own": "judged by the served policy itself",
        "check": "the function dumps of json",
        "likely": "logprob of the policy, without a reward model",
        "both": "min of likely, own",
    }
    assert {finding.result for finding in problems(findings)} == {
        "http://away/v1/models answers 404",
        "nowhere.py does not exist",
    }
    with pytest.raises(ConfigError, match=r"The reward model lost nowhere.py does not exist; give a file"):
        doctor.require_models(settings)


def test_a_variable_that_sets_nothing_is_reported_with_the_similar_one() -> None:
    (finding,) = doctor.check_environment({"NBEST_PROT": "1"})
    assert (finding.subject, finding.remedy) == ("NBEST_PROT", "did you mean NBEST_PORT?")


def test_only_a_problem_stops_serve_and_the_table_shows_text_in_brackets() -> None:
    report = Report((Finding("a", "[result]"), Finding("b", "odd", "note", "repair it")))
    assert report.can_serve
    assert not Report((*report.findings, Finding("c", "broken", "problem", "repair it"))).can_serve
    console = Console(record=True, width=100)
    doctor.show(report, console)
    text = console.export_text()
    assert "[result]" in text
    assert "`nbest serve` would start." in text


@pytest.mark.parametrize(("spec", "code"), [("", 0), ("./nowhere", 1)])
def test_the_exit_code_and_the_json_agree(spec: str, code: int, model: str) -> None:
    arguments = ["--device", "cpu", "--port", "0", "--model", spec or model, "--reward-model", f"r={model}"]
    result = CliRunner().invoke(app, ["doctor", "--json", *arguments])
    report = json.loads(result.stdout)
    assert result.exit_code == code, report
    assert report["can_serve"] is (code == 0)
    assert {"subject", "found", "level", "remedy"} == set(report["findings"][0])


def test_the_metrics_port_is_checked_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        findings = list(doctor.check_ports(Settings(port=0, metrics_port=port)))
    assert [(finding.subject, finding.level) for finding in findings] == [("port", "ok"), ("metrics port", "problem")]


def test_keys_are_counted_and_a_missing_or_invalid_keys_file_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    (missing,) = doctor.check_keys(Settings(keys_file=file))
    assert (missing.level, missing.remedy) == ("problem", "make it with `nbest keys new NAME`")
    api_keys.new_key(file, "alice")
    (valid,) = doctor.check_keys(Settings(keys_file=file))
    assert (valid.level, valid.result) == ("ok", f"1 in {file}")
    file.write_text("keys = [")
    (broken,) = doctor.check_keys(Settings(keys_file=file))
    assert (broken.level, broken.remedy) == ("problem", "correct it")
