"""docs/ builds as a complete site, and the build fails with the name of a broken page or link."""

import shutil
import tomllib
from pathlib import Path

import pytest

from scripts import site
from tests.support.paths import ROOT


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with two pages, a figure outside docs/ and the project's own configuration."""
    root = tmp_path / "repository"
    files = {
        "docs/index.md": "# Start\n\n[More](more.md#details), [log](../LOG.md), ![a figure](../figures/a.png)\n",
        "docs/more.md": "# More\n\n## Details\n\n```\n[no link](nowhere.md)\n```\n",
        "LOG.md": "# Log\n\nSee [more](docs/more.md) and [the result](results/a.json).\n",
        "figures/a.png": "",
        "results/a.json": "{}",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    configuration = (ROOT / site.CONFIG).read_text()
    nav = configuration[configuration.index("nav = ") : configuration.index("[project.theme]")]
    pages = '["index.md", "more.md", "repository/LOG.md"]'
    (root / site.CONFIG).write_text(configuration.replace(nav, f"nav = {pages}\n\n"))
    return root


def test_a_link_leads_to_the_same_file_in_the_site_as_in_the_repository(repository: Path) -> None:
    built = repository / "build"
    site.build(repository, built)
    index, log = ((built / "html" / name).read_text() for name in ("index.html", "repository/LOG.html"))
    assert 'href="more.html#details"' in index
    assert 'src="repository/figures/a.png"' in index
    assert 'href="../more.html"' in log
    assert (built / "html" / "repository" / "figures" / "a.png").is_file()
    assert (built / "html" / "repository" / "results" / "a.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[gone](gone.md)", "docs/more.md links to gone.md, which is not a file."),
        ("[gone](../results/gone.json)", "docs/more.md links to ../results/gone.json, which is not a file."),
        ("[gone](index.md#gone)", "anchor does not exist"),
        ('<img src="http://other.example/a.png">', "more.html loads http://other.example/a.png"),
    ],
)
def test_a_broken_page_fails_the_build_by_name(repository: Path, text: str, reason: str) -> None:
    (repository / "docs" / "more.md").write_text(f"# More\n\n## Details\n\n{text}\n")
    with pytest.raises(site.BrokenSiteError, match=reason.replace(".", r"\.")):
        site.build(repository, repository / "build")


def test_a_page_that_the_navigation_lacks_fails_the_build_by_name(repository: Path) -> None:
    shutil.copyfile(repository / "docs" / "more.md", repository / "docs" / "other.md")
    with pytest.raises(site.BrokenSiteError, match=r"nav does not list other\.md"):
        site.build(repository, repository / "build")


def test_a_page_that_only_the_navigation_has_fails_the_build_by_name(repository: Path) -> None:
    (repository / "docs" / "more.md").unlink()
    (repository / "docs" / "index.md").write_text("# Start\n")
    with pytest.raises(site.BrokenSiteError, match=r"nav lists more\.md"):
        site.build(repository, repository / "build")


def test_the_index_of_decisions_lists_every_record() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "index.md").read_text()
    assert [record.name for record in folder.glob("0*.md") if f"]({record.name})" not in index] == []


def test_the_navigation_lists_a_page_once() -> None:
    pages = list(site.pages_of(tomllib.loads((ROOT / site.CONFIG).read_text())["project"]["nav"]))
    assert len(pages) == len(set(pages))
