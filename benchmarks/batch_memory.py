"""Peak memory of `nbest batch` over inputs of ten thousand, a hundred thousand and a million lines.

Each run is a separate process that runs the command's code over a generated input. A scripted generator and a scripted
scorer answer at once, so reading and writing lines set the pace. Measured is the process's peak resident memory. Every
second line has a `custom_id`, because the command keeps those in memory.

    python -m benchmarks.batch_memory [--lines 10000 100000 1000000]

Writes benchmarks/results/batch_memory.json; the last line of output is the same JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.provenance import provenance
from benchmarks.stats import write_result
from reranker.candidate import Prompt
from server.generation.base import SamplingParams
from server.offline import batch
from server.offline.batch import BatchOptions
from tests.support.doubles import ScriptedGeneration, ScriptedGenerator
from tests.support.offline_runs import SETTINGS, scripted

TEXT = "It is a warm, unhurried film that trusts its actors, and they repay it in every scene they share."
MIB = 1 << 20


class StatelessGenerator(ScriptedGenerator):
    """Does not record its requests, since they would count as memory of the run."""

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        return ScriptedGeneration(self, sampling, n, stream_partial)


def write_input(path: Path, lines: int) -> None:
    with path.open("w") as file:
        for line in range(lines):
            custom_id = {"custom_id": f"line-{line}"} if line % 2 else {}
            file.write(json.dumps({**custom_id, "prompt": f"Film number {line} is"}) + "\n")


def run(lines: int) -> dict[str, Any]:
    """One run in this process, whose peak memory is that of this run alone."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "in.jsonl"
        write_input(source, lines)
        before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
        start_s = time.perf_counter()
        with scripted(StatelessGenerator([TEXT])):
            options = BatchOptions(str(source), Path(scratch) / "out", defaults={"best_of": 1})
            summary = batch.batch(SETTINGS, options, Console(quiet=True))
        assert (summary["answered"], summary["failed"]) == (lines, 0)
        return {
            "lines": lines,
            "seconds": time.perf_counter() - start_s,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB,
            "peak_before_mib": before_mib,
            "results_mib": (Path(scratch) / "out" / "results.jsonl").stat().st_size / MIB,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--alone", type=int, help="run this number of lines once in this process and print the figures")
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(run(arguments.alone)))
        return
    runs = []
    for lines in arguments.lines:
        command = [sys.executable, "-m", "benchmarks.batch_memory", "--alone", str(lines)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        runs.append(json.loads(output.splitlines()[-1]))
        print(runs[-1], file=sys.stderr)
    write_result("batch_memory", {"runs": runs, "provenance": provenance()})


if __name__ == "__main__":
    main()
