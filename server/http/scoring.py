"""`POST /v1/score`: the rewards of candidates that the client sends."""

from collections.abc import Sequence

from fastapi import Request, Response

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Scorer, Scores, ScoringError, UnscorableError
from server.config import Settings
from server.errors import RewardError
from server.http.access import ACCOUNT
from server.http.admission import Admission, prompt_tokens, text_tokens
from server.http.api_keys import Account
from server.http.body import BodyReader
from server.http.disconnect import until_disconnect
from server.http.errors import json_response
from server.http.lifespan import Lifecycle
from server.observability.metrics import Metrics
from server.observability.request_context import TokenCost, note_tokens
from server.pipeline.scoring import as_bad_request
from server.schemas.requests import ScoreRequest
from server.schemas.responses import Score, ScoreReply, ScoreUsage


class ScoreEndpoint:
    """Scores candidates that the client sends, without sampling any."""

    def __init__(
        self, lifecycle: Lifecycle, settings: Settings, metrics: Metrics, body: BodyReader, admission: Admission
    ) -> None:
        self._lifecycle = lifecycle
        self._settings = settings
        self._metrics = metrics
        self._body = body
        self._admission = admission

    async def score(self, request: Request) -> Response:
        """Scores the candidates in the request."""
        body = await self._body.read(request, ScoreRequest)
        scorer = self._lifecycle.pipeline.scorer(body.reward_model)
        prompt, candidates = body.to_prompt_and_candidates(self._settings)
        account: Account = request.scope[ACCOUNT]
        scores = await until_disconnect(request.receive, self._score(account, scorer, prompt, candidates))
        self._metrics.observe_scored_tokens(scores.scored_tokens)
        note_tokens(TokenCost(scored=scores.scored_tokens))
        return json_response(
            ScoreReply(
                model=scorer.name,
                data=[Score(index=index, score=reward) for index, reward in enumerate(scores.rewards_N)],
                usage=ScoreUsage(
                    prompt_tokens=scores.scored_tokens,
                    total_tokens=scores.scored_tokens,
                    prompt_tokens_cut=scores.prompt_tokens_cut,
                ),
            )
        )

    async def _score(self, account: Account, scorer: Scorer, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """Scores the candidates once they are admitted."""
        tokens = prompt_tokens(prompt) + sum(text_tokens(len(candidate.text)) for candidate in candidates)
        with account.spending(tokens) as spending:
            async with self._admission.admitted(len(candidates), tokens):
                try:
                    scores = await scorer.score(prompt, candidates)
                except UnscorableError as error:
                    raise as_bad_request(error, prompt, "candidates") from error
                except ScoringError as error:
                    self._metrics.observe_reward_failure("error")
                    raise RewardError(f"The reward model failed: {error}. Try again.") from error
            spending.tokens = scores.scored_tokens
        return scores
