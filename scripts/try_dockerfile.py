"""Builds the Dockerfile without a container engine and checks that the resulting server becomes healthy.

    sudo python -m scripts.try_dockerfile [DEVICE]

Each stage is an overlay over this machine's root directory, entered by chroot with an empty environment; its writes go
to a temporary directory that is removed at the end. All mounts are in a separate mount namespace and end with it. The
last stage's command then runs as its user, in separate network and process namespaces, until the health check passes.
It needs root on Linux, the image's version of Python, and about 8 GB of disk.

It verifies that every instruction works and that the result serves. It cannot detect files that this machine has and
the base image lacks, because this machine stands in for the base image.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 300
HEALTH_INTERVAL_S = 5
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INHERITED = re.compile(r"(?i)(pip_|ssl_cert|https?_proxy|no_proxy)")
"""Environment variables for access to package indexes. Docker sets the proxies too."""


@dataclass
class BuildStage:
    """The state of a stage: its files, and the environment, directory and user of its next command."""

    directory: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH, "HOME": "/root"})
    workdir: str = "/"
    user: str = "0"
    start: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    @property
    def files(self) -> Path:
        return self.directory / "merged"

    def command(self, words: list[str]) -> list[str]:
        """The command of this machine that runs `words` inside the stage."""
        inherited = {name: value for name, value in os.environ.items() if INHERITED.match(name)}
        assigned = [f"{name}={value}" for name, value in (inherited | self.environment).items()]
        enter = ["chroot", f"--userspec={self.user}:{self.user}", str(self.files)]
        return [*enter, "env", "-i", *assigned, "sh", "-c", 'cd "$0" && exec "$@"', self.workdir, *words]


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(keyword, argument) of each instruction, with continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for instruction in "\n".join(lines).replace("\\\n", " ").splitlines():
        keyword, _, argument = instruction.partition(" ")
        yield keyword, argument.strip()


def stages(text: str, arguments: dict[str, str]) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage name -> (base image or stage, instructions). A stage without a name is called `final`."""
    by_name: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    name = ""
    for keyword, argument in instructions(text):
        if keyword == "ARG" and not by_name:
            key, _, default = argument.partition("=")
            arguments.setdefault(key, default)
        elif keyword == "FROM":
            source, _, name = argument.partition(" AS ")
            name = name or "final"
            by_name[name] = (re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], source), [])
        else:
            by_name[name][1].append((keyword, argument))
    return by_name


class Builder:
    """Builds stages on demand."""

    def __init__(self, text: str, arguments: dict[str, str], scratch: Path) -> None:
        self._stages = stages(text, arguments)
        self._scratch = scratch
        self._built: dict[str, BuildStage] = {}

    def build(self, name: str) -> BuildStage:
        """Builds a stage, after the stages that it needs."""
        if name in self._built:
            return self._built[name]
        source, steps = self._stages[name]
        others = [match[1] for _, argument in steps if (match := re.match(r"--from=(\S+)", argument))]
        for other in others:
            self.build(other)
        if source in self._stages:  # shares the files: no stage of this Dockerfile is the base of two others
            stage = replace(before := self.build(source), environment=dict(before.environment))
        else:
            stage = BuildStage(self._scratch / name)
            mount(stage)
            python_image(stage.files)
        for keyword, argument in steps:
            print(f"[{name}] {keyword} {argument}", flush=True)
            self._execute(stage, keyword, argument)
        self._built[name] = stage
        return stage

    def _execute(self, stage: BuildStage, keyword: str, argument: str) -> None:
        match keyword:
            case "RUN":
                subprocess.run(stage.command(["sh", "-c", argument]), check=True, stdin=subprocess.DEVNULL)
            case "ENV":
                for key, value in re.findall(r"(\w+)=(\S+)", argument):
                    stage.environment[key] = value.replace("$PATH", stage.environment["PATH"])
            case "WORKDIR":
                stage.workdir = argument
                (stage.files / argument.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(stage, argument.split())
            case "USER":
                stage.user = argument
                stage.environment["HOME"] = home_of(argument, stage.files)
            case "ENTRYPOINT" | "CMD":
                stage.start += json.loads(argument)
            case "HEALTHCHECK":
                stage.health = json.loads(argument.partition(" CMD ")[2])
            case "EXPOSE" | "ARG":
                pass
            case _:
                raise SystemExit(f"scripts/try_dockerfile.py does not support the instruction {keyword}")

    def _copy(self, stage: BuildStage, words: list[str]) -> None:
        origin = ROOT
        if words[0].startswith("--from="):
            origin = self._built[words.pop(0).removeprefix("--from=")].files
        *sources, target = words
        destination = stage.files / os.path.join(stage.workdir, target).lstrip("/")  # noqa: PTH118  # may be absolute
        for source in sources:
            path = origin / source.lstrip("/")
            copy = destination / path.name if target.endswith("/") else destination
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, copy, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy2(path, copy)


def home_of(user: str, files: Path) -> str:
    """The home directory of a user id, from the stage's /etc/passwd."""
    users = [line.split(":") for line in (files / "etc/passwd").read_text().splitlines()]
    return next(fields[5] for fields in users if fields[2] == user)


def python_image(files: Path) -> None:
    """Adds what `python:3.11-slim` has beyond the base system: a Python in /usr/local, without packages."""
    prefix = Path(sys.base_prefix)
    if prefix != Path("/usr/local"):
        no_packages = shutil.ignore_patterns("site-packages", "__pycache__", "test")
        shutil.copytree(prefix, files / "usr/local", symlinks=True, ignore=no_packages, dirs_exist_ok=True)
        subprocess.run(["chroot", str(files), "ldconfig"], check=True)  # registers the copied libpython


def mount(stage: BuildStage) -> None:
    """Mounts the overlay, and the devices and processes that commands expect."""
    upper, work = stage.directory / "upper", stage.directory / "work"
    for folder in (upper, work, stage.files):
        folder.mkdir(parents=True)
    for options, inside in (
        (["-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={upper},workdir={work}"], ""),
        (["-t", "proc", "proc"], "proc"),
        (["--rbind", "/sys"], "sys"),
        (["--rbind", "/dev"], "dev"),
    ):
        subprocess.run(["mount", *options, str(stage.files / inside)], check=True)


def becomes_healthy(stage: BuildStage) -> bool:
    """Starts the command and polls its health check, in separate process and network namespaces (with a free port)."""
    program = f"""
        mount -t proc proc {stage.files}/proc && ip link set lo up
        {shlex.join(stage.command(stage.start))} &
        for attempt in $(seq {START_TIMEOUT_S // HEALTH_INTERVAL_S}); do
            sleep {HEALTH_INTERVAL_S}
            {shlex.join(stage.command(stage.health))} 2>/dev/null && exit 0
        done
        exit 1"""
    isolated = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
    return subprocess.run([*isolated, "sh", "-c", program]).returncode == 0


def build_and_check(scratch: Path, device: str) -> None:
    final = Builder((ROOT / "Dockerfile").read_text(), {"DEVICE": device}, scratch).build("final")
    if not becomes_healthy(final):
        raise SystemExit("The server of the image did not become healthy.")
    print("Every instruction works, and the server became healthy.")


def main() -> None:
    match sys.argv[1:]:
        case [scratch, device]:  # called by the case below, inside the mount namespace
            build_and_check(Path(scratch), device)
        case [*arguments]:
            with tempfile.TemporaryDirectory() as scratch:
                isolated = ["unshare", "--mount", sys.executable, "-m", "scripts.try_dockerfile"]
                sys.exit(subprocess.run([*isolated, scratch, *(arguments or ["cpu"])]).returncode)


if __name__ == "__main__":
    main()
