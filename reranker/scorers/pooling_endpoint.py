"""A reward model that another server runs: vLLM's pooling server, or any with the same endpoints. SPEC `vllm:URL`.

The URL's last part says which endpoint is asked; without one it is /classify. The names are those of vLLM 0.32:

    /classify   a sequence classifier with one label; its answer is `probs`, which `use_activation: false` leaves raw
    /pooling    the same number as `data`; where the model gives one a token, the last token's
    /score      prompt and candidate as a pair, which the server puts together itself; for cross-encoders

All candidates of a group travel in one request, and nothing is tried twice: the deadline is the pipeline's business.

/classify and /pooling are sent token ids, made here by the renderer that training shares (`reranker.models.rendering`):
the model's own chat template, exactly one BOS, the prompt cut from the left where it is too long, the candidate never.
The tokenizer is the one the server names as its model's `root`, or what the URL names after a #:
`vllm:http://gpu:8000/classify#org/reward-model`. Where the server's `root` cannot be loaded here, text is sent instead
(`reranker.scorers.prompt_text`), and the log says so: it is not what a chat model was trained on.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import httpx

from reranker.candidate import Candidate, Prompt
from reranker.models.rendering import Renderer
from reranker.scorers.base import Needs, Scores, ScoringError
from reranker.scorers.prompt_text import finished_text, prompt_text
from reranker.scorers.rendering_thread import RenderingThread, in_place
from reranker.scorers.spec import EndpointSpec, Route, ScorerSpecError

TIMEOUT = httpx.Timeout(120, connect=5)
"""Seconds. A server that is up connects at once; a full batch of long texts behind others may take its time."""

log = logging.getLogger("nbest")


class PoolingEndpointScorer:
    """Asks a pooling server for raw scores, one request per group of candidates.

    `renderer` None: texts are sent instead of token ids.
    """

    needs = Needs()

    def __init__(
        self, name: str, endpoint: EndpointSpec, client: httpx.AsyncClient, *, model: str, renderer: Renderer | None
    ) -> None:
        self.name = name
        self._endpoint = endpoint
        self._client = client
        self._model = model
        self._rendering = RenderingThread(renderer.render) if renderer else None

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
            ScorerSpecError: no such server, or no such tokenizer.
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

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """One reward per candidate; NaN for a candidate that does not fit the model's context.

        Raises:
            ScoringError: the server refused or failed, with its words, or not one candidate fits.
        """
        texts = [one.text for one in candidates]
        if self._endpoint.route == "score":
            return await self._ask({"text_1": prompt_text(prompt), "text_2": texts}, len(texts))
        if self._rendering is None:
            return await self._ask({"input": [finished_text(prompt, text) for text in texts]}, len(texts))
        rendered_N = await self._rendering.render(prompt, candidates)
        fitting = [one for one in rendered_N if one is not None]
        scores = await self._ask({"input": [list(one.token_ids) for one in fitting]}, len(fitting))
        cut = max(one.cut_tokens for one in fitting)
        return Scores(in_place(scores.rewards_N, rendered_N), scores.scored_tokens, prompt_tokens_cut=cut)

    async def close(self) -> None:
        await self._client.aclose()
        if self._rendering is not None:
            self._rendering.close()

    async def _ask(self, texts: Mapping[str, Any], count: int) -> Scores:
        body = {"model": self._model, "use_activation": False, **texts}
        try:
            reply = await self._client.post(f"{self._endpoint.server}/{self._endpoint.route}", json=body)
        except httpx.HTTPError as error:
            raise ScoringError(f"{self.name}: {self._endpoint.server} does not answer: {_words(error)}") from error
        if not reply.is_success:
            raise ScoringError(f"{self.name}: {self._endpoint.server} says: {_refusal(reply)}")
        try:
            told = reply.json()
            number = NUMBERS[self._endpoint.route]
            rewards = {int(one["index"]): number(one) for one in told["data"]}
            rewards_N = tuple(rewards[index] for index in range(count))
            return Scores(rewards_N, scored_tokens=int((told.get("usage") or {}).get("prompt_tokens", 0)))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ScoringError(
                f"{self.name}: {self._endpoint.server}/{self._endpoint.route} did not give {count} numbers: "
                f"{_words(error)}"
            ) from error


def _one_of_one(value: Any) -> float:
    """The number in x, [x], or the last token's of [[…], …, [x]]; NaN for null."""
    if isinstance(value, list) and value and isinstance(value[-1], list):
        value = value[-1]
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"the model gives {len(value)} numbers a text and a reward model gives one")
        value = value[0]
    return math.nan if value is None else float(value)


NUMBERS: dict[Route, Callable[[Mapping[str, Any]], float]] = {
    "classify": lambda item: _one_of_one(item["probs"]),
    "pooling": lambda item: _one_of_one(item["data"]),
    "score": lambda item: _one_of_one(item["score"]),
}
"""Endpoint -> the raw score in one item of its reply's `data`."""


async def _model_card(client: httpx.AsyncClient, server: str) -> dict[str, Any]:
    """What /v1/models says of the first model: its `id`, and at vLLM its `root` and `max_model_len`."""
    try:
        reply = await client.get(f"{server}/v1/models")
        if not reply.is_success:
            raise ValueError(_refusal(reply))
        card: dict[str, Any] = reply.json()["data"][0]
        return {"id": str(card["id"]), "root": card.get("root"), "max_model_len": card.get("max_model_len")}
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ScorerSpecError(
            f"{server}/v1/models does not say which reward model is served there: {_words(error)}; start that server "
            "first, or correct the address"
        ) from error


def _renderer(endpoint: EndpointSpec, card: Mapping[str, Any], trust_remote_code: bool) -> Renderer | None:
    from transformers import AutoTokenizer

    from reranker.models.bundled import resolve

    source = endpoint.tokenizer or card["root"] or card["id"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(source), trust_remote_code=trust_remote_code)
        return Renderer(
            tokenizer,
            "chat" if tokenizer.chat_template else "document",
            max_length=min(tokenizer.model_max_length, card["max_model_len"] or tokenizer.model_max_length),
        )
    except (OSError, ValueError) as error:
        if endpoint.tokenizer:
            raise ScorerSpecError(f"cannot load the tokenizer {endpoint.tokenizer}: {error}") from error
        log.warning(
            "The tokenizer of %s at %s cannot be loaded here, so texts are sent without its chat template; name the "
            "tokenizer after a # in the URL to mend it.",
            source,
            endpoint.server,
        )
        return None


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _refusal(reply: httpx.Response) -> str:
    """The server's own words where it answers in OpenAI's or FastAPI's envelope, else the start of what it sent."""
    try:
        told = reply.json()
        message = told["error"]["message"] if "error" in told else told["detail"]
    except (ValueError, KeyError, TypeError):
        message = reply.text[:200]
    return f"{message} (status {reply.status_code})"
