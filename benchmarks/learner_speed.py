"""How near the learner comes to the speed of torch alone: `python -m benchmarks.learner_speed`.

The bare loop is the least that teaches a model anything: forward, cross-entropy of the completions, backward, a step
AdamW, over the same padded rows, with the same adapters and logits of the completions alone. What the learner does
beside the same passes is to read every completion twice before them, as policy and as reference, which no loop over
given data has to. So two shares are told: of its passes alone, and of whole updates, in which some passes follow
the readings. Everything is measured in turn, a minibatch at a time, for all minibatches of a batch are alike.
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

from benchmarks.account import spread
from benchmarks.provenance import provenance
from reranker.models.device import pick_device
from training.policy.finetune import TrainablePolicy
from training.rl.config import PPOTraining
from training.rl.learner import Learner, Measured
from training.rl.trajectories import Completion, Rows
from training.rl.update import update

SETTINGS = PPOTraining(dtype="float32")
MINIBATCH = replace(SETTINGS, batch_size=SETTINGS.rows_a_step, epochs=1, minibatches=1)
PROMPT_TOKENS = (12, 20)


def main(
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/rl_speed.json"),
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each, in turn; one more goes before them.")] = 5,
) -> None:
    """Seconds of a minibatch in a bare loop and in the learner."""
    device = torch.device(pick_device("auto"))
    bare, learner = BareLoop(device), TimedLearner(MINIBATCH, device, optimiser_steps=1000)
    seconds = [round_s(bare, learner, number) for number in range(rounds + 1)][1:]
    found = {
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
    results.write_text(json.dumps(found, indent=1) + "\n")
    typer.echo(json.dumps(found))


def round_s(bare: "BareLoop", learner: "TimedLearner", number: int) -> dict[str, float]:
    """Seconds of each over the same completions."""
    completions = synthetic_completions(random.Random(number), len(learner.tokenizer))
    begun_s = time.perf_counter()
    bare.learn(completions)
    bare_s, begun_s = time.perf_counter() - begun_s, time.perf_counter()
    update(learner, completions, MINIBATCH.kl_coef, MINIBATCH, random.Random(number))
    update_s = time.perf_counter() - begun_s
    return {"bare": bare_s, "pass": update_s - learner.readings_s, "readings": learner.readings_s}


def shares(seconds: Sequence[dict[str, float]], *, passes: int, readings: bool) -> dict[str, float]:
    """The learner's tokens a second as a share of the bare loop's, round by round: median and extremes."""
    return spread([passes * one["bare"] / (passes * one["pass"] + readings * one["readings"]) for one in seconds])


def synthetic_completions(rng: random.Random, vocabulary: int) -> list[Completion]:
    """A minibatch of random tokens, as long as completions are by default."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    drawn = []
    for place in range(MINIBATCH.batch_size):
        prompt_ids, token_ids, reward = (
            tokens(rng.randint(*PROMPT_TOKENS)),
            tokens(MINIBATCH.max_tokens),
            rng.gauss(0, 1),
        )
        nats = [-10.0] * len(token_ids)
        drawn.append(Completion(prompt_ids, token_ids, nats, "", reward, reward, place, is_cut=True))
    return drawn


class TimedLearner(Learner):
    """A learner that tells how long the last readings took, those before its passes."""

    readings_s = 0.0

    def measure(self, completions: Sequence[Completion]) -> Measured:
        begun_s = time.perf_counter()
        measured = super().measure(completions)
        self.readings_s = time.perf_counter() - begun_s
        return measured


class BareLoop:
    """Nothing but torch, transformers and PEFT."""

    def __init__(self, device: torch.device) -> None:
        policy = TrainablePolicy(MINIBATCH.policy, dropout=False)
        self._device = device
        self._model: Any = get_peft_model(policy.model.to(device), policy.adapters).eval()
        learning = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimiser = torch.optim.AdamW(learning, lr=MINIBATCH.learning_rate)

    def learn(self, completions: Sequence[Completion]) -> None:
        rows = Rows.of(completions, self._device)
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
