"""The tables of the model card."""

from typing import Any

from scripts import model_card


def scorer(accuracy: float, **by_gap: float) -> dict[str, Any]:
    def figures(percent: float, comparisons: int) -> dict[str, Any]:
        return {"accuracy": percent, "low": percent - 1, "high": percent + 2, "comparisons": comparisons}

    return figures(accuracy, 3000) | {
        "by_gap": {gap.replace("_", " "): figures(percent, 40) for gap, percent in by_gap.items()}
    }


RESULT = {
    "data": {"test_snippets": 1056},
    "test": {"ours": scorer(91.94, **{"0_to_1": 60.0, "1_to_2": 80.38, "2_and_more": 95.0})},
    "other_domains": {
        "news": {
            "snippets": 900,
            "drawn_from": 5000,
            "scorers": {"ours": scorer(70.0, **{"0_to_1": 55.0, "1_to_2": 69.9})},
        }
    },
}


def test_the_accuracy_table_has_intervals_and_the_difference_to_films() -> None:
    films, editorials = model_card.accuracy(RESULT).splitlines()[2:]
    assert films == "| film reviews (test split) | ours | 91.9% (90.9 to 93.9) |  | 60.0% (59.0 to 62.0) |"
    assert editorials == "| news | ours | 70.0% (69.0 to 72.0) | -21.9 | 55.0% (54.0 to 57.0) |"


def test_a_gap_without_pairs_is_marked() -> None:
    heading, _, films, editorials = model_card.by_gap(RESULT).splitlines()
    assert heading == "| snippets | scorer | gap 1 to 2 | gap 2 and more |"
    assert films == "| film reviews (test split) | ours | 80.4% | 95.0% |"
    assert editorials == "| news | ours | 69.9% | no pairs |"


def test_the_counts_table_has_the_numbers_of_snippets_and_pairs() -> None:
    assert model_card.counts(RESULT).splitlines()[2:] == [
        "| film reviews (test split) | 1,056 | 1,056 | 3,000 | 40 |",
        "| news | 900 | 5,000 | 3,000 | 40 |",
    ]
