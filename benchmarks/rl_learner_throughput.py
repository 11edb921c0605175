"""Throughput of the RL learner relative to a bare PyTorch loop: `python -m benchmarks.rl_learner_throughput`.

The bare loop is the minimal training step: forward, cross-entropy of the completions, backward, one AdamW step, over
the same padded rows, with the same adapters and with logits of the completion tokens alone. The learner runs the same
passes, and before them two forward passes over every completion for the log-probabilities of policy and reference,
which a loop over fixed data does not need. Two kinds of ratio are therefore reported: of its passes alone, and of whole
updates, in which one or more passes follow those forward passes. Bare loop and learner are measured alternately on
single minibatches, since all minibatches of a batch have the same size.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from peft import get_peft_model

from benchmarks.provenance import provenance
from benchmarks.stats import spread
from reranker.models.device import pick_device
from training.policy.finetune import TrainablePolicy
from training.rl.config import PPOTraining
from training.rl.learner import BatchMeasures, Learner
from training.rl.trajectories import Completion, PaddedBatch
from training.rl.update import update

SETTINGS = PPOTraining(dtype="float32")
MINIBATCH = replace(SETTINGS, batch_size=SETTINGS.rows_per_step, epochs=1, minibatches=1)
PROMPT_TOKENS = (12, 20)


def main(
    results: Annotated[Path, typer.Option(help="Output file.")] = Path("benchmarks/results/rl_learner_throughput.json"),
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds, after one warm-up round.")] = 5,
) -> None:
    """Measure the seconds of a minibatch in a bare loop and in the learner."""
    device = torch.device(pick_device("auto"))
    bare, learner = BareLoop(device), TimedLearner(MINIBATCH, device, optimiser_steps=1000)
    seconds = [round_s(bare, learner, number) for number in range(rounds + 1)][1:]
    result = {
        "policy": SETTINGS.base_model,
        "completions": MINIBATCH.batch_size,
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": SETTINGS.max_tokens,
        "seconds": seconds,
        "share_of_bare": {
            "passes alone": shares(seconds, passes=1, readings=False),
            "update of one pass": shares(seconds, passes=1, readings=True),
            f"update of {SETTINGS.epochs} passes": shares(seconds, passes=SETTINGS.epochs, readings=True),
        },
        "device": str(device),
        "provenance": provenance(),
    }
    results.write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(json.dumps(result))


def round_s(bare: "BareLoop", learner: "TimedLearner", number: int) -> dict[str, float]:
    """Seconds of the bare loop, the learner's passes and its readings, over the same completions."""
    completions = synthetic_completions(random.Random(number), len(learner.tokenizer))
    start_s = time.perf_counter()
    bare.learn(completions)
    bare_s, start_s = time.perf_counter() - start_s, time.perf_counter()
    update(learner, completions, MINIBATCH.kl_coef, MINIBATCH, random.Random(number))
    update_s = time.perf_counter() - start_s
    return {"bare": bare_s, "pass": update_s - learner.readings_s, "readings": learner.readings_s}


def shares(seconds: Sequence[dict[str, float]], *, passes: int, readings: bool) -> dict[str, float]:
    """The learner's tokens a second as a share of the bare loop's, round by round: median and extremes.

    Args:
        seconds: for each round the seconds of `bare`, `pass` and `readings`.
        passes: passes over a minibatch in one update.
        readings: whether the update includes the forward passes for policy and reference log-probabilities.
    """
    return spread(
        [passes * times["bare"] / (passes * times["pass"] + readings * times["readings"]) for times in seconds]
    )


def synthetic_completions(rng: random.Random, vocabulary: int) -> list[Completion]:
    """A minibatch of random tokens; completions have the default maximum length."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    completions = []
    for group in range(MINIBATCH.batch_size):
        prompt_ids, token_ids, reward = (
            tokens(rng.randint(*PROMPT_TOKENS)),
            tokens(MINIBATCH.max_tokens),
            rng.gauss(0, 1),
        )
        nats = [-10.0] * len(token_ids)
        completions.append(Completion(prompt_ids, token_ids, nats, "", reward, reward, group, is_cut=True))
    return completions


class TimedLearner(Learner):
    """A learner that records the seconds of its last readings: the forward passes before an update."""

    readings_s = 0.0

    def measure(self, completions: Sequence[Completion]) -> BatchMeasures:
        start_s = time.perf_counter()
        measured = super().measure(completions)
        self.readings_s = time.perf_counter() - start_s
        return measured


class BareLoop:
    """A training loop of torch, transformers and PEFT alone."""

    def __init__(self, device: torch.device) -> None:
        policy = TrainablePolicy(MINIBATCH, dropout=False)
        self._device = device
        self._model: Any = get_peft_model(policy.model.to(device), policy.adapters).eval()
        trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimiser = torch.optim.AdamW(trainable, lr=MINIBATCH.learning_rate)

    def learn(self, completions: Sequence[Completion]) -> None:
        rows = PaddedBatch.of(completions, self._device)
        logits_N_T_V = self._model(
            input_ids=rows.input_ids_N_L,
            attention_mask=rows.attention_mask_N_L,
            logits_to_keep=rows.mask_N_T.shape[1] + 1,
            use_cache=False,
        ).logits[:, :-1]
        loss = F.cross_entropy(logits_N_T_V.flatten(0, 1), rows.token_ids_N_T.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self._optimiser.zero_grad()


if __name__ == "__main__":
    typer.run(main)
