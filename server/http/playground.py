"""The files of the playground and how they are served: from memory, by their exact names, and open to anyone.

The page holds no data. It asks for the key where one is needed, and for everything else the public API. Its policy lets
it load scripts and styles from here and talk to here, and nothing else: no inline code, no other host, no frame round
it. So a text of a model that should ever be taken for markup could neither run nor tell anyone.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from fastapi import Response

ROOT = "/"
MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{directive} {sources}" for directive, sources in POLICY.items()),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class File(NamedTuple):
    """A file as it is sent."""

    content: bytes
    media_type: str


def _path(file: Path) -> str:
    return ROOT if file.name == "index.html" else f"/{file.parent.name}/{file.name}"


FILES = {
    _path(file): File(file.read_bytes(), MEDIA_TYPES[file.suffix])
    for file in sorted((Path(__file__).parents[1] / "playground").iterdir())
    if file.suffix in MEDIA_TYPES
}
"""Path -> file."""


def endpoint_of(file: File) -> Callable[[], Awaitable[Response]]:
    """The route handler of this file."""

    async def page() -> Response:
        """The playground, a page that shows best-of-N at work."""
        return Response(file.content, media_type=file.media_type, headers=HEADERS)

    return page
