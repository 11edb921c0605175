"""Builds docs/ as a web site with Zensical, in build/site/html.

    python -m scripts.site            # or: make site
    python -m scripts.site --check    # prints nothing unless a link, an anchor or a file is missing (in make check)

Pages link to repository files outside docs/ by relative paths, as GitHub needs it, and Zensical reads one folder. The
pages are therefore copied to build/site/pages together with every file that they link to, directly or through another
page, and each link is rewritten to the copy: docs/X becomes X, and any other file F becomes repository/F.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "site"
CONFIG = "zensical.toml"

LINK = re.compile(r"(?P<before>\]\(|<img src=\")(?P<path>[^)#\":\s]+)(?=[)#\"])")
CODE_BLOCK = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
FOREIGN = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*\s(?:src|href)=\"((?:https?:)?//[^\"]+)")


class BrokenSiteError(Exception):
    """A broken link or anchor, a page outside the navigation, or something loaded from another host."""


def copy_of(file: Path, root: Path) -> Path:
    """The path of a repository file in the site, relative to its pages folder."""
    docs = root / "docs"
    return file.relative_to(docs) if file.is_relative_to(docs) else "repository" / file.relative_to(root)


def collect(root: Path) -> dict[Path, str | None]:
    """Every file of the site -> the text of a page with its links rewritten, or None for a file that is copied as is.

    Raises BrokenSiteError where a page links to a file that does not exist.
    """
    files: dict[Path, str | None] = {}
    waiting = [path for path in (root / "docs").rglob("*") if path.is_file()]
    while waiting:
        file = waiting.pop()
        if file not in files:
            files[file], linked = _rewrite(file, root) if file.suffix == ".md" else (None, [])
            waiting += linked
    return files


def _rewrite(page: Path, root: Path) -> tuple[str, list[Path]]:
    linked: list[Path] = []

    def to_copy(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / link["path"]))
        if not target.is_file():
            raise BrokenSiteError(f"{page.relative_to(root)} links to {link['path']}, which is not a file.")
        linked.append(target)
        return link["before"] + os.path.relpath(copy_of(target, root), copy_of(page, root).parent)

    parts = CODE_BLOCK.split(page.read_text())
    return "".join(part if part.startswith("```") else LINK.sub(to_copy, part) for part in parts), linked


def pages_of(nav: Any) -> Iterator[str]:
    """The pages of a navigation tree, in reading order."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages_of(part)


def differences_to_nav(nav: Any, pages: Iterable[str]) -> list[str]:
    """Pages of docs/ that the navigation lacks, and pages that only the navigation has.

    The navigation lists the index of the decision records, and the index lists the records.
    """
    listed, present = set(pages_of(nav)), set(pages)
    expected = {page for page in present if not page.startswith(("repository/", "decisions/0"))}
    return [
        *(f"{CONFIG}: nav lists {page}, which is no page that docs/ links to." for page in sorted(listed - present)),
        *(f"{CONFIG}: nav does not list {page}." for page in sorted(expected - listed)),
    ]


def loads_from_other_hosts(html: Path) -> Iterator[str]:
    """Every page that makes a browser load something from another host, with the address."""
    for page in sorted(html.rglob("*.html")):
        for address in FOREIGN.findall(page.read_text()):
            yield f"{page.relative_to(html)} loads {address}"


def build(root: Path, site: Path) -> str:
    """Builds the site and returns Zensical's report; raises BrokenSiteError with the reasons."""
    files = collect(root)
    nav = tomllib.loads((root / CONFIG).read_text())["project"]["nav"]
    pages = [copy_of(file, root).as_posix() for file, text in files.items() if text is not None]
    if differences := differences_to_nav(nav, pages):
        raise BrokenSiteError("\n".join(differences))
    shutil.rmtree(site, ignore_errors=True)
    for file, text in files.items():
        copy = site / "pages" / copy_of(file, root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            shutil.copyfile(file, copy)
        else:
            copy.write_text(text)
    shutil.copyfile(root / CONFIG, site / CONFIG)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(command, cwd=site, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    report = built.stdout + built.stderr.partition("Traceback")[0]
    if built.returncode:
        raise BrokenSiteError(report)
    if foreign := list(loads_from_other_hosts(site / "html")):
        raise BrokenSiteError("\n".join(foreign))
    return report


def main() -> None:
    """Builds the site; ends with 1 and the reasons where it is not whole."""
    try:
        report = build(ROOT, SITE)
    except BrokenSiteError as error:
        sys.exit(str(error))
    if "--check" not in sys.argv[1:]:
        print(report.strip())
        print(f"To read it, with search: python -m http.server --directory {SITE.relative_to(ROOT)}/html")


if __name__ == "__main__":
    main()
