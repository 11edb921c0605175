"""The lines that an offline run writes: one `Result` or one `Failure` for each line of its input, never both.

Nothing in them depends on the clock, so the same input, models and seed give the same lines.
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
    """A line of results.jsonl. `line` is its number in the input, and its custom_id where it had none.

    `candidates` are in the order of drawing; candidate i was drawn with `seed` + i. `messages` or `prompt` is what was
    asked. `model` is None where candidates came from elsewhere and nobody said whose they are;
    `reward_model` where the strategy asks none.
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
        """Of the candidates that have one, in the order of drawing."""
        return [one.reward for one in self.candidates if one.reward is not None]

    @property
    def asked(self) -> Prompt:
        if self.prompt is not None:
            return Prompt(text=self.prompt)
        return Prompt(messages=tuple(Message(one.role, one.content) for one in self.messages or ()))


class Failure(BaseModel):
    """A line of failed.jsonl. `param` is the field that is to blame, if one is."""

    custom_id: str | None
    line: int
    reason: str
    param: str | None = None
