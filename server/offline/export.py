"""From the results of a run to a file that TRL's trainers load, with a card beside it.

    sft          prompt, completion, finish_reason                                        the winners
    preference   prompt, chosen, rejected, chosen_score, rejected_score, margin, …        pairs of candidates
    raw          custom_id, prompt, completion, reward, index, num_tokens, …              every candidate

Rows stand in the order of the input, whichever order they were answered in, so the same results give the same bytes.
The rows are made twice: to find which of them stay (`server.offline.filters`), and to write those. So only numbers are
held, a few bytes a row.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Literal

from reranker.candidate import Prompt
from reranker.fsio import atomic_write
from reranker.scorers.prompt_text import prompt_text
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
    """What is exported. `form` as-asked keeps messages as messages and text as text; the others make all alike.

    `seed` decides which candidate a best-random pair has beside the best.
    """

    format: Format
    pairs: Pairs = "best-worst"
    form: Form = "as-asked"
    filters: Filters = field(default_factory=Filters)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ExportRow:
    """A row before the filters. `reward` is that of the completion or of the chosen one, `margin` that of a pair.

    `longer` is 1 where the chosen text is longer than the rejected one, -1 where it is shorter, else 0.
    """

    columns: dict[str, Any]
    reward: float | None
    margin: float | None = None
    longer: int = 0


def run_export(directory: Path, out: Path, options: ExportOptions) -> dict[str, int]:
    """Writes the file and its card; how many rows there were, what each filter took, and how many were written.

    Raises:
        OfflineError: the directory holds no results, a run is writing to it, or nothing is left by the filters.
    """
    if options.filters.balance_length and options.format != "preference":
        raise OfflineError("--balance-length compares the two texts of a pair; it goes with --format preference")
    if options.filters.min_margin is not None and options.format != "preference":
        raise OfflineError("--min-margin is about pairs; it goes with --format preference")
    runs = manifest(directory)["runs"]
    with locked(directory):  # a run that goes on meanwhile would be seen in the middle of a line
        return _export(directory, out, options, runs)


def _export(directory: Path, out: Path, options: ExportOptions, runs: list[dict[str, Any]]) -> dict[str, int]:
    results = _Results(directory / RESULTS)
    choice = RowFilter(options.filters)
    forms: Counter[str] = Counter()
    for row in _rows(results, options):
        forms[type(row.columns["prompt"]).__name__] += 1
        choice.see(row.reward, row.margin, row.longer, _digest(row.columns))
    if len(forms) > 1:
        raise OfflineError(
            "Some prompts are conversations and some are texts, which no trainer takes in one file; give "
            "--form conversational or --form plain"
        )
    kept = choice.made()
    if not kept.any():
        raise OfflineError(f"Nothing of {directory} is left by the filters ({choice.told()}); loosen them")
    _write(out, (row.columns for stays, row in zip(kept, _rows(results, options), strict=True) if stays))
    counts = {**choice.counts, "written": int(kept.sum())}
    failures = sum(1 for _ in recover(directory / FAILED, Failure))
    data_card.write(
        data_card.path_of(out), out, directory / RESULTS, runs, asdict(options), counts, len(results), failures
    )
    return counts


class _Results:
    """The results of a file in the order of the input; where each begins is all that is held."""

    def __init__(self, path: Path) -> None:
        self._path = path
        places: list[tuple[int, int]] = []
        place = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):  # the last may be torn
                        places.append((Result.model_validate_json(line).line, place))
                    place += len(line)
        self._places = [place for _, place in sorted(places)]
        if not self._places:
            raise OfflineError(f"{path} holds no results; run nbest batch or nbest rerank first")

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Result]:
        with self._path.open("rb") as file:
            for place in self._places:
                file.seek(place)
                yield Result.model_validate_json(file.readline())


def _rows(results: _Results, options: ExportOptions) -> Iterator[ExportRow]:
    make = {"sft": _winner, "preference": _pairs, "raw": _candidates}[options.format]
    for result in results:
        yield from make(result, options)


def _winner(result: Result, options: ExportOptions) -> Iterator[ExportRow]:
    prompt, wrap = _dressed(result.asked, options.form)
    winner = result.winner
    columns = {"prompt": prompt, "completion": wrap(winner.text), "finish_reason": winner.finish_reason}
    yield ExportRow(columns, winner.reward)


def _pairs(result: Result, options: ExportOptions) -> Iterator[ExportRow]:
    """Pairs of different texts with different rewards, the better one first."""
    prompt, wrap = _dressed(result.asked, options.form)
    for chosen, rejected in _chosen_and_rejected(result, options):
        better, worse = float(chosen.reward or 0), float(rejected.reward or 0)
        columns = {
            "prompt": prompt,
            "chosen": wrap(chosen.text),
            "rejected": wrap(rejected.text),
            "chosen_score": better,
            "rejected_score": worse,
            "margin": better - worse,
            "chosen_finish_reason": chosen.finish_reason,
            "rejected_finish_reason": rejected.finish_reason,
        }
        longer = (len(chosen.text) > len(rejected.text)) - (len(chosen.text) < len(rejected.text))
        yield ExportRow(columns, better, better - worse, longer)


def _chosen_and_rejected(result: Result, options: ExportOptions) -> Iterator[tuple[CandidateReply, CandidateReply]]:
    rewarded = [one for one in result.candidates if one.reward is not None]
    ranked = sorted(rewarded, key=lambda one: -float(one.reward or 0))  # stable: ties in the order of drawing
    proposed: Iterable[tuple[CandidateReply, CandidateReply]]
    if options.pairs == "all":
        proposed = combinations(ranked, 2)
    else:
        others = [one for one in ranked[1:] if _differ(ranked[0], one)]
        if not others:
            return
        worst = others[-1]
        drawn = Random(f"{options.seed}:{result.line}").choice(others)
        proposed = [(ranked[0], worst if options.pairs == "best-worst" else drawn)]
    yield from ((chosen, rejected) for chosen, rejected in proposed if _differ(chosen, rejected))


def _differ(one: CandidateReply, other: CandidateReply) -> bool:
    return one.reward != other.reward and one.text != other.text


def _candidates(result: Result, options: ExportOptions) -> Iterator[ExportRow]:
    prompt, wrap = _dressed(result.asked, options.form)
    for one in result.candidates:
        columns = {
            "custom_id": result.custom_id,
            "prompt": prompt,
            "completion": wrap(one.text),
            "reward": one.reward,
            "index": one.index,
            "is_winner": one.index == result.winner.index,
            "num_tokens": one.num_tokens,
            "cumulative_logprob": one.cumulative_logprob,
            "finish_reason": one.finish_reason,
        }
        yield ExportRow(columns, one.reward)


def _dressed(prompt: Prompt, form: Form) -> tuple[Any, Callable[[str], Any]]:
    """The prompt in that form, and how a completion is put beside it."""
    if form == "plain" or (form == "as-asked" and prompt.text is not None):
        return prompt_text(prompt), str
    if prompt.text is not None:
        messages = [{"role": "user", "content": prompt.text}]
    else:
        messages = [{"role": one.role, "content": one.content} for one in prompt.messages]
    return messages, lambda text: [{"role": "assistant", "content": text}]


def _digest(columns: dict[str, Any]) -> bytes:
    """Of what a trainer reads: two rows with the same one are duplicates."""
    read = [columns[name] for name in ("prompt", "completion", "chosen", "rejected") if name in columns]
    return hashlib.blake2b(json.dumps(read, ensure_ascii=False).encode(), digest_size=16).digest()


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """The rows as JSON lines; the file is there whole or as it was before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
    except OSError as error:
        raise OfflineError(f"{path} cannot be written: {error.strerror}; make room, or give another --out") from error
