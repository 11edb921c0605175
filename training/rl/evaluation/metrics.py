"""Samples of a policy on held-out prompts, and the metrics computed from them.

Each completion has the rewards of the scorer and of the judge, its length, and

    kl          log pi(y) - log pi_ref(y), in nats. Its mean is an unbiased estimate of the KL divergence of policy and
                reference (k1 of `training.rl.kl`); single values are of either sign.
    repetition  the share of its 4-grams that occurred before, 1 - distinct / all (seq-rep-4 of Welleck et al. 2020,
                arXiv 1908.04319), over tokens: 0 if no two are equal, near 1 if one is repeated again and again.

Prompts and seeds are the same at every evaluation, so two evaluations are compared prompt by prompt (`change`): the
differences between prompts do not count as noise then.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal, Self

NGRAM = 4

Metric = Literal["reward", "judge", "kl", "length", "repetition"]
METRICS_WITH_ERROR: tuple[Metric, ...] = ("reward", "judge", "kl")
"""The metrics that are reported with their standard error."""

EARLIER_PROMPT_INDEX = "place"
"""The name of `prompt_index` in sample files of earlier versions."""


@dataclass(frozen=True, slots=True)
class EvaluationSample:
    """One completion of the prompt with that index.

    `judge` is the judge's reward, None where it gave none. `kl` and `reference_nats` are in nats; the second is
    log pi_ref(y). `length` is in tokens.
    """

    prompt_index: int
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
    """A mean over prompts, and its standard error, which is None for a single prompt."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The policy after `step` steps: one sample of each prompt, except those that failed."""

    step: int
    samples: tuple[EvaluationSample, ...]

    def values(self, metric: Metric) -> dict[int, float]:
        """Prompt index -> value, for the prompts that have one."""
        values = {sample.prompt_index: getattr(sample, metric) for sample in self.samples}
        return {index: float(value) for index, value in values.items() if value is not None}

    def metrics(self) -> dict[str, float]:
        """Means over the prompts; `cut` is a share, `perplexity` that of the samples under the reference, per token."""
        metrics = {"completions": float(len(self.samples))}
        for metric in METRICS_WITH_ERROR:
            if values := self.values(metric):
                estimate = Estimate.of([*values.values()])
                metrics[metric] = estimate.mean
                if estimate.standard_error is not None:
                    metrics[f"{metric}_standard_error"] = estimate.standard_error
        nats = sum(sample.reference_nats for sample in self.samples)
        tokens = sum(sample.length for sample in self.samples)
        return metrics | {
            "length": tokens / len(self.samples),
            "cut": fmean(sample.cut for sample in self.samples),
            "repetition": fmean(sample.repetition for sample in self.samples),
            "perplexity": math.exp(-nats / tokens),
        }

    def lines(self) -> str:
        """The samples as JSONL."""
        return "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in self.samples)

    @classmethod
    def of_lines(cls, step: int, lines: str) -> Self:
        """Reads what `lines` has written."""
        return cls(step, tuple(_sample(json.loads(line)) for line in filter(None, lines.split("\n"))))


def _sample(fields: dict[str, Any]) -> EvaluationSample:
    if EARLIER_PROMPT_INDEX in fields:
        fields = {"prompt_index": fields.pop(EARLIER_PROMPT_INDEX), **fields}
    return EvaluationSample(**fields)


@dataclass(frozen=True, slots=True)
class Change:
    """Means before and after, over the prompts that both evaluations have, and the standard error of the change."""

    before: float
    after: float
    standard_error: float | None
    prompts: int

    @property
    def difference(self) -> float:
        return self.after - self.before


def change(before: Evaluation, after: Evaluation, metric: Metric) -> Change | None:
    """The change of a metric from one evaluation to another; None if no prompt has the metric in both."""
    earlier, later = before.values(metric), after.values(metric)
    both = earlier.keys() & later.keys()
    if not both:
        return None
    return Change(
        before=fmean(earlier[index] for index in both),
        after=fmean(later[index] for index in both),
        standard_error=Estimate.of([later[index] - earlier[index] for index in both]).standard_error,
        prompts=len(both),
    )


def repetition(token_ids: Sequence[Any]) -> float:
    """The share of 4-grams that occurred before in these tokens; 0 if there is no 4-gram."""
    ngrams = [tuple(token_ids[start : start + NGRAM]) for start in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
