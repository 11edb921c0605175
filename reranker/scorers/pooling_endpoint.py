"""A reward model on another server: vLLM's pooling server, or any with the same endpoints. SPEC `vllm:URL`.

The last part of the URL selects the endpoint; the default is /classify. The names are those of vLLM 0.32:

    /classify   a sequence classifier with one label; its reply is `probs`, which `use_activation: false` leaves raw
    /pooling    the same number in `data`; if the model returns one number per token, the last token's
    /score      prompt and candidate as a pair, which the server combines itself; for cross-encoders

All candidates of a call are sent in one HTTP request. Nothing is retried, because the pipeline handles deadlines.

/classify and /pooling receive token ids from the renderer that training uses too (`reranker.models.rendering`): the
model's own style, exactly one BOS, a prompt that is too long cut from the left, and the candidate never cut. The
tokenizer is the `root` that the server reports for its model, or the name after a # in the URL:
`vllm:http://gpu:8000/classify#org/reward-model`. If the server's `root` cannot be loaded here, text is sent instead
(`reranker.prompt_text`) and a warning is logged, because a chat model was not trained on such text. An encoder that
reads segment ids needs /score, because a list of token ids carries none.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import httpx

from reranker.candidate import Candidate, Prompt
from reranker.models.rendering import Renderer, reads_segments, style_of
from reranker.prompt_text import finished_text, prompt_text
from reranker.scorers.base import Needs, Scores, ScoringError
from reranker.scorers.json_http import TIMEOUT, UNREADABLE, post, refusal, text_of, tokens_used
from reranker.scorers.rendering_thread import RenderingThread, with_missing
from reranker.scorers.spec import EndpointSpec, Route, ScorerSpecError

log = logging.getLogger("nbest")


class PoolingEndpointScorer:
    """Gets raw scores from a pooling server, in one HTTP request per call.

    Without a `renderer`, texts are sent instead of token ids.
    """

    needs = Needs()

    def __init__(
        self, name: str, endpoint: EndpointSpec, client: httpx.AsyncClient, *, model: str, renderer: Renderer | None
    ) -> None:
        self.name = name
        self._endpoint = endpoint
        self._client = client
        self._model = model
        self._rendering = RenderingThread(name, renderer) if renderer else None

    @classmethod
    async def connect(
        cls,
        name: str,
        endpoint: EndpointSpec,
        *,
        trust_remote_code: bool = False,
        client: httpx.AsyncClient | None = None,
    ) -> Self:
        """Asks the server which model it serves, and loads that model's tokenizer.

        Raises:
            ScorerSpecError: the server cannot be reached, or the tokenizer in the URL cannot be loaded.
        """
        client = client or httpx.AsyncClient(timeout=TIMEOUT)
        try:
            card = await _model_card(client, endpoint.server)
            renderer = None
            if endpoint.route != "score":
                renderer = await asyncio.to_thread(_renderer, endpoint, card, trust_remote_code)
        except BaseException:
            await client.aclose()
            raise
        return cls(name, endpoint, client, model=card["id"], renderer=renderer)

    async def check(self, prompt: Prompt) -> None:
        """Raises `UnscorableError` if the model's chat template, where it is known here, refuses the prompt."""
        if self._rendering is not None:
            await self._rendering.check(prompt)

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """Returns one reward per candidate; NaN for a candidate that does not fit the model's context.

        Raises:
            ScoringError: the server failed; the message quotes it.
            UnscorableError: the server refused the texts, or no candidate fits.
        """
        texts = [candidate.text for candidate in candidates]
        if self._endpoint.route == "score":
            return await self._request({"text_1": prompt_text(prompt), "text_2": texts}, len(texts))
        if self._rendering is None:
            return await self._request({"input": [finished_text(prompt, text) for text in texts]}, len(texts))
        rendered_N = await self._rendering.render(prompt, candidates)
        fitting = [rendered for rendered in rendered_N if rendered is not None]
        scores = await self._request({"input": [list(rendered.token_ids) for rendered in fitting]}, len(fitting))
        cut = max(rendered.cut_tokens for rendered in fitting)
        return Scores(with_missing(scores.rewards_N, rendered_N), scores.scored_tokens, prompt_tokens_cut=cut)

    async def close(self) -> None:
        await self._client.aclose()
        if self._rendering is not None:
            self._rendering.close()

    async def _request(self, texts: Mapping[str, Any], count: int) -> Scores:
        body = {"model": self._model, "use_activation": False, **texts}
        url = f"{self._endpoint.server}/{self._endpoint.route}"
        try:
            fields = await post(self._client, url, body)
        except ScoringError as error:
            raise type(error)(f"{self.name}: {error}") from error
        try:
            reward_of = REWARD_OF[self._endpoint.route]
            rewards = {item["index"]: reward_of(item) for item in fields["data"]}
            rewards_N = tuple(rewards[index] for index in range(count))
        except UNREADABLE as error:
            raise ScoringError(f"{self.name}: {url} did not return {count} numbers: {text_of(error)}") from error
        return Scores(rewards_N, scored_tokens=tokens_used(fields, "prompt_tokens"))


def _single_number(value: Any) -> float:
    """The number in x, [x], or [[…], …, [x]], where it is the last token's; NaN for null.

    Raises:
        ValueError: there are several numbers for a text.
    """
    if isinstance(value, list) and value and isinstance(value[-1], list):
        value = value[-1]
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"the model returns {len(value)} numbers per text, and a reward model returns one")
        value = value[0]
    return math.nan if value is None else float(value)


REWARD_OF: dict[Route, Callable[[Mapping[str, Any]], float]] = {
    "classify": lambda item: _single_number(item["probs"]),
    "pooling": lambda item: _single_number(item["data"]),
    "score": lambda item: _single_number(item["score"]),
}
"""Endpoint -> the function that reads the raw score from an item of the reply's `data`."""


async def _model_card(client: httpx.AsyncClient, server: str) -> dict[str, Any]:
    """The first model in /v1/models: its `id`, and from vLLM its `root` and `max_model_len`.

    Raises:
        ScorerSpecError: the server cannot be reached, or its reply names no model.
    """
    try:
        reply = await client.get(f"{server}/v1/models")
        if not reply.is_success:
            raise ValueError(refusal(reply))
        card: dict[str, Any] = reply.json()["data"][0]
        root, max_model_len = card.get("root"), card.get("max_model_len")
        return {
            "id": str(card["id"]),
            "root": root if isinstance(root, str) else None,
            "max_model_len": max_model_len if type(max_model_len) is int and max_model_len > 0 else None,
        }
    except (httpx.HTTPError, *UNREADABLE) as error:
        raise ScorerSpecError(
            f"{server}/v1/models does not name the served reward model: {text_of(error)}; start that server first, or "
            "correct the address"
        ) from error


def _renderer(endpoint: EndpointSpec, card: Mapping[str, Any], trust_remote_code: bool) -> Renderer | None:
    """The renderer of the served model; None, with a warning, if the server reports a tokenizer that is not here.

    Raises:
        ScorerSpecError: the tokenizer in the URL cannot be loaded, or /score is needed.
    """
    from transformers import AutoConfig, AutoTokenizer

    from reranker.models.bundled import resolve

    source = endpoint.tokenizer or card["root"] or card["id"]
    try:
        directory = resolve(source)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        config = None  # with a chat template nothing else has to be known
        if not tokenizer.chat_template:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        renderer = Renderer(
            tokenizer,
            endpoint.style or style_of(tokenizer, config, source),
            max_length=min(tokenizer.model_max_length, card["max_model_len"] or tokenizer.model_max_length),
        )
    except (OSError, ValueError) as error:
        if endpoint.tokenizer:
            raise ScorerSpecError(f"cannot load the tokenizer {endpoint.tokenizer}: {error}") from error
        log.warning(
            "The tokenizer of %s at %s cannot be loaded here, so texts are sent without its chat template; name the "
            "tokenizer after a # in the URL to fix this.",
            source,
            endpoint.server,
        )
        return None
    if renderer.style == "pair" and reads_segments(config):
        raise ScorerSpecError(
            f"{source} reads prompt and candidate as a pair with segment ids, which only the server can add; use "
            f"vllm:{endpoint.server}/score"
        )
    return renderer
