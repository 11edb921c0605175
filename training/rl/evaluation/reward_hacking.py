"""Signs that the reward goes up for the wrong reasons (reward hacking, over-optimisation).

From some evaluation to the newest the reward rose, and meanwhile what should have stayed or risen with it did not:

    judge       the mean of the judge, which nothing is learnt from, fell
    length      completions became longer or shorter, by a quarter or more
    repetition  more of their 4-grams are repeated, by .05 of all or more

Rose, fell and became mean: by more than 3.5 standard errors of the mean change of a prompt. Each evaluation is
compared with all before it, since the judge may rise first and fall from its best (Gao et al. 2022, arXiv 2210.10760);
of those the one is told from which the measure moved most.

The alarms audit and do not foresee: they ring when the damage can be measured, on these prompts, by this judge. Their
silence proves nothing, and that they ring is a reason to read the samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from training.rl.evaluation.measures import Change, Evaluation, Measure, change

STANDARD_ERRORS = 3.5
"""Many are compared with many: a judge that is noise alone rings in one of 65 runs of 11 evaluations of 64 prompts, and
in one of 15 runs of 21 (by simulation); at three it would be one of 13 and one of 5."""
FEWEST_PROMPTS = 8
"""The standard error of fewer is hardly known itself."""
WATCHED: tuple[Measure, ...] = ("judge", "length", "repetition")
LENGTH_SHARE = 0.25
REPETITION_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Alarm:
    """At `step`, against the evaluation of `since`: what moved, by how much, and how much the reward rose."""

    step: int
    since: int
    measure: Measure
    change: float
    reward_change: float
    told: str


def alarms(evaluations: Sequence[Evaluation]) -> list[Alarm]:
    """Those of the last evaluation, at most one for each measure."""
    *earlier, now = evaluations
    found: dict[Measure, Alarm] = {}
    for before in earlier:
        reward = change(before, now, "reward")
        if reward is None or not (_is_certain(reward) and reward.difference > 0):
            continue
        for measure in WATCHED:
            moved = change(before, now, measure)
            if moved is None or not (_is_certain(moved) and _is_drift(measure, moved)):
                continue
            if measure not in found or abs(moved.difference) > abs(found[measure].change):
                told = f"from step {before.step} to step {now.step} the reward {_told(reward)}, while the {measure} "
                found[measure] = Alarm(
                    now.step, before.step, measure, moved.difference, reward.difference, told + _told(moved)
                )
    return list(found.values())


def _is_certain(moved: Change) -> bool:
    return moved.prompts >= FEWEST_PROMPTS and abs(moved.difference) > STANDARD_ERRORS * (moved.standard_error or 0.0)


def _is_drift(measure: Measure, moved: Change) -> bool:
    if measure == "length":
        return abs(moved.difference) >= LENGTH_SHARE * moved.before
    return moved.difference >= REPETITION_SHARE if measure == "repetition" else moved.difference < 0


def _told(moved: Change) -> str:
    verb = "rose" if moved.difference > 0 else "fell"
    error = moved.standard_error  # 0 where all prompts moved alike
    in_errors = f" ({abs(moved.difference) / error:.1f} standard errors)" if error else ""
    return f"{verb} from {moved.before:.2f} to {moved.after:.2f}{in_errors}"
