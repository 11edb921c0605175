import pytest

from benchmarks.rl_learner_throughput import shares


def test_the_seconds_of_readings_are_spread_over_the_passes_that_follow_them() -> None:
    """8 s a bare pass; the learner's takes 8 s after 2 s of readings: 1 alone, 8/10 for one pass, 32/34 for four.

    The second round takes twice as long, which halves the shares.
    """
    seconds = [{"bare": 8.0, "pass": 8.0, "readings": 2.0}, {"bare": 8.0, "pass": 16.0, "readings": 4.0}]
    alone = shares(seconds, passes=1, readings=False)
    assert alone == {"median": 0.75, "low": 0.5, "high": 1.0, "rounds": 2}
    assert shares(seconds, passes=1, readings=True)["high"] == pytest.approx(0.8)
    assert shares(seconds, passes=4, readings=True)["high"] == pytest.approx(32 / 34)
