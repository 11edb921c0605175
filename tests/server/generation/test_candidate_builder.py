"""Hand-written engine outputs become candidates."""

from types import SimpleNamespace
from typing import Any

import pytest

from reranker.candidate import Candidate
from server.generation.base import SamplingParams
from server.generation.candidate_builder import CandidateBuilder


def output(text: str, *logprobs: float, finish_reason: str | None = None, has_logprobs: bool = True) -> Any:
    """Tokens 0, 1, … with these log-probabilities, which the engine returns or not."""
    ranked = [{token: SimpleNamespace(logprob=logprob, decoded_token=text)} for token, logprob in enumerate(logprobs)]
    return SimpleNamespace(
        text=text,
        token_ids=range(len(logprobs)),
        logprobs=ranked if has_logprobs else None,
        finish_reason=finish_reason,
    )


def test_outputs_are_appended() -> None:
    builder = CandidateBuilder(3, SamplingParams())
    assert builder.extend(output("so ", -1.0), None) == Candidate(3, "so ", 1, (0,), -1.0)
    finished = builder.extend(output("very good", -0.5, -0.25, finish_reason="stop"), "v2")
    assert finished == Candidate(3, "so very good", 3, (0, 0, 1), -1.75, "stop", weights_version="v2")


def test_without_likelihood_the_cumulative_logprob_is_unknown() -> None:
    builder = CandidateBuilder(0, SamplingParams(likelihood=False))
    candidate = builder.extend(output("a", -1.0, has_logprobs=False), None)
    assert candidate.cumulative_logprob is None
    assert candidate.logprobs is None


@pytest.mark.parametrize("likelihood", [True, False])
def test_token_logprobs_give_the_cumulative_logprob(*, likelihood: bool) -> None:
    sampling = SamplingParams(likelihood=likelihood, logprobs=0)
    candidate = CandidateBuilder(0, sampling).extend(output("a", -1.0), None)
    assert candidate.cumulative_logprob == -1.0
    assert [token.logprob for token in candidate.logprobs or ()] == [-1.0]


def test_missing_logprobs_that_were_requested_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        CandidateBuilder(0, SamplingParams()).extend(output("a", -1.0, has_logprobs=False), None)


def test_only_a_block_that_ends_by_length_is_a_beginning() -> None:
    in_blocks = SamplingParams(block_tokens=1)
    by_length, by_stop = (output("a", -1.0, finish_reason=finish_reason) for finish_reason in ("length", "stop"))
    assert CandidateBuilder(0, in_blocks).extend(by_length, None).is_beginning
    assert not CandidateBuilder(0, in_blocks).extend(by_stop, None).is_beginning
    assert not CandidateBuilder(0, SamplingParams()).extend(by_length, None).is_beginning
