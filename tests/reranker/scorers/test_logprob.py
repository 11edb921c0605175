"""Scorers of the policy's log-probabilities, with numbers computed by hand."""

import math

import pytest

from reranker.candidate import Candidate, Prompt, TokenLogprob
from reranker.scorers.base import Scores, ScoringError
from reranker.scorers.logprob import LogprobScorer, SelfCertaintyScorer, self_certainty
from server.generation.base import Outcome, SamplingParams
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest, RunObserver
from tests.support.doubles import ScriptedGenerator

PROMPT = Prompt(text="It was")


def drawn(num_tokens: int, cumulative_logprob: float | None) -> Candidate:
    return Candidate(0, "text", num_tokens, cumulative_logprob=cumulative_logprob)


def with_top_tokens(*probabilities_T_K: tuple[float, ...]) -> Candidate:
    """A candidate with these probabilities of the K most likely tokens at each of its T positions."""
    tops = [tuple((str(k), math.log(p) if p else -math.inf) for k, p in enumerate(top)) for top in probabilities_T_K]
    return Candidate(0, "text", len(tops), logprobs=tuple(TokenLogprob("t", -1.0, top) for top in tops))


class TestLogprob:
    async def test_the_reward_is_the_mean_per_token_and_does_not_favour_short_texts(self) -> None:
        scores = await LogprobScorer("lp").score(PROMPT, [drawn(2, -3.0), drawn(4, -4.0)])
        assert scores == Scores((-1.5, -1.0), scored_tokens=0)  # by the sum the first would win

    async def test_an_unknown_or_empty_candidate_has_no_reward(self) -> None:
        unknown, empty, known = (
            await LogprobScorer("lp").score(PROMPT, [drawn(2, None), drawn(0, 0.0), drawn(1, -1.0)])
        ).rewards_N
        assert math.isnan(unknown)
        assert math.isnan(empty)
        assert known == -1.0

    async def test_no_known_candidate_is_an_error(self) -> None:
        with pytest.raises(ScoringError, match="lp: none of these candidates has tokens whose log-probabilities"):
            await LogprobScorer("lp").score(PROMPT, [drawn(2, None)])


class TestSelfCertainty:
    def test_a_uniform_distribution_has_certainty_zero(self) -> None:
        assert self_certainty(with_top_tokens((0.25, 0.25, 0.25, 0.25))) == pytest.approx(0.0)

    def test_worked_by_hand(self) -> None:
        """−1/2 · (log(2·0.9) + log(2·0.1)) = −1/2 · log 0.36 = 0.5108."""
        assert self_certainty(with_top_tokens((0.9, 0.1))) == pytest.approx(0.5108, abs=1e-4)

    def test_it_is_the_mean_over_the_tokens(self) -> None:
        assert self_certainty(with_top_tokens((0.9, 0.1), (0.5, 0.5))) == pytest.approx(0.5108 / 2, abs=1e-4)

    def test_over_the_whole_vocabulary_it_equals_the_definition(self) -> None:
        """KL(U ‖ p) with p = (.7, .2, .1): log(1/3) − mean log p."""
        kl = sum(math.log(1 / 3 / p) / 3 for p in (0.7, 0.2, 0.1))
        assert self_certainty(with_top_tokens((0.7, 0.2, 0.1))) == pytest.approx(kl)

    def test_a_top_token_of_probability_zero_is_left_out(self) -> None:
        assert self_certainty(with_top_tokens((0.9, 0.1, 0.0))) == self_certainty(with_top_tokens((0.9, 0.1)))

    async def test_an_unknown_candidate_has_no_reward_and_no_known_one_is_an_error(self) -> None:
        scorer = SelfCertaintyScorer("sure")
        unknown, known = (await scorer.score(PROMPT, [drawn(2, -3.0), with_top_tokens((0.5, 0.5))])).rewards_N
        assert math.isnan(unknown)
        assert known == pytest.approx(0.0)
        with pytest.raises(ScoringError, match="sure: none"):
            await scorer.score(PROMPT, [with_top_tokens(()), drawn(2, -3.0)])


class CandidateCollector(RunObserver):
    """Collects the candidates that a run reports as they finish."""

    def __init__(self) -> None:
        self.candidates: list[Candidate] = []

    def outcome(self, outcome: Outcome) -> None:
        if isinstance(outcome, Candidate):
            self.candidates.append(outcome)


@pytest.mark.parametrize(("requested", "sampled"), [(None, 20), (2, 20)])
async def test_the_scorer_gets_its_top_tokens_and_the_client_those_it_requested(
    requested: int | None, sampled: int
) -> None:
    """The double has k top tokens at −1, −2, … −k nats: certainty (k + 1) / 2 − log k, whatever the text."""
    generator, collector = ScriptedGenerator(["a", "b c"]), CandidateCollector()
    result = await BestOfN(generator, {"sure": SelfCertaintyScorer("sure")}).run(
        BestOfNRequest(PROMPT, SamplingParams(logprobs=requested), 2), collector
    )
    assert [sampling.logprobs for _, sampling, _ in generator.calls] == [sampled]
    assert result.selection.winner.reward == pytest.approx(21 / 2 - math.log(20))
    assert len(collector.candidates) == 2
    for candidate in [*collector.candidates, *(scored.candidate for scored in result.selection.ranking)]:
        if requested is None:
            assert candidate.logprobs is None
        else:
            assert candidate.logprobs is not None
            assert {len(token.top) for token in candidate.logprobs} == {requested}


async def test_a_client_that_requests_more_logprobs_than_the_scorer_gets_them() -> None:
    generator = ScriptedGenerator(["a"])
    served = BestOfN(generator, {"lp": LogprobScorer("lp")})
    result = await served.run(BestOfNRequest(PROMPT, SamplingParams(logprobs=3, likelihood=False), 1))
    assert generator.calls[0][1].likelihood
    assert generator.calls[0][1].logprobs == 3
    assert result.selection.winner.reward == -1.0
    assert len((result.selection.winner.candidate.logprobs or ())[0].top) == 3
