"""The tables of movie-sentiment's model card, from the figures that `python -m benchmarks.movie_sentiment` measured."""

from typing import Any

from scripts.markdown import table

FILMS = "film reviews (test split)"
CLOSE = "0 to 1"


def accuracy(found: dict[str, Any]) -> str:
    """Every scorer on every data set, and how far from its own figure on films."""
    films = data_sets(found)[FILMS]["scorers"]
    rows = [
        (name, scorer, interval(one), away(one, films[scorer]), interval(one["by_gap"].get(CLOSE)))
        for name, measured in data_sets(found).items()
        for scorer, one in measured["scorers"].items()
    ]
    return table(("snippets", "scorer", "gap 1 and more", "points against films", "gap below 1"), rows)


def by_gap(found: dict[str, Any]) -> str:
    """How the share grows with the gap."""
    gaps = [gap for gap in next(iter(found["test"].values()))["by_gap"] if gap != CLOSE]
    rows = [
        (name, scorer, *(percent(one["by_gap"].get(gap)) for gap in gaps))
        for name, measured in data_sets(found).items()
        for scorer, one in measured["scorers"].items()
    ]
    return table(("snippets", "scorer", *(f"gap {gap}" for gap in gaps)), rows)


def counts(found: dict[str, Any]) -> str:
    """What the shares stand on."""
    rows = []
    for name, measured in data_sets(found).items():
        one = next(iter(measured["scorers"].values()))
        close = one["by_gap"][CLOSE]["comparisons"]
        told = (measured["snippets"], measured["drawn_from"], one["comparisons"], close)
        rows.append((name, *(f"{count:,}" for count in told)))
    return table(("snippets from", "measured on", "drawn from", "pairs, gap 1 and more", "pairs, gap below 1"), rows)


def data_sets(found: dict[str, Any]) -> dict[str, Any]:
    count = found["data"]["test_snippets"]
    films = {"snippets": count, "drawn_from": count, "scorers": found["test"]}
    return {FILMS: films, **found["other_domains"]}


def interval(one: dict[str, float] | None) -> str:
    return f"{one['accuracy']:.1f}% ({one['low']:.1f} to {one['high']:.1f})" if one else "no pairs"


def percent(one: dict[str, float] | None) -> str:
    return f"{one['accuracy']:.1f}%" if one else "no pairs"


def away(one: dict[str, float], on_films: dict[str, float]) -> str:
    return "" if one is on_films else f"{one['accuracy'] - on_films['accuracy']:+.1f}"
