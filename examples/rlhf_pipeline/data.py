"""What people said, as data to train on: demonstrations, preferences, and prompts.

People rated sentences of film reviews from -4 to 4 (`benchmarks.movie_ratings`). One that they rated well is a
demonstration: its first words are the prompt, the rest is what the policy is to say. Two whose ratings are apart are a
preference. Prompts are first words of a film review, some to train on and others to measure on; no sentence that begins
like one of the latter is trained on at all.
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
from training.atomic_directory import appearing_whole
from training.checkpoints import require_same_run, write_run

Rows = list[dict[str, Any]]

WELL_RATED = 1.0
MIN_GAP = 1.0
"""Between the ratings of a pair: with about twenty raters closer ones say little."""
PROMPT_WORDS, MIN_WORDS = 3, 8
"""Of a demonstration."""


def write_data(directory: Path, size: Size, *, dtype: str, seed: int) -> None:
    """The files of a run, whole or not at all, with what the run is; or a comparison with what it was begun as.

    Raises:
        CheckpointError: `directory` belongs to another run.
        RuntimeError: the ratings could not be fetched.
    """
    run = asdict(size) | {"dtype": dtype, "seed": seed}
    if directory.is_dir():
        require_same_run(directory, run)
        return
    with appearing_whole(directory) as unfinished:
        held_out = film_reviews.OPENINGS[: size.held_out_prompts]
        rated = read_sdist(fetch_sdist(unfinished), FILMS)
        train = unlike([text for text in rated if split_of(text.text) == "train"], held_out)
        test = [text for text in rated if split_of(text.text) == "test"]
        files = {
            "demonstrations": demonstrations(train, size.demonstrations, seed),
            "preferences": preferences(train, size.pairs, seed),
            "test-preferences": preferences(test, size.test_pairs, seed),
            "prompts": [{"prompt": one} for one in training_openings.OPENINGS[: size.training_prompts]],
            "held-out-prompts": [{"prompt": one} for one in held_out],
        }
        for name, rows in files.items():
            (unfinished / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_run(unfinished, run)


def unlike(texts: Iterable[RatedText], openings: Sequence[str]) -> list[RatedText]:
    """The texts that begin like none of the openings."""
    begun = tuple(opening.casefold() for opening in openings)
    return [text for text in texts if not text.text.casefold().startswith(begun)]


def demonstrations(texts: Iterable[RatedText], count: int, seed: int) -> Rows:
    """Up to `count` of the well rated, in TRL's columns."""
    well_rated = [text.text.split() for text in texts if text.rating >= WELL_RATED]
    long_enough = [words for words in well_rated if len(words) >= MIN_WORDS]
    return [
        {"prompt": " ".join(words[:PROMPT_WORDS]), "completion": " " + " ".join(words[PROMPT_WORDS:])}
        for words in Random(seed).sample(long_enough, min(count, len(long_enough)))
    ]


def preferences(texts: Iterable[RatedText], count: int, seed: int) -> Rows:
    """Up to `count` pairs of texts that people rated apart, in TRL's columns; no text is in two pairs."""
    shuffled = list(texts)
    Random(seed).shuffle(shuffled)
    pairs = zip(shuffled[::2], shuffled[1::2], strict=False)
    apart = [sorted(pair, key=lambda text: -text.rating) for pair in pairs if gap(*pair) >= MIN_GAP]
    return [{"chosen": better.text, "rejected": worse.text} for better, worse in apart[:count]]


def gap(one: RatedText, other: RatedText) -> float:
    return abs(one.rating - other.rating)
