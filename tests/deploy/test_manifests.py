"""deploy/ and the Dockerfile: settings, flags and import paths exist, versions agree, the linter reports nothing."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from server.config import Settings, flag_of, load_settings, variable_of
from tests.support.paths import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PINS = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements" / "cpu.txt").read_text(), re.MULTILINE))
BUILD_TOOLS = ("build-essential", "gcc", "g++", "make", "cmake", "git", "-dev")
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
RAY_SERVICE = yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text())["spec"]


def stage(name: str) -> str:
    """The instructions of a stage of the Dockerfile; the last stage is called `final`."""
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    if name == "final":
        return stages[-1]
    (match,) = (instructions for instructions in stages if f" AS {name}\n" in instructions)
    return match


def test_the_linter_reports_nothing_for_the_dockerfile() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    result = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_files_that_the_dockerfile_copies_exist_and_are_sent_to_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied
    assert all((ROOT / source).exists() for source in copied)
    assert copied <= sent


def test_the_image_runs_as_an_unprivileged_user_and_has_a_health_check() -> None:
    final = stage("final")
    assert re.search(r"^USER [1-9]\d*$", final, re.MULTILINE)
    assert "\nHEALTHCHECK " in final
    assert "/ready" in final


def test_the_cpu_image_has_no_build_tools() -> None:
    installed = re.findall(r"--no-install-recommends (.*?) \\", stage("runtime-cpu") + stage("final"))
    assert installed
    assert [word for words in installed for word in words.split() if word.endswith(BUILD_TOOLS)] == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_device_has_its_stages(device: str) -> None:
    assert stage(f"packages-{device}")
    assert stage(f"runtime-{device}")


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_names_settings_that_exist(name: str) -> None:
    service = COMPOSE[name]
    assert set(service["environment"]) <= {variable_of(setting) for setting in Settings.model_fields}
    command, *words = service["command"]
    flags = {word for word in words if word.startswith("--")}
    assert command == "serve"
    assert flags <= {flag_of(setting) for setting in Settings.model_fields}
    assert set(service["build"]["args"]) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))


def serve_config() -> Any:
    return yaml.safe_load(RAY_SERVICE["serveConfigV2"])


def test_ray_serve_accepts_the_config_of_the_ray_service() -> None:
    (application,) = ServeDeploySchema.model_validate(serve_config()).applications
    module, _, builder = application.import_path.partition(":")
    built = getattr(import_module(module), builder)(application.args)
    assert type(built).__name__ == "Application"


def test_a_worker_of_the_ray_service_has_room_for_a_generator_and_a_scorer() -> None:
    settings = load_settings({**serve_config()["applications"][0]["args"], "ray": True})
    (group,) = RAY_SERVICE["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert settings.generator_cpus + settings.scorer_cpus <= float(container["resources"]["requests"]["cpu"])


def test_the_ray_service_runs_the_pinned_ray() -> None:
    assert RAY_SERVICE["rayClusterConfig"]["rayVersion"] == PINS["ray"]
