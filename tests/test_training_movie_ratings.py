import io
import tarfile
from pathlib import Path

import pytest

from training.movie_ratings import RatedText, deduplicate, fetch_sdist, parse_ratings, read_sdist, split_of

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


def pack(path: Path, name: str, content: bytes) -> bytes:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


def test_the_ratings_are_found_in_the_archive_within_the_archive(tmp_path: Path) -> None:
    inner = pack(tmp_path / "inner", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", TABLE.encode())
    pack(tmp_path / "outer", "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner)
    assert [rated.rating for rated in read_sdist(tmp_path / "outer")] == [2.5, -1.25]


def test_another_file_in_the_sdists_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="is not the expected file"):
        fetch_sdist(tmp_path)
