"""Human ratings of film-review snippets: the data behind the `movie-sentiment` reward model.

10,605 sentences of film reviews, each rated from -4 to 4 by about twenty people (Hutto & Gilbert, "VADER: A
Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014). They travel, under the MIT
licence, inside the source distribution of vaderSentiment 3.3.2; pip fetches it and the digest below pins it.

A snippet goes to train, validation or test by the hash of its text, never by chance or place in the file: however often
the split is made, and whatever pairs are formed afterwards, no snippet is on two sides.

The same people rated snippets of three other domains, which nothing here is trained on: they tell how far the taste
learnt from films carries.
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
"""Domain -> its table in the archive."""


@dataclass(frozen=True, slots=True)
class RatedText:
    """A text and its mean rating, -4 (extremely negative) to 4 (extremely positive)."""

    text: str
    rating: float


def fetch_sdist(directory: Path) -> Path:
    """The source distribution, from what pip is configured with, into `directory` (made if need be) unless it is there.

    Raises:
        RuntimeError: pip could not fetch it, or what came is not the pinned file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "vaderSentiment-3.3.2.tar.gz"
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        try:
            subprocess.run([*command, "--dest", str(directory), REQUIREMENT], check=True)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"pip could not download {REQUIREMENT}; its own message stands above") from error
    digest = sha256_of(path)
    if digest != SDIST_SHA256:
        raise RuntimeError(f"{path} is not the expected file (sha256 {digest}); delete it and run again")
    return path


def read_sdist(path: Path, domain: str) -> list[RatedText]:
    """The rated snippets of a domain, each text once."""
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
    """The first of every text; texts are the same if they differ in case, spaces and punctuation only."""
    first: dict[str, RatedText] = {}
    for rated in texts:
        first.setdefault(_normalised(rated.text), rated)
    return list(first.values())


def split_of(text: str) -> str:
    """Of all texts a tenth is "test", a tenth "validation" and the rest "train"; depends on the text alone."""
    return {0: "test", 1: "validation"}.get(_hash(text) % 10, "train")


def drawn(texts: list[str], count: int) -> list[bool]:
    """For each text whether it is among the `count` drawn by hash: always the same, wherever they stand in the file."""
    chosen = set(sorted(range(len(texts)), key=lambda place: _hash(texts[place]))[:count])
    return [place in chosen for place in range(len(texts))]


def unseen(texts: Iterable[str], trained_on: Iterable[str]) -> list[bool]:
    """For each text whether it is none of those trained on, in whatever case and punctuation."""
    trained = {_normalised(text) for text in trained_on}
    return [_normalised(text) not in trained for text in texts]


def write_splits(directory: Path) -> dict[str, Path]:
    """train.jsonl, validation.jsonl and test.jsonl of {"text", "rating"} in `directory`, by name of the split."""
    texts = read_sdist(fetch_sdist(directory), FILMS)
    return {
        split: _write(directory / f"{split}.jsonl", [rated for rated in texts if split_of(rated.text) == split])
        for split in ("train", "validation", "test")
    }


def write_other_domains(directory: Path) -> dict[str, Path]:
    """The same for each other domain, whole, by its name."""
    sdist = fetch_sdist(directory)
    return {
        domain: _write(directory / f"{domain.replace(' ', '-')}.jsonl", read_sdist(sdist, domain))
        for domain in OTHER_DOMAINS
    }


def _write(path: Path, texts: list[RatedText]) -> Path:
    path.write_text("".join(json.dumps({"text": t.text, "rating": t.rating}) + "\n" for t in texts))
    return path


def _hash(text: str) -> int:
    return text_hash(_normalised(text))


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
