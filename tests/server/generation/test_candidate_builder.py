"""The engine's outputs, written by hand, become candidates."""

from types import SimpleNamespace
from typing import Any

import pytest

from reranker.candidate import Candidate
from server.generation.base import SamplingParams
from server.generation.candidate_builder import CandidateBuilder


def output(text: str, *logprobs: float, finish_reason: str | None = None, told: bool = True) -> Any:
    """Tokens 0, 1, … with these log-probabilities, told by the engine or not."""
    ranked = [{token: SimpleNamespace(logprob=logprob, decoded_token=text)} for token, logprob in enumerate(logprobs)]
    return SimpleNamespace(
        text=text, token_ids=range(len(logprobs)), logprobs=ranked if told else None, finish_reason=finish_reason
    )


def test_pieces_add_up() -> None:
    growing = CandidateBuilder(3, SamplingParams())
    assert growing.extend(output("so ", -1.0), None) == Candidate(3, "so ", 1, (0,), -1.0)
    whole = growing.extend(output("very good", -0.5, -0.25, finish_reason="stop"), "v2")
    assert whole == Candidate(3, "so very good", 3, (0, 0, 1), -1.75, "stop", weights_version="v2")


def test_a_likelihood_that_nobody_asked_for_is_not_known() -> None:
    one = CandidateBuilder(0, SamplingParams(likelihood=False)).extend(output("a", -1.0, told=False), None)
    assert one.cumulative_logprob is None
    assert one.logprobs is None


@pytest.mark.parametrize("likelihood", [True, False])
def test_with_the_log_probabilities_of_its_tokens_it_is(*, likelihood: bool) -> None:
    sampling = SamplingParams(likelihood=likelihood, logprobs=0)
    one = CandidateBuilder(0, sampling).extend(output("a", -1.0), None)
    assert one.cumulative_logprob == -1.0
    assert [token.logprob for token in one.logprobs or ()] == [-1.0]


def test_one_that_was_asked_for_and_is_not_told_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        CandidateBuilder(0, SamplingParams()).extend(output("a", -1.0, told=False), None)


def test_others_may_go_on_from_the_end_of_a_block() -> None:
    in_blocks = SamplingParams(block_tokens=1)
    assert CandidateBuilder(0, in_blocks).extend(output("a", -1.0, finish_reason="length"), None).is_beginning
    assert not CandidateBuilder(0, in_blocks).extend(output("a", -1.0, finish_reason="stop"), None).is_beginning
    assert (
        not CandidateBuilder(0, SamplingParams()).extend(output("a", -1.0, finish_reason="length"), None).is_beginning
    )
