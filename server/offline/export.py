"""Converts the results of a run to a file that TRL's trainers load, and writes a data card beside it.

    sft          prompt, completion, finish_reason                                        the winners
    preference   prompt, chosen, rejected, chosen_score, rejected_score, margin, …        pairs of candidates
    raw          custom_id, prompt, completion, reward, index, num_tokens, …              every candidate

Rows are in the order of the input, whatever the order in which they were answered, so the same results give the same
bytes. The rows are generated twice: for the filters (`server.offline.filters`), and to write those that stay. So only a
few bytes per row are held in memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Literal

from reranker.candidate import Prompt
from reranker.fsio import atomic_write
from reranker.prompt_text import prompt_text
from server.offline import data_card
from server.offline.errors import OfflineError
from server.offline.filters import Filters, RowFilter
from server.offline.journal import recover
from server.offline.records import Failure, Result
from server.offline.run_directory import FAILED, RESULTS, locked, manifest
from server.schemas.responses import CandidateReply

Format = Literal["sft", "preference", "raw"]
Pairs = Literal["best-worst", "best-random", "all"]
Form = Literal["as-asked", "conversational", "plain"]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What is exported.

    `form` as-asked keeps conversations as messages and text prompts as text; the others convert all prompts to one
    form. `seed` decides which candidate is the rejected one of a best-random pair.
    """

    format: Format
    pairs: Pairs = "best-worst"
    form: Form = "as-asked"
    filters: Filters = field(default_factory=Filters)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ExportRow:
    """A row before the filters. `reward` is that of the completion or of the chosen completion; pairs have a `margin`.

    `longer` is 1 if the chosen text is longer than the rejected text, -1 if it is shorter, else 0.
    """

    columns: dict[str, Any]
    reward: float | None
    margin: float | None = None
    longer: int = 0


def run_export(directory: Path, out: Path, options: ExportOptions) -> dict[str, int]:
    """Writes the file and its card; returns the number of rows, of those each filter removed, and of those written.

    Raises:
        OfflineError: the directory holds no results, a run is writing to it, or the filters remove every row.
    """
    if options.filters.balance_length and options.format != "preference":
        raise OfflineError("--balance-length compares the two texts of a pair; use it with --format preference")
    if options.filters.min_margin is not None and options.format != "preference":
        raise OfflineError("--min-margin is about pairs; use it with --format preference")
    runs = manifest(directory)["runs"]
    with locked(directory):  # so that no run appends to the results while they are read
        return _export(directory, out, options, runs)


def _export(directory: Path, out: Path, options: ExportOptions, runs: list[dict[str, Any]]) -> dict[str, int]:
    results = _Results(directory / RESULTS)
    row_filter = RowFilter(options.filters)
    prompt_types = set[type]()
    for row in _rows(results, options):
        prompt_types.add(type(row.columns["prompt"]))
        row_filter.add(row.reward, row.margin, row.longer, _digest(row.columns))
    if len(prompt_types) > 1:
        raise OfflineError(
            "Some prompts are conversations and some are texts, and no trainer reads both from one file; give "
            "--form conversational or --form plain"
        )
    is_kept = row_filter.kept()
    if not is_kept.any():
        raise OfflineError(f"The filters remove every row of {directory} ({row_filter.describe_counts()}); loosen them")
    _write(out, (row.columns for kept, row in zip(is_kept, _rows(results, options), strict=True) if kept))
    counts = {**row_filter.counts, "written": int(is_kept.sum())}
    failures = sum(1 for _ in recover(directory / FAILED, Failure))
    data_card.write(
        data_card.path_of(out), out, directory / RESULTS, runs, asdict(options), counts, len(results), failures
    )
    return counts


class _Results:
    """The results of a file in the order of the input; only the byte offset of each is held in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines_and_offsets: list[tuple[int, int]] = []
        offset = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):  # the last line may be incomplete
                        lines_and_offsets.append((Result.model_validate_json(line).line, offset))
                    offset += len(line)
        self._offsets = [offset for _, offset in sorted(lines_and_offsets)]
        if not self._offsets:
            raise OfflineError(f"{path} holds no results; run nbest batch or nbest rerank first")

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[Result]:
        with self._path.open("rb") as file:
            for offset in self._offsets:
                file.seek(offset)
                yield Result.model_validate_json(file.readline())


def _rows(results: _Results, options: ExportOptions) -> Iterator[ExportRow]:
    rows_of = {"sft": _winner, "preference": _pairs, "raw": _candidates}[options.format]
    for result in results:
        yield from rows_of(result, options)


def _winner(result: Result, options: ExportOptions) -> Iterator[ExportRow]:
    prompt, convert = _formatted(result.to_prompt(), options.form)
    winner = result.winner
    columns = {"prompt": prompt, "completion": convert(winner.text), "finish_reason": winner.finish_reason}
    yield ExportRow(columns, winner.reward)


def _pairs(result: Result, options: ExportOptions) -> Iterator[ExportRow]:
    """Pairs of different texts with different rewards; the candidate with the higher reward is chosen."""
    prompt, convert = _formatted(result.to_prompt(), options.form)
    for chosen, rejected in _chosen_and_rejected(result, options):
        better, worse = float(chosen.reward or 0), float(rejected.reward or 0)
        columns = {
            "prompt": prompt,
            "chosen": convert(chosen.text),
            "rejected": convert(rejected.text),
            "chosen_score": better,
            "rejected_score": worse,
            "margin": better - worse,
            "chosen_finish_reason": chosen.finish_reason,
            "rejected_finish_reason": rejected.finish_reason,
        }
        longer = (len(chosen.text) > len(rejected.text)) - (len(chosen.text) < len(rejected.text))
        yield ExportRow(columns, better, better - worse, longer)


def _chosen_and_rejected(result: Result, options: ExportOptions) -> Iterator[tuple[CandidateReply, CandidateReply]]:
    rewarded = [candidate for candidate in result.candidates if candidate.reward is not None]
    ranked = sorted(rewarded, key=lambda candidate: -float(candidate.reward or 0))  # stable: ties by index
    proposed: Iterable[tuple[CandidateReply, CandidateReply]]
    if options.pairs == "all":
        proposed = combinations(ranked, 2)
    else:
        others = [candidate for candidate in ranked[1:] if _differ(ranked[0], candidate)]
        if not others:
            return
        worst = others[-1]
        random = Random(f"{options.seed}:{result.line}").choice(others)
        proposed = [(ranked[0], worst if options.pairs == "best-worst" else random)]
    yield from ((chosen, rejected) for chosen, rejected in proposed if _differ(chosen, rejected))


def _differ(left: CandidateReply, right: CandidateReply) -> bool:
    return left.reward != right.reward and left.text != right.text


def _candidates(result: Result, options: ExportOptions) -> Iterator[ExportRow]:
    prompt, convert = _formatted(result.to_prompt(), options.form)
    for candidate in result.candidates:
        columns = {
            "custom_id": result.custom_id,
            "prompt": prompt,
            "completion": convert(candidate.text),
            "reward": candidate.reward,
            "index": candidate.index,
            "is_winner": candidate.index == result.winner.index,
            "num_tokens": candidate.num_tokens,
            "cumulative_logprob": candidate.cumulative_logprob,
            "finish_reason": candidate.finish_reason,
        }
        yield ExportRow(columns, candidate.reward)


def _formatted(prompt: Prompt, form: Form) -> tuple[Any, Callable[[str], Any]]:
    """The prompt in that form, and the function that converts a completion to the same form."""
    if form == "plain" or (form == "as-asked" and prompt.text is not None):
        return prompt_text(prompt), str
    if prompt.text is not None:
        messages = [{"role": "user", "content": prompt.text}]
    else:
        messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    return messages, lambda text: [{"role": "assistant", "content": text}]


def _digest(columns: dict[str, Any]) -> bytes:
    """A digest of the texts that a trainer reads; rows with the same digest are duplicates."""
    texts = [columns[name] for name in ("prompt", "completion", "chosen", "rejected") if name in columns]
    return hashlib.blake2b(json.dumps(texts, ensure_ascii=False).encode(), digest_size=16).digest()


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Writes the rows as JSON lines, atomically."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
    except OSError as error:
        raise OfflineError(
            f"{path} cannot be written: {error.strerror}; free some disk space, or give another --out"
        ) from error
