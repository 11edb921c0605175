"""The selection of one request: a strategy by its name, with its options, over the candidates of the answer.

The strategies themselves are pure functions in `reranker.selection`. Here their answers are found, and what really
ordered the candidates is told: where no candidate has an answer, no vote can be cast.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from reranker import selection
from reranker.answers import AnswerError, Extract, by_json_pointer, by_regex, canonical, whole_text
from reranker.candidate import ScoredCandidate, Selection
from server.errors import BadRequestError

Strategy = Literal["argmax", "majority", "weighted_majority", "soft", "mbr", "blockwise"]
"""`blockwise` chooses the best of each block; see `server.pipeline.blockwise`."""
RankedBy = Literal["reward", "answer", "logprob", "first"]

WITHOUT_REWARDS: tuple[Strategy, ...] = ("majority",)
READ_TEXTS: tuple[Strategy, ...] = ("majority", "weighted_majority", "mbr")
"""Those that take milliseconds rather than microseconds; they belong in a thread."""


@dataclass(frozen=True, slots=True)
class SelectionOptions:
    """What the strategies can be told; each has its formula in `reranker.selection`.

    Votes are for what `answer_regex` (RE2, one group) or `answer_json_pointer` (RFC 6901) finds, or the whole text.
    `temperature`, in units of the reward, is that of weighted_majority and soft; `beta` weighs mbr's regulariser.
    """

    answer_regex: str | None = None
    answer_json_pointer: str | None = None
    temperature: float = 1.0
    beta: float = 1.0

    def extract(self) -> Extract:
        """Finds the answer in a candidate's text.

        Raises:
            BadRequestError: the pattern or pointer cannot be used; `param` names it.
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
    """The ranking, and what ordered it; without a `seed` a draw is different every time."""
    match strategy:
        case "argmax" | "blockwise":
            return selection.argmax(scored), "reward"
        case "soft":
            drawn_by = Random().getrandbits(64) if seed is None else seed
            return selection.soft(scored, options.temperature, drawn_by), "reward"
        case "mbr":
            return selection.mbr(scored, options.beta), "reward"
        case "majority":
            answers = _answers(scored, options)
            return selection.majority(scored, answers), "answer" if answers else "first"
        case "weighted_majority":
            answers = _answers([one for one in scored if one.has_reward], options)
            ranking = selection.weighted_majority(scored, answers, options.temperature)
            return ranking, "answer" if answers else "reward"


def _answers(scored: Sequence[ScoredCandidate], options: SelectionOptions) -> dict[int, str]:
    extract = options.extract()
    found = {one.candidate.index: extract(one.candidate.text) for one in scored}
    normal = {index: canonical(answer) for index, answer in found.items() if answer is not None}
    return {index: answer for index, answer in normal.items() if answer is not None}
