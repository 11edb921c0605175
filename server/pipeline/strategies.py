"""Ranks the candidates of one request with the strategy that it names, and reports what ordered them.

The strategies are pure functions in `reranker.selection`. This module extracts the answers that the voting strategies
count. If no candidate has an answer there are no votes, so the reward or the index orders the candidates instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from reranker import selection
from reranker.answers import AnswerError, Extract, by_json_pointer, by_regex, canonical_answers, whole_text
from reranker.candidate import ScoredCandidate, Selection
from server.errors import BadRequestError

Strategy = Literal["argmax", "majority", "weighted_majority", "soft", "mbr", "blockwise"]
"""`blockwise` selects the best candidate of each block; see `server.pipeline.blockwise`."""
RankedBy = Literal["reward", "answer", "logprob", "first"]

WITHOUT_REWARDS: tuple[Strategy, ...] = ("majority",)
READ_TEXTS: tuple[Strategy, ...] = ("majority", "weighted_majority", "mbr")
"""Strategies that compare texts: milliseconds rather than microseconds, so they run in a thread."""


@dataclass(frozen=True, slots=True)
class SelectionOptions:
    """The options of the strategies, whose formulas are in `reranker.selection`.

    Votes count what `answer_regex` (RE2, one group) or `answer_json_pointer` (RFC 6901) extracts, or the whole text.
    `temperature`, in units of the reward, is used by weighted_majority and soft; `beta` weighs mbr's regulariser.
    """

    answer_regex: str | None = None
    answer_json_pointer: str | None = None
    temperature: float = 1.0
    beta: float = 1.0

    def extract(self) -> Extract:
        """The function that extracts the answer from a candidate's text.

        Raises:
            BadRequestError: the pattern or pointer is invalid; `param` names the field.
        """
        try:
            if self.answer_regex is not None:
                field = "answer_regex"
                return by_regex(self.answer_regex)
            if self.answer_json_pointer is not None:
                field = "answer_json_pointer"
                return by_json_pointer(self.answer_json_pointer)
        except AnswerError as error:
            param = f"nbest.selection.{field}"
            raise BadRequestError(f"{param} cannot be used: {error}; correct it.", param=param) from error
        return whole_text


def select(
    strategy: Strategy, options: SelectionOptions, scored: Sequence[ScoredCandidate], seed: int | None
) -> tuple[Selection, RankedBy]:
    """The ranking, and what ordered it. Without a `seed`, `soft` draws differently every time.

    Raises:
        BadRequestError: an option of the answers is invalid.
    """
    match strategy:
        case "argmax" | "blockwise":
            return selection.argmax(scored), "reward"
        case "soft":
            soft_seed = Random().getrandbits(64) if seed is None else seed
            return selection.soft(scored, options.temperature, soft_seed), "reward"
        case "mbr":
            return selection.mbr(scored, options.beta), "reward"
        case "majority":
            answers = _answers(scored, options)
            return selection.majority(scored, answers), "answer" if answers else "first"
        case "weighted_majority":
            answers = _answers([candidate for candidate in scored if candidate.has_reward], options)
            ranking = selection.weighted_majority(scored, answers, options.temperature)
            return ranking, "answer" if answers else "reward"


def _answers(scored: Sequence[ScoredCandidate], options: SelectionOptions) -> dict[int, str]:
    """The canonical answer of each candidate that has an answer, by index."""
    extract = options.extract()
    extracted = {sample.candidate.index: extract(sample.candidate.text) for sample in scored}
    return canonical_answers({index: answer for index, answer in extracted.items() if answer is not None})
