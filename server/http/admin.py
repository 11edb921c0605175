"""`POST /admin/adapter`: loads a LoRA adapter into the running server."""

import logging
from pathlib import Path

from fastapi import Request, Response

from server.errors import BadRequestError
from server.http.body import BodyReader
from server.http.errors import json_response
from server.http.lifespan import Lifecycle
from server.schemas.requests import AdapterRequest
from server.schemas.responses import AdapterReply

log = logging.getLogger("nbest")


class AdminEndpoints:
    """Loads adapters from below `adapter_root`."""

    def __init__(self, lifecycle: Lifecycle, adapter_root: Path, body: BodyReader) -> None:
        self._lifecycle = lifecycle
        self._adapter_root = adapter_root
        self._body = body

    async def load_adapter(self, request: Request) -> Response:
        """Loads a LoRA adapter for all later requests; requests in flight keep the weights they began with."""
        body = await self._body.read(request, AdapterRequest)
        path = below(self._adapter_root, body.path)
        version = await self._lifecycle.pipeline.generator.load_adapter(str(path))
        log.warning("The server now uses the adapter %s, version %s.", path, version)
        return json_response(AdapterReply(path=str(path), version=version))


def below(root: Path, path: str) -> Path:
    """The path of an adapter below `root`; a relative path is relative to `root`.

    Raises:
        BadRequestError: the path leads out of `root`, by `..` or by a link.
    """
    if "\0" not in path and (root / path).resolve().is_relative_to(root.resolve()):
        return root / path
    raise BadRequestError("The adapter is not below --adapter-root; move it there.", param="path")
