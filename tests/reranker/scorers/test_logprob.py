"""Scorers without a model: log-probabilities you can add up in your head."""

import math

import pytest

from reranker.candidate import Candidate, Prompt, TokenLogprob
from reranker.scorers.base import Scores, ScoringError
from reranker.scorers.logprob import LogprobScorer, SelfCertaintyScorer, self_certainty
from server.generation.base import SamplingParams
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest
from tests.support.doubles import ScriptedGenerator

PROMPT = Prompt(text="It was")


def drawn(num_tokens: int, cumulative_logprob: float | None) -> Candidate:
    return Candidate(0, "text", num_tokens, cumulative_logprob=cumulative_logprob)


def told(*probabilities_T_K: tuple[float, ...]) -> Candidate:
    """A candidate with these probabilities of the most likely tokens at each of its places."""
    tops = [tuple((str(k), math.log(p) if p else -math.inf) for k, p in enumerate(top)) for top in probabilities_T_K]
    return Candidate(0, "text", len(tops), logprobs=tuple(TokenLogprob("t", -1.0, top) for top in tops))


class TestLogprob:
    async def test_it_is_the_mean_a_token_so_short_is_no_merit(self) -> None:
        scores = await LogprobScorer("lp").score(PROMPT, [drawn(2, -3.0), drawn(4, -4.0)])
        assert scores == Scores((-1.5, -1.0), scored_tokens=0)  # by the sum the first would win

    async def test_unknown_or_empty_is_missing(self) -> None:
        unknown, empty, known = (
            await LogprobScorer("lp").score(PROMPT, [drawn(2, None), drawn(0, 0.0), drawn(1, -1.0)])
        ).rewards_N
        assert math.isnan(unknown)
        assert math.isnan(empty)
        assert known == -1.0

    async def test_nothing_known_is_an_error(self) -> None:
        with pytest.raises(ScoringError, match="lp: none of these candidates has tokens whose log-probabilities"):
            await LogprobScorer("lp").score(PROMPT, [drawn(2, None)])


class TestSelfCertainty:
    def test_uniform_over_what_is_told_is_zero(self) -> None:
        assert self_certainty(told((0.25, 0.25, 0.25, 0.25))) == pytest.approx(0.0)

    def test_by_hand(self) -> None:
        """−1/2 · (log(2·0.9) + log(2·0.1)) = −1/2 · log 0.36 = 0.5108."""
        assert self_certainty(told((0.9, 0.1))) == pytest.approx(0.5108, abs=1e-4)

    def test_it_is_the_mean_over_the_tokens(self) -> None:
        assert self_certainty(told((0.9, 0.1), (0.5, 0.5))) == pytest.approx(0.5108 / 2, abs=1e-4)

    def test_over_the_whole_vocabulary_it_is_the_definition(self) -> None:
        """KL(U ‖ p) with p = (.7, .2, .1): log(1/3) − mean log p."""
        kl = sum(math.log(1 / 3 / p) / 3 for p in (0.7, 0.2, 0.1))
        assert self_certainty(told((0.7, 0.2, 0.1))) == pytest.approx(kl)

    def test_a_rival_that_is_ruled_out_is_no_rival(self) -> None:
        assert self_certainty(told((0.9, 0.1, 0.0))) == self_certainty(told((0.9, 0.1)))

    async def test_unknown_is_missing_and_nothing_known_an_error(self) -> None:
        scorer = SelfCertaintyScorer("sure")
        unknown, known = (await scorer.score(PROMPT, [drawn(2, -3.0), told((0.5, 0.5))])).rewards_N
        assert math.isnan(unknown)
        assert known == pytest.approx(0.0)
        with pytest.raises(ScoringError, match="sure: none"):
            await scorer.score(PROMPT, [told(()), drawn(2, -3.0)])


@pytest.mark.parametrize(("asked", "drawn_with"), [(None, 20), (2, 20)])
async def test_the_most_likely_tokens_are_drawn_for_it_and_told_as_asked(asked: int | None, drawn_with: int) -> None:
    """The double tells k tokens at −1, −2, … −k nats: certainty (k + 1) / 2 − log k, whatever the text."""
    generator = ScriptedGenerator(["a", "b c"])
    heard: list[Candidate] = []
    result = await BestOfN(generator, {"sure": SelfCertaintyScorer("sure")}).run(
        BestOfNRequest(PROMPT, SamplingParams(logprobs=asked), 2),
        lambda outcome: heard.append(outcome) if isinstance(outcome, Candidate) else None,
    )
    assert [sampling.logprobs for _, sampling, _ in generator.calls] == [drawn_with]
    assert result.selection.winner.reward == pytest.approx(21 / 2 - math.log(20))
    for candidate in [*heard, *(one.candidate for one in result.selection.ranking)]:
        if asked is None:
            assert candidate.logprobs is None
        else:
            assert candidate.logprobs is not None
            assert {len(token.top) for token in candidate.logprobs} == {asked}


async def test_a_client_that_asks_for_more_gets_more() -> None:
    generator = ScriptedGenerator(["a"])
    served = BestOfN(generator, {"lp": LogprobScorer("lp")})
    result = await served.run(BestOfNRequest(PROMPT, SamplingParams(logprobs=3, likelihood=False), 1))
    assert generator.calls[0][1].likelihood
    assert generator.calls[0][1].logprobs == 3
    assert result.selection.winner.reward == -1.0
    assert len((result.selection.winner.candidate.logprobs or ())[0].top) == 3
