"""`nbest train ppo` with the real engine: a run that is killed and resumed ends like an uninterrupted one."""

import csv
import os
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.process import NBEST, is_running
from tests.end_to_end.served import START_TIMEOUT_S
from tests.support.tiny_models import ENGINE_HEAD_DIM, save_tiny_policy
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(4 * START_TIMEOUT_S)]

STEPS, CHECKPOINT_EVERY = 8, 2
COMPARED_COLUMNS = ("step", "reward", "kl", "beta", "policy_loss", "value_loss", "entropy", "ratio")
SMALL_ENGINE = {"NBEST_KV_CACHE_GIB": "0.25", "NBEST_MAX_NUM_SEQS": "64"}


def metrics_column(out: Path, column: str) -> list[float]:
    """A column of metrics.csv, without a last line that is still being written."""
    path = out / "metrics.csv"
    complete = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [float(row[column]) for row in csv.DictReader(complete.splitlines())]


def test_a_killed_run_that_is_resumed_ends_like_an_uninterrupted_run(tmp_path: Path) -> None:
    base = save_tiny_policy(tmp_path / "base", head_dim=ENGINE_HEAD_DIM)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The film was"}\n{"prompt": "What is the capital of"}\n')
    reward = tmp_path / "reward.py"
    reward.write_text("def short(prompt, completions):\n    return [-len(text) / 10 for text in completions]\n")

    def start(out: Path, *more: str) -> psutil.Popen:
        flags = ["--prompts", prompts, "--model", base, "--reward-model", f"short=python:{reward}:short", "--out", out]
        sizes = f"--steps {STEPS} --checkpoint-every {CHECKPOINT_EVERY} --batch-size 8 --samples-per-prompt 4"
        learning = "--max-tokens 8 --learning-rate 3e-3 --dtype float32 --holdout 0 --kl-target 0.5"
        words = [*map(str, flags), *sizes.split(), *learning.split(), *more]
        return psutil.Popen([NBEST, "train", "ppo", *words], env=os.environ | SMALL_ENGINE)

    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert start(uninterrupted).wait(START_TIMEOUT_S) == 0

    run = start(killed)
    assert eventually(lambda: len(metrics_column(killed, "step")) > CHECKPOINT_EVERY, START_TIMEOUT_S)
    children = run.children(recursive=True)
    run.kill()
    assert len(metrics_column(killed, "step")) < STEPS, "the run ended before it was killed"
    run.wait()
    _, left = psutil.wait_procs(children, timeout=30)
    assert not [child for child in left if is_running(child)], "the engine outlived its trainer"

    assert start(killed, "--resume").wait(START_TIMEOUT_S) == 0
    for column in COMPARED_COLUMNS:
        assert metrics_column(killed, column) == pytest.approx(metrics_column(uninterrupted, column), abs=1e-5), column
