"""The tables of movie-sentiment's model card, from the result of `python -m benchmarks.movie_sentiment`."""

from typing import Any

from reranker.markdown import table

FILMS = "film reviews (test split)"
CLOSE = "0 to 1"


def accuracy(result: dict[str, Any]) -> str:
    """Every scorer's accuracy on every data set, and its difference to the accuracy on films."""
    films = data_sets(result)[FILMS]["scorers"]
    rows = [
        (
            name,
            scorer,
            interval(figures),
            difference(figures, films[scorer]),
            interval(figures["by_gap"].get(CLOSE)),
        )
        for name, data_set in data_sets(result).items()
        for scorer, figures in data_set["scorers"].items()
    ]
    return table(("snippets", "scorer", "gap 1 and more", "points against films", "gap below 1"), rows)


def by_gap(result: dict[str, Any]) -> str:
    """Every scorer's accuracy by the gap between the ratings."""
    gaps = [gap for gap in next(iter(result["test"].values()))["by_gap"] if gap != CLOSE]
    rows = [
        (name, scorer, *(percent(figures["by_gap"].get(gap)) for gap in gaps))
        for name, data_set in data_sets(result).items()
        for scorer, figures in data_set["scorers"].items()
    ]
    return table(("snippets", "scorer", *(f"gap {gap}" for gap in gaps)), rows)


def counts(result: dict[str, Any]) -> str:
    """The numbers of snippets and pairs of every data set."""
    rows = []
    for name, data_set in data_sets(result).items():
        figures = next(iter(data_set["scorers"].values()))
        close = figures["by_gap"][CLOSE]["comparisons"]
        numbers = (data_set["snippets"], data_set["drawn_from"], figures["comparisons"], close)
        rows.append((name, *(f"{number:,}" for number in numbers)))
    return table(("snippets from", "measured on", "drawn from", "pairs, gap 1 and more", "pairs, gap below 1"), rows)


def data_sets(result: dict[str, Any]) -> dict[str, Any]:
    count = result["data"]["test_snippets"]
    films = {"snippets": count, "drawn_from": count, "scorers": result["test"]}
    return {FILMS: films, **result["other_domains"]}


def interval(figures: dict[str, float] | None) -> str:
    return f"{figures['accuracy']:.1f}% ({figures['low']:.1f} to {figures['high']:.1f})" if figures else "no pairs"


def percent(figures: dict[str, float] | None) -> str:
    return f"{figures['accuracy']:.1f}%" if figures else "no pairs"


def difference(figures: dict[str, float], on_films: dict[str, float]) -> str:
    return "" if figures is on_films else f"{figures['accuracy'] - on_films['accuracy']:+.1f}"
