"""Carries out the Dockerfile's instructions one by one where there is no container engine, and asks for the health.

    sudo python -m scripts.try_dockerfile [DEVICE]

What is built on an image is an overlay over this machine's root directory, entered by chroot with an empty
environment: what it writes stays in a temporary directory that is removed in the end. All mounts are made in a mount
namespace of their own and end with it. Then the last stage's command runs as its user, in a network and a process tree
of its own, until the health check passes. Needs root on Linux, the image's version of Python, and some 8 GB.

It shows that every instruction works and that the result serves. It cannot show what the base image lacks and this
machine has, since that stands in for it.
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
PASSED_ON = re.compile(r"(?i)(pip_|ssl_cert|https?_proxy|no_proxy)")
"""How this machine reaches package indexes; docker passes the proxies on by itself."""


@dataclass
class BuildStage:
    """The result of a stage so far: where its files are, and what its next command runs with."""

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
        """`words` as a command of this machine that runs inside the stage."""
        passed_on = {name: value for name, value in os.environ.items() if PASSED_ON.match(name)}
        assigned = [f"{name}={value}" for name, value in (passed_on | self.environment).items()]
        enter = ["chroot", f"--userspec={self.user}:{self.user}", str(self.files)]
        return [*enter, "env", "-i", *assigned, "sh", "-c", 'cd "$0" && exec "$@"', self.workdir, *words]


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Keyword and argument of each instruction, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for instruction in "\n".join(lines).replace("\\\n", " ").splitlines():
        keyword, _, argument = instruction.partition(" ")
        yield keyword, argument.strip()


def stages(text: str, arguments: dict[str, str]) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Name -> what it is built from, and its instructions; the last stage's name is `final` where it has none."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    name = ""
    for keyword, argument in instructions(text):
        if keyword == "ARG" and not found:
            key, _, default = argument.partition("=")
            arguments.setdefault(key, default)
        elif keyword == "FROM":
            source, _, name = argument.partition(" AS ")
            name = name or "final"
            found[name] = (re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], source), [])
        else:
            found[name][1].append((keyword, argument))
    return found


class Builder:
    """Builds stages on demand."""

    def __init__(self, text: str, arguments: dict[str, str], scratch: Path) -> None:
        self._stages = stages(text, arguments)
        self._scratch = scratch
        self._built: dict[str, BuildStage] = {}

    def build(self, name: str) -> BuildStage:
        """Builds the stage after those it needs."""
        if name in self._built:
            return self._built[name]
        source, steps = self._stages[name]
        others = [match[1] for _, argument in steps if (match := re.match(r"--from=(\S+)", argument))]
        for other in others:
            self.build(other)
        if source in self._stages:  # goes on in the same files: no stage here has two that go on from it
            stage = replace(before := self.build(source), environment=dict(before.environment))
        else:
            stage = BuildStage(self._scratch / name)
            mount(stage)
            python_image(stage.files)
        for keyword, argument in steps:
            print(f"[{name}] {keyword} {argument}", flush=True)
            self._carry_out(stage, keyword, argument)
        self._built[name] = stage
        return stage

    def _carry_out(self, stage: BuildStage, keyword: str, argument: str) -> None:
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
                raise SystemExit(f"{keyword} is not known here; teach it to scripts/try_dockerfile.py")

    def _copy(self, stage: BuildStage, words: list[str]) -> None:
        origin = ROOT
        if words[0].startswith("--from="):
            origin = self._built[words.pop(0).removeprefix("--from=")].files
        *sources, target = words
        place = stage.files / os.path.join(stage.workdir, target).lstrip("/")  # noqa: PTH118  # may be absolute
        for source in sources:
            there = origin / source.lstrip("/")
            into = place / there.name if target.endswith("/") else place
            into.parent.mkdir(parents=True, exist_ok=True)
            if there.is_dir():
                shutil.copytree(there, into, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy2(there, into)


def home_of(user: str, files: Path) -> str:
    """The home directory of a user by number, as the stage's list of users has it."""
    users = [line.split(":") for line in (files / "etc/passwd").read_text().splitlines()]
    return next(fields[5] for fields in users if fields[2] == user)


def python_image(files: Path) -> None:
    """What `python:3.11-slim` has beyond a bare system: a Python in /usr/local, without any packages."""
    own = Path(sys.base_prefix)
    if own != Path("/usr/local"):
        no_packages = shutil.ignore_patterns("site-packages", "__pycache__", "test")
        shutil.copytree(own, files / "usr/local", symlinks=True, ignore=no_packages, dirs_exist_ok=True)
        subprocess.run(["chroot", str(files), "ldconfig"], check=True)  # where its library is now


def mount(stage: BuildStage) -> None:
    """Mounts the overlay, with the devices and processes a command expects."""
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
    """Starts the command and asks for its health, with processes and a network of their own, where the port is free."""
    program = f"""
        mount -t proc proc {stage.files}/proc && ip link set lo up
        {shlex.join(stage.command(stage.start))} &
        for attempt in $(seq {START_TIMEOUT_S // HEALTH_INTERVAL_S}); do
            sleep {HEALTH_INTERVAL_S}
            {shlex.join(stage.command(stage.health))} 2>/dev/null && exit 0
        done
        exit 1"""
    apart = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
    return subprocess.run([*apart, "sh", "-c", program]).returncode == 0


def carry_out(scratch: Path, device: str) -> None:
    final = Builder((ROOT / "Dockerfile").read_text(), {"DEVICE": device}, scratch).build("final")
    if not becomes_healthy(final):
        raise SystemExit("The server of the image did not become healthy.")
    print("Every instruction works, and the server became healthy.")


def main() -> None:
    match sys.argv[1:]:
        case [scratch, device]:  # this very program, in the namespace
            carry_out(Path(scratch), device)
        case [*given]:
            with tempfile.TemporaryDirectory() as scratch:
                inside = ["unshare", "--mount", sys.executable, "-m", "scripts.try_dockerfile"]
                sys.exit(subprocess.run([*inside, scratch, *(given or ["cpu"])]).returncode)


if __name__ == "__main__":
    main()
