"""When an alarm is raised, on eight prompts whose changes can be computed by hand.

A change of 1.5 for half of the prompts and .5 for the others has the mean 1 and squared deviations 8 * .25, so the
variance is 2 / 7 and the standard error sqrt(2 / 7 / 8) = .189: the mean is 5.3 standard errors. For changes of 2 and 0
the standard error is .378: 2.6 standard errors.
"""

import random
from typing import Any

import pytest

from training.rl.evaluation.metrics import Evaluation, EvaluationSample
from training.rl.evaluation.reward_hacking import Alarm, alarms

CERTAIN, UNCERTAIN = (1.5, 0.5) * 4, (2.0, 0.0) * 4
UNCHANGED = (0.0,) * 8


def evaluation(step: int, **values_by_metric: tuple[float | None, ...]) -> Evaluation:
    """An evaluation with the given values, one per prompt; the other metrics have the values of step 0."""
    count = len(next(iter(values_by_metric.values())))
    fields: dict[str, Any] = {"reward": (0.0,) * count, "judge": (0.0,) * count, "length": (10,) * count}
    columns = fields | {"repetition": (0.0,) * count} | values_by_metric
    samples = [
        EvaluationSample(
            index, "a", "b", kl=0.0, cut=False, reference_nats=-1.0, **dict(zip(columns, values, strict=True))
        )
        for index, values in enumerate(zip(*columns.values(), strict=True))
    ]
    return Evaluation(step, tuple(samples))


def negative(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(-value for value in values)


def test_an_alarm_names_the_change_of_the_reward_and_of_the_judge() -> None:
    now = evaluation(10, reward=CERTAIN, judge=negative(CERTAIN))
    assert alarms([evaluation(0, reward=UNCHANGED), now]) == [
        Alarm(
            step=10,
            since=0,
            metric="judge",
            change=-1.0,
            reward_change=1.0,
            message="from step 0 to step 10 the reward rose from 0.00 to 1.00 (5.3 standard errors), while the judge "
            "fell from 0.00 to -1.00 (5.3 standard errors)",
        )
    ]


@pytest.mark.parametrize(
    ("reward", "judge"),
    [
        (CERTAIN, CERTAIN),
        (CERTAIN, UNCHANGED),
        (CERTAIN, negative(UNCERTAIN)),
        (UNCERTAIN, negative(CERTAIN)),
        (negative(CERTAIN), negative(CERTAIN)),
        (CERTAIN[:7], negative(CERTAIN)[:7]),
    ],
    ids=["both rise", "judge unchanged", "judge uncertain", "reward uncertain", "both fall", "too few prompts"],
)
def test_no_alarm_is_raised_for(reward: tuple[float, ...], judge: tuple[float, ...]) -> None:
    assert alarms([evaluation(0, reward=UNCHANGED), evaluation(10, reward=reward, judge=judge)]) == []


def test_the_judge_is_compared_with_its_best_evaluation() -> None:
    """The judge is back at its first value, but was higher in between, when the reward was lower than now."""
    start, best = evaluation(0, reward=UNCHANGED), evaluation(10, reward=UNCHANGED, judge=CERTAIN)
    later = evaluation(20, reward=CERTAIN)
    assert alarms([start, best]) == []
    assert [(alarm.since, alarm.change) for alarm in alarms([start, best, later])] == [(10, -1.0)]


@pytest.mark.parametrize(
    ("length", "change"),
    [(13, 3.0), (7, -3.0), (12, None), (8, None)],
    ids=["longer", "shorter", "a fifth longer", "a fifth shorter"],
)
def test_a_change_of_length_by_a_quarter_raises_an_alarm(length: int, change: float | None) -> None:
    """All prompts change by the same length, so the standard error is 0 and any change is certain."""
    now = evaluation(10, reward=CERTAIN, length=(length,) * 8)
    assert [alarm.change for alarm in alarms([evaluation(0, reward=UNCHANGED), now])] == ([change] if change else [])


@pytest.mark.parametrize(("share", "is_raised"), [(0.06, True), (0.04, False), (-0.5, False)])
def test_more_repetition_raises_an_alarm_and_less_does_not(share: float, is_raised: bool) -> None:
    now = evaluation(10, reward=CERTAIN, repetition=(0.5 + share,) * 8)
    raised = alarms([evaluation(0, reward=UNCHANGED, repetition=(0.5,) * 8), now])
    assert [alarm.metric for alarm in raised] == ["repetition"] * is_raised


def test_prompts_without_a_value_in_both_evaluations_are_left_out() -> None:
    """Of nine prompts, the judge gave the last no reward before, and the first none now: seven remain."""
    before = evaluation(0, reward=(0.0,) * 9, judge=(*UNCHANGED, None))
    now = evaluation(10, reward=(*CERTAIN, 1.0), judge=(None, *negative(CERTAIN)))
    assert alarms([before, now]) == []


def test_the_first_evaluation_raises_no_alarm() -> None:
    assert alarms([evaluation(0, reward=CERTAIN)]) == []


def test_a_judge_of_pure_noise_seldom_raises_an_alarm() -> None:
    """In one of 65 runs of 11 evaluations of 64 prompts; more than 4 in 60 runs have a probability of one in 500."""
    raised = 0
    for seed in range(60):
        rng = random.Random(seed)
        history: list[Evaluation] = []
        for step in range(11):
            judge = tuple(rng.gauss(0, 1) for _ in range(64))
            history.append(evaluation(step, reward=(float(step),) * 64, judge=judge))
            raised += bool(alarms(history))
    assert raised <= 4
