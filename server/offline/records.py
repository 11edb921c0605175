"""The lines that an offline run writes: one `Result` or one `Failure` for each line of its input, never both.

They hold no times, so the same input, models and seed give the same lines.
"""

from typing import Any

from pydantic import BaseModel

from reranker.candidate import Message, Prompt
from server.pipeline.strategies import RankedBy, Strategy
from server.pipeline.types import StoppedBy
from server.schemas.responses import CandidateReply


class Turn(BaseModel):
    """A message of the prompt."""

    role: str
    content: str


class Result(BaseModel):
    """A line of results.jsonl. `line` is its number in the input, and its custom_id if the input had none.

    `messages` or `prompt` is the prompt. `candidates` are in the order of drawing; candidate i was drawn with `seed`
    + i. `model` is None if the candidates came with the input, which did not say what drew them. `reward_model` is None
    if the strategy uses none.
    """

    custom_id: str
    line: int
    messages: list[Turn] | None = None
    prompt: str | None = None
    winner: CandidateReply
    candidates: list[CandidateReply]
    best_of: int
    failed: int
    model: str | None
    reward_model: str | None
    strategy: Strategy
    ranked_by: RankedBy
    stopped_by: StoppedBy = "all"
    sampling: dict[str, Any]
    seed: int | None
    prompt_tokens: int
    generated_tokens: int
    scored_tokens: int

    @property
    def rewards(self) -> list[float]:
        """The rewards of the candidates that have one, in the order of drawing."""
        return [candidate.reward for candidate in self.candidates if candidate.reward is not None]

    def to_prompt(self) -> Prompt:
        """The prompt, whichever of the two fields holds it."""
        if self.prompt is not None:
            return Prompt(text=self.prompt)
        return Prompt(messages=tuple(Message(turn.role, turn.content) for turn in self.messages or ()))


class Failure(BaseModel):
    """A line of failed.jsonl. `param` is the field that caused it, if a field did."""

    custom_id: str | None
    line: int
    reason: str
    param: str | None = None
