"""Serves the files of the playground: from memory, at their exact paths, and without an API key.

The page holds no data: it uses the public API only, and asks the user for a key where the server requires one. Its
Content-Security-Policy allows scripts, styles and connections of this server only: no inline code, no other host, and
no embedding in a frame. So even if the text of a model were ever parsed as markup, it could run no script and send
nothing to another host.
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
    """The content of a file and its media type."""

    content: bytes
    media_type: str


def _path(file: Path) -> str:
    return ROOT if file.name == "index.html" else f"/{file.parent.name}/{file.name}"


FILES = {
    _path(file): File(file.read_bytes(), MEDIA_TYPES[file.suffix])
    for file in sorted((Path(__file__).parents[1] / "playground").iterdir())
    if file.suffix in MEDIA_TYPES
}
"""The files by URL path."""


def endpoint_of(file: File) -> Callable[[], Awaitable[Response]]:
    """The route handler of this file."""

    async def page() -> Response:
        """The playground: a page that sends a request and shows its candidates, rewards and winner."""
        return Response(file.content, media_type=file.media_type, headers=HEADERS)

    return page
