"""Configures logging: lines of text for people or of JSON for machines, each with the id of its request.

The id comes from `server.observability.request_context`, by a filter on the handler, so the lines of libraries have it
too. The logger `nbest.access` writes one line for each request, at level info, or debug for a probe. The processes of
the engine write their own lines.
"""

import logging
import os
import sys
from typing import Literal, TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from server.observability.request_context import PROBES, RequestRecord, current

LogFormat = Literal["text", "json"]

LOG_WHOLE_REQUESTS = ("openai",)
"""Libraries that log whole requests, including prompts, at level debug; their level is never set below info."""

FIELDS_OF_LIBRARIES = ("color_message", "vllm_process_name")
"""Fields that uvicorn and vLLM add to lines and that JSON lines omit: a copy of the message, and the process name."""

access = logging.getLogger("nbest.access")


def configure(level: str, log_format: LogFormat, stream: TextIO | None = None) -> None:
    """Writes the log lines of this process to `stream`, by default stderr."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.addFilter(_with_request)
    handler.setFormatter(_formatter(log_format))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for library in LOG_WHOLE_REQUESTS:
        logging.getLogger(library).setLevel(max(logging.INFO, logging.getLevelNamesMapping()[level.upper()]))
    if log_format == "json":
        logging.captureWarnings(True)
        os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")  # otherwise vLLM adds a handler that writes text


def log_access(record: RequestRecord, duration_s: float) -> None:
    """Writes the line of a request that has ended; it never contains a text, an address or a raw path."""
    level = logging.DEBUG if record.endpoint in PROBES else logging.INFO
    if not access.isEnabledFor(level):
        return
    fields: dict[str, object] = {
        "method": record.method,
        "endpoint": record.endpoint,
        "status": record.status,
        "duration_s": round(duration_s, 6),
    }
    if (cost := record.tokens) is not None:
        fields |= {
            "prompt_tokens": cost.prompt,
            "generated_tokens": cost.generated,
            "scored_tokens": cost.scored,
        }
    access.log(level, " ".join(f"{name}={value}" for name, value in fields.items()), extra=fields)


def _formatter(log_format: LogFormat) -> logging.Formatter:
    if log_format == "json":
        return JsonFormatter(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "traceback"},
            reserved_attrs=[*RESERVED_ATTRS, *FIELDS_OF_LIBRARIES],
            timestamp="time",
        )
    return logging.Formatter("%(levelname)s %(name)s [%(request_id)s]: %(message)s", defaults={"request_id": "-"})


def _with_request(line: logging.LogRecord) -> bool:
    if (record := current()) is not None:
        line.request_id = record.request_id
        if record.trace_id is not None:
            line.trace_id = record.trace_id
    return True
