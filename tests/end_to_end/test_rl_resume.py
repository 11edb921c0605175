"""`nbest train ppo` on the real engine as people run it: killed in the middle, it ends as if it had not been."""

import csv
import os
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.process import NBEST, lives
from tests.end_to_end.served import START_TIMEOUT_S
from tests.support.tiny_models import ENGINE_HEAD_DIM, save_tiny_policy
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(4 * START_TIMEOUT_S)]

STEPS, CHECKPOINT_EVERY = 8, 2
REPRODUCED = ("step", "reward", "kl", "beta", "policy_loss", "value_loss", "entropy", "ratio")
SMALL_ENGINE = {"NBEST_KV_CACHE_GIB": "0.25", "NBEST_MAX_NUM_SEQS": "64"}


def logged(out: Path, column: str) -> list[float]:
    """Of the steps that have been written down; a line that is being written is none yet."""
    path = out / "metrics.csv"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [float(row[column]) for row in csv.DictReader(whole.splitlines())]


def test_a_run_that_is_killed_goes_on_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    base = save_tiny_policy(tmp_path / "base", head_dim=ENGINE_HEAD_DIM)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The film was"}\n{"prompt": "What is the capital of"}\n')
    reward = tmp_path / "reward.py"
    reward.write_text("def short(prompt, completions):\n    return [-len(one) / 10 for one in completions]\n")

    def started(out: Path, *more: str) -> psutil.Popen:
        flags = ["--prompts", prompts, "--model", base, "--reward-model", f"short=python:{reward}:short", "--out", out]
        sizes = f"--steps {STEPS} --checkpoint-every {CHECKPOINT_EVERY} --batch-size 8 --samples-per-prompt 4"
        learning = "--max-tokens 8 --learning-rate 3e-3 --dtype float32 --holdout 0 --kl-target 0.5"
        words = [*map(str, flags), *sizes.split(), *learning.split(), *more]
        return psutil.Popen([NBEST, "train", "ppo", *words], env=os.environ | SMALL_ENGINE)

    through, cut = tmp_path / "through", tmp_path / "cut"
    assert started(through).wait(START_TIMEOUT_S) == 0

    run = started(cut)
    assert eventually(lambda: len(logged(cut, "step")) > CHECKPOINT_EVERY, START_TIMEOUT_S)
    children = run.children(recursive=True)
    run.kill()
    assert len(logged(cut, "step")) < STEPS, "it was done before it was killed"
    run.wait()
    _, left = psutil.wait_procs(children, timeout=30)
    assert not [one for one in left if lives(one)], "the engine outlived its trainer"

    assert started(cut, "--resume").wait(START_TIMEOUT_S) == 0
    for column in REPRODUCED:
        assert logged(cut, column) == pytest.approx(logged(through, column), abs=1e-5), column
