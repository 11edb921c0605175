import hashlib
import io
import itertools
import json
import tarfile
from pathlib import Path

import pytest

import benchmarks.movie_ratings
from benchmarks.movie_ratings import (
    FILMS,
    MEMBERS,
    RatedText,
    deduplicate,
    fetch_sdist,
    parse_ratings,
    sampled,
    split_of,
    unseen,
    write_other_domains,
    write_splits,
)
from training.data.preferences import read_rows

TABLE = "1\t2.5\tA  delight.\r\n2\t-1.25\tIn Imax 3 D, the clichés disappear.\r\n3\t-3\ta DELIGHT\r\n"


def test_parsing_a_table_keeps_the_first_of_repeated_texts() -> None:
    texts = parse_ratings(TABLE)
    assert texts[1] == RatedText("In Imax 3 D, the clichés disappear.", -1.25)
    assert deduplicate(texts) == [RatedText("A delight.", 2.5), texts[1]]


def test_the_split_of_a_text_ignores_case_spaces_and_punctuation() -> None:
    assert len({split_of(text) for text in ("A delight.", "a  DELIGHT", "a delight!")}) == 1
    splits = [split_of(f"snippet {i}") for i in range(2000)]
    # Binomial: 200 of 2000 expected, standard deviation 13; a deviation of 60 has probability below 1e-5.
    assert 140 < splits.count("test") < 260
    assert 140 < splits.count("validation") < 260
    assert splits.count("train") == 2000 - splits.count("test") - splits.count("validation")


def pack(path: Path, files: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a source distribution like the real one; each domain has one snippet, which names the domain."""
    tables = {
        f"hutto_ICWSM_2014/{member}_GroundTruth.txt": TABLE if domain == FILMS else f"1_1\t-0.5\tThe {domain}.\r\n"
        for domain, member in MEMBERS.items()
    }
    inner = pack(tmp_path / "inner", {name: table.encode() for name, table in tables.items()})
    sdist = pack(
        tmp_path / "vaderSentiment-3.3.2.tar.gz",
        {"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner},
    )
    monkeypatch.setattr(benchmarks.movie_ratings, "SDIST_SHA256", hashlib.sha256(sdist).hexdigest())
    return tmp_path


def test_ratings_are_read_from_the_archive_inside_the_archive(packed: Path) -> None:
    lines = [line for path in write_splits(packed).values() for line in path.read_text().splitlines()]
    assert sorted(json.loads(line)["rating"] for line in lines) == [-1.25, 2.5]


def test_every_other_domain_has_its_own_snippets(packed: Path) -> None:
    written = write_other_domains(packed)
    texts = {domain: [row.texts for row in read_rows(path)] for domain, path in written.items()}
    assert texts == {domain: [(f"The {domain}.",)] for domain in ("product reviews", "news", "tweets")}


def test_unseen_ignores_case_spaces_and_punctuation() -> None:
    assert unseen(["A  DELIGHT!", "no delight"], trained_on=["a delight."]) == [False, True]


def test_the_sample_does_not_depend_on_the_order_of_the_texts() -> None:
    texts = [f"snippet {i}" for i in range(50)]
    kept = list(itertools.compress(texts, sampled(texts, 10)))
    assert len(kept) == 10
    assert list(itertools.compress(texts[::-1], sampled(texts[::-1], 10))) == kept[::-1]
    assert all(sampled(texts, 60))


def test_a_source_distribution_with_another_digest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="has an unexpected digest"):
        fetch_sdist(tmp_path)
