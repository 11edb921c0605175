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
    drawn,
    fetch_sdist,
    parse_ratings,
    split_of,
    unseen,
    write_other_domains,
    write_splits,
)
from training.data.preferences import read_rows

TABLE = "1\t2.5\tA  delight.\r\n2\t-1.25\tIn Imax 3 D, the clichés disappear.\r\n3\t-3\ta DELIGHT\r\n"


def test_the_table_is_read_and_the_first_of_a_repeated_text_stays() -> None:
    texts = parse_ratings(TABLE)
    assert texts[1] == RatedText("In Imax 3 D, the clichés disappear.", -1.25)
    assert deduplicate(texts) == [RatedText("A delight.", 2.5), texts[1]]


def test_a_text_is_always_on_the_same_side_however_it_is_written() -> None:
    assert len({split_of(text) for text in ("A delight.", "a  DELIGHT", "a delight!")}) == 1
    sides = [split_of(f"snippet {i}") for i in range(2000)]
    # Binomial: 200 of 2000 expected, standard deviation 13; 60 away has probability below 1e-5.
    assert 140 < sides.count("test") < 260
    assert 140 < sides.count("validation") < 260
    assert sides.count("train") == 2000 - sides.count("test") - sides.count("validation")


def pack(path: Path, files: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a source distribution like the real one; the one snippet of each domain names it."""
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


def test_the_ratings_are_found_in_the_archive_within_the_archive(packed: Path) -> None:
    lines = [line for path in write_splits(packed).values() for line in path.read_text().splitlines()]
    assert sorted(json.loads(line)["rating"] for line in lines) == [-1.25, 2.5]


def test_every_other_domain_has_its_own_snippets(packed: Path) -> None:
    written = write_other_domains(packed)
    texts = {domain: [row.texts for row in read_rows(path)] for domain, path in written.items()}
    assert texts == {domain: [(f"The {domain}.",)] for domain in ("product reviews", "news", "tweets")}


def test_what_was_trained_on_is_known_again_however_it_is_written() -> None:
    assert unseen(["A  DELIGHT!", "no delight"], trained_on=["a delight."]) == [False, True]


def test_the_same_snippets_are_drawn_wherever_they_stand() -> None:
    texts = [f"snippet {i}" for i in range(50)]
    kept = list(itertools.compress(texts, drawn(texts, 10)))
    assert len(kept) == 10
    assert list(itertools.compress(texts[::-1], drawn(texts[::-1], 10))) == kept[::-1]
    assert all(drawn(texts, 60))


def test_another_file_in_the_sdists_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="is not the expected file"):
        fetch_sdist(tmp_path)
