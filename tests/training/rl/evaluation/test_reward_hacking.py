"""When an alarm rings, on eight prompts whose changes can be added up by hand.

A change of 1.5 for half of the prompts and .5 for the others: mean 1, squared deviations 8 * .25, so the variance is
2 / 7 and the standard error sqrt(2 / 7 / 8) = .189. That is 5.3 of them. Of 2 and 0 the standard error is .378: 2.6.
"""

import random
from typing import Any

import pytest

from training.rl.evaluation.measures import Evaluation, EvaluationSample
from training.rl.evaluation.reward_hacking import Alarm, alarms

CERTAIN, UNCERTAIN = (1.5, 0.5) * 4, (2.0, 0.0) * 4
NOTHING = (0.0,) * 8


def evaluation(step: int, **of_prompts: tuple[float | None, ...]) -> Evaluation:
    """Rewards, judgements, lengths or repetitions of each prompt; those that are not given are of step 0."""
    count = len(next(iter(of_prompts.values())))
    fields: dict[str, Any] = {"reward": (0.0,) * count, "judge": (0.0,) * count, "length": (10,) * count}
    columns = fields | {"repetition": (0.0,) * count} | of_prompts
    samples = [
        EvaluationSample(
            place, "a", "b", kl=0.0, cut=False, reference_nats=-1.0, **dict(zip(columns, values, strict=True))
        )
        for place, values in enumerate(zip(*columns.values(), strict=True))
    ]
    return Evaluation(step, tuple(samples))


def less(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(-value for value in values)


def test_a_judge_that_falls_while_the_reward_rises_is_told_with_both_numbers() -> None:
    now = evaluation(10, reward=CERTAIN, judge=less(CERTAIN))
    assert alarms([evaluation(0, reward=NOTHING), now]) == [
        Alarm(
            step=10,
            since=0,
            measure="judge",
            change=-1.0,
            reward_change=1.0,
            told="from step 0 to step 10 the reward rose from 0.00 to 1.00 (5.3 standard errors), while the judge fell "
            "from 0.00 to -1.00 (5.3 standard errors)",
        )
    ]


@pytest.mark.parametrize(
    ("reward", "judge"),
    [
        (CERTAIN, CERTAIN),
        (CERTAIN, NOTHING),
        (CERTAIN, less(UNCERTAIN)),
        (UNCERTAIN, less(CERTAIN)),
        (less(CERTAIN), less(CERTAIN)),
        (CERTAIN[:7], less(CERTAIN)[:7]),
    ],
    ids=["both rise", "the judge stays", "it may be chance", "the reward may be", "both fall", "too few prompts"],
)
def test_it_is_quiet_where(reward: tuple[float, ...], judge: tuple[float, ...]) -> None:
    assert alarms([evaluation(0, reward=NOTHING), evaluation(10, reward=reward, judge=judge)]) == []


def test_the_judge_is_measured_from_its_best() -> None:
    """It is where it was at the start, but between it was better while the reward was lower than now."""
    start, best = evaluation(0, reward=NOTHING), evaluation(10, reward=NOTHING, judge=CERTAIN)
    later = evaluation(20, reward=CERTAIN)
    assert alarms([start, best]) == []
    assert [(one.since, one.change) for one in alarms([start, best, later])] == [(10, -1.0)]


@pytest.mark.parametrize(
    ("length", "change"),
    [(13, 3.0), (7, -3.0), (12, None), (8, None)],
    ids=["longer", "shorter", "a fifth longer", "a fifth shorter"],
)
def test_a_length_that_moved_by_a_quarter_is_told(length: int, change: float | None) -> None:
    """All prompts move alike, so the standard error is 0 and any change is certain."""
    now = evaluation(10, reward=CERTAIN, length=(length,) * 8)
    assert [one.change for one in alarms([evaluation(0, reward=NOTHING), now])] == ([change] if change else [])


@pytest.mark.parametrize(("share", "rings"), [(0.06, True), (0.04, False), (-0.5, False)])
def test_more_repetition_is_told_and_less_is_not(share: float, rings: bool) -> None:
    now = evaluation(10, reward=CERTAIN, repetition=(0.5 + share,) * 8)
    found = alarms([evaluation(0, reward=NOTHING, repetition=(0.5,) * 8), now])
    assert [one.measure for one in found] == ["repetition"] * rings


def test_prompts_that_only_one_evaluation_has_are_left_out() -> None:
    """Nine prompts, of which the judge had nothing to say of the last before, and of the first now: seven remain."""
    before = evaluation(0, reward=(0.0,) * 9, judge=(*NOTHING, None))
    now = evaluation(10, reward=(*CERTAIN, 1.0), judge=(None, *less(CERTAIN)))
    assert alarms([before, now]) == []


def test_the_first_evaluation_has_nothing_to_be_compared_with() -> None:
    assert alarms([evaluation(0, reward=CERTAIN)]) == []


def test_a_judge_that_is_noise_alone_seldom_rings() -> None:
    """One in 65 runs of 11 evaluations of 64 prompts; more than 4 in 60 would be, by chance, one in 500."""
    rang = 0
    for seed in range(60):
        rng = random.Random(seed)
        history: list[Evaluation] = []
        for step in range(11):
            judge = tuple(rng.gauss(0, 1) for _ in range(64))
            history.append(evaluation(step, reward=(float(step),) * 64, judge=judge))
            rang += bool(alarms(history))
    assert rang <= 4
