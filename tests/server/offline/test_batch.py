"""`nbest batch` and `nbest rerank`: results, interruptions, kills, a full disk, refusals, and continued runs."""

import errno
import io
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.config import ConfigError, Settings
from server.offline import batch
from server.offline.batch import BatchOptions
from server.offline.errors import OfflineError
from server.offline.run_directory import locked
from tests.support.doubles import ScriptedGenerator
from tests.support.offline_runs import (
    QUIET,
    SETTINGS,
    SeededGenerator,
    records,
    run,
    run_in_child,
    scripted,
    write_lines,
)
from tests.support.paths import ROOT

KILLS = 20
PROGRAM = """
import sys
from server.cli import main
from tests.support.offline_runs import SeededGenerator, scripted

with scripted(SeededGenerator(delay_s=0.01)):
    main()
"""


def prompts(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"p{line}", **fields} for line in range(1, count + 1)]


def test_every_line_has_a_record_in_one_of_the_two_files(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}, "not json\n", {"prompt": "b", "best_of": 99}, "\n"])
    summary = run(source, tmp_path / "out", defaults={"best_of": 3})
    answered, failed = records(tmp_path / "out"), records(tmp_path / "out", "failed.jsonl")
    assert (set(answered), set(failed)) == ({1}, {2, 3})
    assert (summary["lines"], summary["answered"], summary["failed"]) == (3, 1, 2)
    assert answered[1]["winner"] in answered[1]["candidates"]
    assert len(answered[1]["candidates"]) == 3
    assert "not valid JSON" in failed[2]["reason"]
    assert failed[3]["param"] == "best_of"


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_records(tmp_path: Path) -> None:
    """SIGKILL, twenty times: no line is lost, duplicated or incomplete, and the candidates are the same."""
    source = write_lines(tmp_path / "in.jsonl", [*prompts(300), "broken\n", *prompts(100)])
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    defaults = {"best_of": 4}
    run(source, uninterrupted, defaults=defaults)
    context = multiprocessing.get_context("forkserver")  # so that the children do not import everything again
    context.set_forkserver_preload(["tests.support.offline_runs"])
    delays = random.Random(0)
    line_counts = []
    for _ in range(KILLS):
        started = context.Event()
        child = context.Process(target=run_in_child, args=(source, killed, 0.004, defaults, started))
        child.start()
        assert started.wait(60)
        time.sleep(delays.uniform(0, 0.12))
        child.kill()
        child.join()
        results = killed / "results.jsonl"
        line_counts.append(results.read_bytes().count(b"\n") if results.exists() else 0)
    assert line_counts[0] < 400, "the first run ended before it was killed"
    assert line_counts == sorted(line_counts), "a written line was lost"
    run(source, killed, defaults=defaults)
    assert records(killed) == records(uninterrupted)
    assert records(killed, "failed.jsonl") == records(uninterrupted, "failed.jsonl")
    assert len(records(killed)) == 400


def test_ctrl_c_keeps_the_finished_lines_and_says_how_to_continue(tmp_path: Path) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", prompts(2000)), tmp_path / "out"
    arguments = ["batch", str(source), "--out", str(out), "--best-of", "2", "--model", "scripted"]
    arguments += ["--reward-model", "length=logprob", "--generator", "openai", "--base-url", "http://127.0.0.1:9"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NBEST_")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    results = out / "results.jsonl"
    while process.poll() is None and not (results.exists() and results.stat().st_size):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    message = re.search(r"Stopped with ([\d,]+) of 2,000 lines done; the same command continues", stderr)
    assert message, stderr
    assert "Traceback" not in stderr
    done = len(records(out))
    assert 0 < done == int(message[1].replace(",", "")) < 2000


def test_a_finished_run_starts_no_models(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", prompts(3))
    run(source, tmp_path / "out")
    generator = SeededGenerator()
    summary = run(source, tmp_path / "out", generator)
    assert generator.calls == []
    assert summary["this_run"]["answered"] == 0
    assert summary["answered"] == 3


def test_retry_failed_answers_the_failed_lines_again(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [*prompts(2), "broken\n"])
    run(source, tmp_path / "out", ScriptedGenerator([None]))
    assert records(tmp_path / "out", "failed.jsonl").keys() == {1, 2, 3}
    run(source, tmp_path / "out", retry_failed=True)
    assert records(tmp_path / "out").keys() == {1, 2}
    assert records(tmp_path / "out", "failed.jsonl").keys() == {3}


def test_a_full_disk_ends_the_run_and_the_run_continues_once_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", prompts(50)), tmp_path / "out"
    write, free_bytes = os.write, [4000]

    def write_until_full(file: int, data: Any) -> int:
        if isinstance(data, memoryview):  # only the journals write these
            if not free_bytes[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            data = data[: free_bytes[0]]
            free_bytes[0] -= len(data)
        return write(file, data)

    monkeypatch.setattr(os, "write", write_until_full)
    with pytest.raises(OfflineError, match=r"results\.jsonl cannot be written: No space left on device"):
        run(source, out)
    monkeypatch.undo()
    assert 0 < len(records(out)) < 50
    run(source, out)
    assert len(records(out)) == 50


def test_a_directory_in_use_is_refused_and_so_are_other_settings_or_another_input(tmp_path: Path) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", prompts(1)), tmp_path / "out"
    with locked(out), pytest.raises(OfflineError, match="A run is writing"):
        run(source, out)
    run(source, out)
    with pytest.raises(OfflineError, match="holds a run with other settings: seed was 0 and is 1"):
        run(source, out, seed=1)
    with pytest.raises(OfflineError, match="holds a run of another input"):
        run(write_lines(tmp_path / "other.jsonl", prompts(2)), out)


def test_the_seed_of_a_result_gives_the_same_candidates_again(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", prompts(3, best_of=4))
    run(source, tmp_path / "out", seed=7)
    third = records(tmp_path / "out")[3]
    assert third["seed"] == 7 + 2 * 65536
    alone = write_lines(tmp_path / "alone.jsonl", [{"prompt": "p3", "best_of": 4, "seed": third["seed"]}])
    run(alone, tmp_path / "again", seed=99)
    assert records(tmp_path / "again")[1]["candidates"] == third["candidates"]


def test_a_table_and_stdin_give_the_same_records_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import Table, parquet

    lines = [{"messages": [{"role": "user", "content": f"p{line}"}], "best_of": 2} for line in range(3)]
    source = write_lines(tmp_path / "in.jsonl", lines)
    parquet.write_table(Table.from_pylist(lines), tmp_path / "in.parquet")
    run(source, tmp_path / "file")
    run(tmp_path / "in.parquet", tmp_path / "table")
    stdin = SimpleNamespace(buffer=io.BytesIO(source.read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    run(Path("-"), tmp_path / "stdin")
    assert records(tmp_path / "file") == records(tmp_path / "table") == records(tmp_path / "stdin")
    stdin.buffer = io.BytesIO(b'{"prompt": "other"}\n')
    with pytest.raises(OfflineError, match=r"holds a run of other lines from stdin; give .*stdin\.jsonl"):
        run(Path("-"), tmp_path / "stdin")


def test_rerank_scores_the_given_candidates_and_draws_none(tmp_path: Path) -> None:
    lines = [{"prompt": "p", "candidates": ["a", "abc", "ab"]}, {"prompt": "p"}]
    source = write_lines(tmp_path / "in.jsonl", lines)
    generator = SeededGenerator()
    with scripted(generator):
        batch.rerank(SETTINGS, BatchOptions(str(source), tmp_path / "out"), QUIET)
    result = records(tmp_path / "out")[1]
    assert generator.calls == []
    assert result["winner"]["text"] == "abc"
    assert [candidate["reward"] for candidate in result["candidates"]] == [1.0, 3.0, 2.0]
    assert (result["model"], result["reward_model"]) == (None, "scripted-reward")
    assert records(tmp_path / "out", "failed.jsonl")[2]["reason"] == "candidates is required."


def test_results_can_be_reranked(tmp_path: Path) -> None:
    run(write_lines(tmp_path / "in.jsonl", prompts(2, best_of=3)), tmp_path / "out", seed=1)
    with scripted(SeededGenerator()):
        batch.rerank(SETTINGS, BatchOptions(str(tmp_path / "out" / "results.jsonl"), tmp_path / "reranked"), QUIET)
    reranked = {record["custom_id"]: record for record in records(tmp_path / "reranked").values()}
    for record in records(tmp_path / "out").values():
        for field in ("candidates", "winner", "model", "sampling", "seed", "prompt"):
            assert reranked[record["custom_id"]][field] == record[field]


def test_rerank_refuses_a_judge_that_is_the_policy(tmp_path: Path) -> None:
    settings = Settings(reward_models={"judge": "judge:self"})
    with pytest.raises(ConfigError, match="uses the policy as the judge, and rerank does not start the policy"):
        batch.rerank(settings, BatchOptions("in.jsonl", tmp_path), QUIET)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch", "none.jsonl"], "Error: There is no file none.jsonl; give a file of"),
        (["rerank", "none.jsonl"], "Error: There is no file none.jsonl; give a file of"),
        (["batch", "none.jsonl", "--best-of", "0"], "Invalid value for '--best-of'"),
    ],
)
def test_a_wrong_argument_gives_a_message_and_no_traceback(arguments: list[str], message: str, tmp_path: Path) -> None:
    offline = ["--reward-model", "l=logprob", "--generator", "openai", "--base-url", "http://127.0.0.1:9"]
    program = "from server.cli import main; main()"
    command = [sys.executable, "-c", program, *arguments, "--out", str(tmp_path / "out"), *offline]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_flags_apply_to_lines_that_leave_a_field_out(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b", "temperature": 0.25}])
    flags = ["--best-of", "70", "--max-tokens", "5", "--temperature", "0.5", "--seed", "3", "--in-flight", "9"]
    models = ["--reward-model", "l=logprob", "--generator", "openai", "--base-url", "http://127.0.0.1:9"]
    generator = SeededGenerator()
    with scripted(generator):
        result = CliRunner().invoke(
            app, ["batch", str(source), "--out", str(tmp_path / "out"), "--model", "m", *models, *flags]
        )
    assert result.exit_code == 0, result.output
    assert [(n, sampling.temperature, sampling.max_tokens) for _, sampling, n in generator.calls] == [
        (70, 0.5, 5),
        (70, 0.25, 5),
    ]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["answered"] == 2


LONG_INPUT = """
import re, sys
from pathlib import Path
from tests.support.offline_runs import SeededGenerator, run

class StatelessGenerator(SeededGenerator):
    def generate(self, *arguments, **options):
        self.calls.clear()
        return super().generate(*arguments, **options)

run(Path(sys.argv[1]), Path(sys.argv[2]), StatelessGenerator(), defaults={"best_of": 1})
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not report peak memory")
def test_a_hundred_times_longer_input_takes_hardly_more_memory(tmp_path: Path) -> None:
    """4,000 lines of 60 MB in total take at most 30 MB more than 40 lines: the input is streamed."""
    peaks_kb = []
    for count in (40, 4000):
        source = tmp_path / f"{count}.jsonl"
        with source.open("w") as file:
            file.writelines(json.dumps({"prompt": f"{line} " + "x" * 15_000}) + "\n" for line in range(count))
        command = [sys.executable, "-c", LONG_INPUT, str(source), str(tmp_path / f"out-{count}")]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks_kb.append(int(process.stdout))
    assert peaks_kb[1] - peaks_kb[0] < 30_000
