"""What a policy says on held-out prompts, and the figures that are made of it.

Of each completion are known: what the scorer and the judge say of it, its length, and

    kl          log pi(y) - log pi_ref(y), in nats. Its mean estimates the KL divergence of policy and reference without
                bias (k1 of `training.rl.kl`), and single ones are of either sign.
    repetition  the share of its 4-grams that have been there before, 1 - distinct / all (seq-rep-4 of Welleck et al.
                2020, arXiv 1908.04319), over tokens. 0 where no two are alike, near 1 where one is written on and on.

Prompts and seeds are the same at every evaluation, so two are compared prompt by prompt: what they have in common, one
prompt being easier than another, is no noise then (`change`).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal, Self

NGRAM = 4

Measure = Literal["reward", "judge", "kl", "length", "repetition"]
ESTIMATED: tuple[Measure, ...] = ("reward", "judge", "kl")
"""Those told with their standard error."""


@dataclass(frozen=True, slots=True)
class EvaluationSample:
    """One completion; `place` is its prompt's, `reference_nats` its log pi_ref, `judge` None where it is silent."""

    place: int
    prompt: str | list[dict[str, str]]
    completion: str
    reward: float
    judge: float | None
    kl: float
    length: int
    cut: bool
    repetition: float
    reference_nats: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts; its standard error is not known from one."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The policy after so many steps: a sample of each prompt but those that failed."""

    step: int
    samples: tuple[EvaluationSample, ...]

    def values(self, measure: Measure) -> dict[int, float]:
        """By the place of the prompt."""
        found = {one.place: getattr(one, measure) for one in self.samples}
        return {place: float(value) for place, value in found.items() if value is not None}

    def figures(self) -> dict[str, float]:
        """Means over the prompts; `cut` is a share, and `perplexity` the reference's, a token of these samples."""
        found = {"completions": float(len(self.samples))}
        for measure in ESTIMATED:
            if values := self.values(measure):
                estimate = Estimate.of([*values.values()])
                found[measure] = estimate.mean
                if estimate.standard_error is not None:
                    found[f"{measure}_standard_error"] = estimate.standard_error
        nats, tokens = (sum(getattr(one, name) for one in self.samples) for name in ("reference_nats", "length"))
        return found | {
            "length": tokens / len(self.samples),
            "cut": fmean(one.cut for one in self.samples),
            "repetition": fmean(one.repetition for one in self.samples),
            "perplexity": math.exp(-nats / tokens),
        }

    def lines(self) -> str:
        """The samples as JSONL."""
        return "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in self.samples)

    @classmethod
    def of_lines(cls, step: int, lines: str) -> Self:
        """What `lines` wrote."""
        return cls(step, tuple(EvaluationSample(**json.loads(line)) for line in filter(None, lines.split("\n"))))


@dataclass(frozen=True, slots=True)
class Change:
    """The means before and after over the prompts that both evaluations have, and the standard error of the change."""

    before: float
    after: float
    standard_error: float | None
    prompts: int

    @property
    def difference(self) -> float:
        return self.after - self.before


def change(before: Evaluation, after: Evaluation, measure: Measure) -> Change | None:
    """By how much a measure moved; None where no prompt has it in both."""
    values, others = before.values(measure), after.values(measure)
    both = values.keys() & others.keys()
    if not both:
        return None
    return Change(
        before=fmean(values[place] for place in both),
        after=fmean(others[place] for place in both),
        standard_error=Estimate.of([others[place] - values[place] for place in both]).standard_error,
        prompts=len(both),
    )


def repetition(token_ids: Sequence[Any]) -> float:
    """The share of 4-grams that have been there before; 0 where there are none."""
    ngrams = [tuple(token_ids[place : place + NGRAM]) for place in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
