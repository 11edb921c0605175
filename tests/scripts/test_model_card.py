"""The card's tables say what was measured, and nothing where nothing was."""

from typing import Any

from scripts import model_card


def measured(accuracy: float, **by_gap: float) -> dict[str, Any]:
    def one(percent: float, comparisons: int) -> dict[str, Any]:
        return {"accuracy": percent, "low": percent - 1, "high": percent + 2, "comparisons": comparisons}

    return one(accuracy, 3000) | {
        "by_gap": {gap.replace("_", " "): one(percent, 40) for gap, percent in by_gap.items()}
    }


FOUND = {
    "data": {"test_snippets": 1056},
    "test": {"ours": measured(91.94, **{"0_to_1": 60.0, "1_to_2": 80.38, "2_and_more": 95.0})},
    "other_domains": {
        "news": {
            "snippets": 900,
            "drawn_from": 5000,
            "scorers": {"ours": measured(70.0, **{"0_to_1": 55.0, "1_to_2": 69.9})},
        }
    },
}


def test_every_data_set_is_told_with_its_intervals_and_its_distance_from_films() -> None:
    films, news = model_card.accuracy(FOUND).splitlines()[2:]
    assert films == "| film reviews (test split) | ours | 91.9% (90.9 to 93.9) |  | 60.0% (59.0 to 62.0) |"
    assert news == "| news | ours | 70.0% (69.0 to 72.0) | -21.9 | 55.0% (54.0 to 57.0) |"


def test_a_gap_that_no_pair_has_is_told_as_such() -> None:
    heading, _, films, news = model_card.by_gap(FOUND).splitlines()
    assert heading == "| snippets | scorer | gap 1 to 2 | gap 2 and more |"
    assert films == "| film reviews (test split) | ours | 80.4% | 95.0% |"
    assert news == "| news | ours | 69.9% | no pairs |"


def test_the_numbers_of_snippets_and_pairs_are_told() -> None:
    assert model_card.counts(FOUND).splitlines()[2:] == [
        "| film reviews (test split) | 1,056 | 1,056 | 3,000 | 40 |",
        "| news | 900 | 5,000 | 3,000 | 40 |",
    ]
