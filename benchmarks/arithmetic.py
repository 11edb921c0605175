"""Accuracy of each selection strategy against N on arithmetic word problems, whose answers can be checked.

The policy answers generated problems (`word_problems`) after worked examples. One pool of candidates for each problem
gives every curve at every n without sampling again (`reranker.estimators`):

    greedy               one answer, decoded greedily
    majority             the most frequent answer
    verifier             best-of-n by `arithmetic_verifier`, which does not know the answer
    reward               best-of-n by a Bradley-Terry reward model trained on the policy's own correct and incorrect
                         answers to other problems; three trainings with different seeds
    weighted majority    votes weighted by that reward
    oracle               pass@n: at least one of the n answers is correct

Samples, trained models and rewards are kept in --out; an interrupted run continues from there.

    python -m benchmarks.arithmetic [--out runs/arithmetic]
"""

import argparse
import asyncio
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.arithmetic_verifier import __file__ as verifier_file
from benchmarks.provenance import provenance
from benchmarks.stats import write_result
from benchmarks.word_problems import ANSWER_REGEX, WordProblem, word_problems
from reranker import estimators, selection
from reranker.answers import by_regex, canonical
from reranker.candidate import Candidate, Prompt, ScoredCandidate
from reranker.scorers.reward_model import RewardModelScorer
from reranker.scorers.spec import FunctionSpec
from reranker.scorers.verifier import VerifierScorer
from server import factory
from server.config import Settings
from server.generation.base import Generator, SamplingParams

MODEL = "smollm2-135m-instruct"
PROBLEMS_SEED = 1
NUM_TRAIN, NUM_TEST = 216, 144
TRAIN_POOL, TEST_POOL = 12, 32
AT_ONCE = 9
"""Problems sampled at a time: their candidates fill the engine."""
N = (1, 2, 4, 8, 16, 32)
TRAINING_SEEDS = (0, 1, 2)
PAIRS_A_PROBLEM = 3
RECIPE = ("--model", MODEL, "--layers", "20", "--lora-layers", "10", "--epochs", "3", "--batch-size", "16")
MAX_TOKENS = 24
SUBSETS = 200
"""Random subsets of each problem's pool, for the strategy that has no closed form."""

extract = by_regex(ANSWER_REGEX)
console = Console(stderr=True)


async def sample(
    generator: Generator, problem: WordProblem, n: int, *, seed: int, temperature: float = 1.0
) -> list[str]:
    """The texts of n candidates, by index."""
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=seed, stop=("\n",))
    texts: dict[int, str] = {}
    async with generator.generate(Prompt(text=problem.prompt), sampling, n) as generation:
        async for outcomes in generation:
            texts |= {outcome.index: outcome.text for outcome in outcomes if isinstance(outcome, Candidate)}
    return [texts[index] for index in sorted(texts)]


async def draw(out: Path, train: Sequence[WordProblem], test: Sequence[WordProblem]) -> None:
    """Writes a line for each problem to OUT/train.jsonl and OUT/test.jsonl; problems already there are skipped."""
    jobs = {"train.jsonl": (train, TRAIN_POOL), "test.jsonl": (test, TEST_POOL)}
    if all(len(read_lines(out / name)) == len(problems) for name, (problems, _) in jobs.items()):
        return
    settings = Settings(model=MODEL, reward_models={"likely": "logprob"}, max_model_len=512)
    async with factory.start(settings) as pipeline:
        for name, (problems, pool) in jobs.items():
            done = len(read_lines(out / name))
            groups = [problems[start : start + AT_ONCE] for start in range(done, len(problems), AT_ONCE)]
            for group in track(groups, f"Sampling {name}", console=console):
                seeds = [1_000_000 + 1000 * problems.index(problem) for problem in group]
                samples, greedy = await asyncio.gather(
                    asyncio.gather(
                        *(
                            sample(pipeline.generator, problem, pool, seed=seed)
                            for problem, seed in zip(group, seeds, strict=True)
                        )
                    ),
                    asyncio.gather(
                        *(sample(pipeline.generator, problem, 1, seed=0, temperature=0.0) for problem in group)
                    ),
                )
                with (out / name).open("a") as file:
                    for problem, texts, (first,) in zip(group, samples, greedy, strict=True):
                        file.write(json.dumps(asdict(problem) | {"greedy": first, "texts": texts}) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def is_right(text: str, answer: int) -> bool:
    extracted = extract(text)
    return extracted is not None and int(extracted) == answer


def question(pool: Mapping[str, Any]) -> str:
    """The prompt that verifier and reward model read: the policy's, without the worked examples."""
    return f"Question: {pool['question']}\nAnswer:"


def preferences(pools: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of a correct and an incorrect answer to the same problem; no answer is in two pairs."""
    rows = []
    for pool in pools:
        texts = list(dict.fromkeys(pool["texts"]))
        chosen = [text for text in texts if is_right(text, pool["answer"])]
        rejected = [text for text in texts if not is_right(text, pool["answer"])]
        pairs = zip(chosen[:PAIRS_A_PROBLEM], rejected, strict=False)
        rows += [{"prompt": question(pool), "chosen": correct, "rejected": wrong} for correct, wrong in pairs]
    return rows


def train(out: Path, seed: int) -> Path:
    """The adapter of the reward model with this seed; `nbest train reward` makes it where it is missing."""
    run = out / f"reward-{seed}"
    if not (run / "adapter").is_dir():
        data = out / "preferences.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in preferences(read_lines(out / "train.jsonl"))))
        console.print(f"Training {run}")
        nbest = Path(sys.executable).with_name("nbest")
        options = ["--data", str(data), "--out", str(run), "--seed", str(seed), "--resume"]
        subprocess.run([nbest, "train", "reward", *RECIPE, *options], check=True)
    return run / "adapter"


async def score(out: Path, adapters: Mapping[str, Path]) -> None:
    """Adds every scorer's rewards to the test pools: OUT/scored.jsonl."""
    if len(read_lines(out / "scored.jsonl")) == NUM_TEST:
        return
    async with AsyncExitStack() as stack:
        verifier = await VerifierScorer.create("verifier", FunctionSpec(verifier_file, "check"), timeout_s=10)
        stack.push_async_callback(verifier.close)
        models = {}
        for name, adapter in adapters.items():
            models[name] = await RewardModelScorer.create(
                name,
                str(adapter),
                device="cpu",
                dtype="float32",
                trust_remote_code=False,
                max_batch_tokens=4096,
                max_wait_ms=5,
            )
            stack.push_async_callback(models[name].close)
        lines = []
        for pool in track(read_lines(out / "test.jsonl"), "Scoring", console=console):
            candidates = [Candidate(index, text, 0) for index, text in enumerate(pool["texts"])]
            prompt = Prompt(text=question(pool))
            rewards = {name: (await model.score(prompt, candidates)).rewards_N for name, model in models.items()}
            rewards["verifier"] = (await verifier.score(prompt, candidates)).rewards_N
            rounded = {name: [round(reward, 4) for reward in rewards_N] for name, rewards_N in rewards.items()}
            lines.append(pool | {"rewards": rounded})
    (out / "scored.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


Curve = Callable[[Mapping[str, Any], int], float]
"""(pool, n) -> the probability that the selected answer is correct."""


def curves(reward_names: Sequence[str]) -> dict[str, Curve]:
    def correctness(pool: Mapping[str, Any]) -> list[float]:
        return [float(is_right(text, pool["answer"])) for text in pool["texts"]]

    def answers(pool: Mapping[str, Any]) -> list[str | None]:
        extracted = map(extract, pool["texts"])
        return [None if answer is None else canonical(answer) for answer in extracted]

    def oracle(pool: Mapping[str, Any], n: int) -> float:
        correct = correctness(pool)
        return estimators.pass_at_n(len(correct), round(sum(correct)), n)

    def majority(pool: Mapping[str, Any], n: int) -> float:
        return estimators.majority_at_n(answers(pool), str(pool["answer"]), n)

    def best_by(name: str, pool: Mapping[str, Any], n: int) -> float:
        return estimators.expected_value_of_best(pool["rewards"][name], correctness(pool), n)

    def weighted(name: str, pool: Mapping[str, Any], n: int) -> float:
        scored = [
            ScoredCandidate(Candidate(index, text, 0), reward)
            for index, (text, reward) in enumerate(zip(pool["texts"], pool["rewards"][name], strict=True))
        ]
        votes = {index: answer for index, answer in enumerate(answers(pool)) if answer is not None}
        select = partial(selection.weighted_majority, answers=votes)
        values = dict(enumerate(correctness(pool)))
        return estimators.expected_value_of_selected(scored, values, n, select, draws=SUBSETS)

    def mean_over_trainings(curve: Callable[[str, Mapping[str, Any], int], float]) -> Curve:
        return lambda pool, n: fmean(curve(name, pool, n) for name in reward_names)

    return {
        "oracle (pass@n)": oracle,
        "weighted majority by the reward": mean_over_trainings(weighted),
        "best of n by the reward": mean_over_trainings(best_by),
        "best of n by the verifier": partial(best_by, "verifier"),
        "majority": majority,
    }


def evaluate(out: Path) -> dict[str, Any]:
    pools = read_lines(out / "scored.jsonl")
    names = [f"reward-{seed}" for seed in TRAINING_SEEDS]
    by_curve: dict[str, Any] = {}
    for name, curve in curves(names).items():
        by_curve[name] = {
            str(n): asdict(estimators.bootstrap_mean([curve(pool, n) for pool in pools]))
            for n in track(N, name, console=console)
        }
    best_by_seed = {
        name: {
            str(n): fmean(
                estimators.expected_value_of_best(
                    pool["rewards"][name], [float(is_right(text, pool["answer"])) for text in pool["texts"]], n
                )
                for pool in pools
            )
            for n in N
        }
        for name in names
    }
    held_out = {}
    for name in names:
        with (out / name / "metrics.csv").open() as file:
            held_out[name] = float(list(csv.DictReader(file))[-1]["validation_pair_accuracy"])
    greedy = [float(is_right(pool["greedy"], pool["answer"])) for pool in pools]
    rows = preferences(read_lines(out / "train.jsonl"))
    return {
        "provenance": provenance(flags={"nbest train reward": " ".join(RECIPE)}),
        "policy": MODEL,
        "problems": {"seed": PROBLEMS_SEED, "train": NUM_TRAIN, "pairs": len(rows), "test": len(pools)},
        "pool": TEST_POOL,
        "training_seeds": list(TRAINING_SEEDS),
        "measure": "share of test problems answered rightly, mean over problems with its 95% bootstrap interval over "
        "problems; one pool of candidates a problem; rewards averaged over the trainings",
        "greedy": asdict(estimators.bootstrap_mean(greedy)),
        "curves": by_curve,
        "held_out_pair_accuracy_by_training_seed": held_out,
        "best_of_n_by_training_seed": best_by_seed,
        "samples": pools,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/arithmetic"), help="directory of samples and models")
    parser.add_argument("--anew", action="store_true", help="delete that directory and start again")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if arguments.anew and out.is_dir():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    problems = word_problems(NUM_TRAIN + NUM_TEST, PROBLEMS_SEED)
    asyncio.run(draw(out, problems[:NUM_TRAIN], problems[NUM_TRAIN:]))
    adapters = {f"reward-{seed}": train(out, seed) for seed in TRAINING_SEEDS}
    asyncio.run(score(out, adapters))
    write_result("arithmetic", evaluate(out))


if __name__ == "__main__":
    main()
