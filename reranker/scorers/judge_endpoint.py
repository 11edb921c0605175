"""A judge on another server with OpenAI's chat completions: one request per question, not streamed.

A request has only what a judge needs, because servers differ in what they accept. The options, a limit of tokens and
temperature 0, are left out for the rest of the server's life if it refuses them by name. This is logged once. A server
that refuses `max_tokens` may take OpenAI's newer name of it.
"""

import logging
from typing import Any, Self

import httpx

from reranker.candidate import Prompt
from reranker.scorers.base import ScoringError, UnscorableError
from reranker.scorers.json_http import TIMEOUT, UNREADABLE, post, tokens_used
from reranker.scorers.judge import MAX_ANSWER_TOKENS, JudgeAnswer

RENAMED = {"max_tokens": "max_completion_tokens"}
"""Options that some servers refuse -> the name under which they take them."""

log = logging.getLogger("nbest")


class JudgeEndpoint:
    """Implements `reranker.scorers.judge.JudgeModel` with a model on another server."""

    def __init__(self, url: str, model: str, client: httpx.AsyncClient) -> None:
        self._url = url
        self._model = model
        self._client = client
        self._options: dict[str, Any] = {"max_tokens": MAX_ANSWER_TOKENS, "temperature": 0.0}

    @classmethod
    def connect(cls, base_url: str, api_key: str | None, *, model: str) -> Self:
        """A judge at `base_url`, which includes /v1; nothing is sent yet."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        url = f"{base_url.rstrip('/')}/chat/completions"
        return cls(url, model, httpx.AsyncClient(timeout=TIMEOUT, headers=headers))

    async def __call__(self, question: Prompt, json_schema: dict[str, Any] | None) -> JudgeAnswer:
        """The text of the first choice.

        Raises:
            ScoringError: there is no answer, or none with a text.
            UnscorableError: the server refuses the question.
        """
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": message.role, "content": message.content} for message in question.messages],
        }
        if json_schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": json_schema}}
        while True:
            options = self._options
            try:
                reply = await post(self._client, self._url, body | options)
                break
            except UnscorableError as error:
                refused = next((name for name in options if name in str(error)), None)
                if refused is None:
                    raise
                self._leave_out(refused, options, error)
        try:
            text = reply["choices"][0]["message"]["content"]
        except UNREADABLE:
            text = None
        if not isinstance(text, str):
            raise ScoringError(f"{self._url} sent no text")
        return JudgeAnswer(text, tokens_used(reply, "prompt_tokens", "completion_tokens"))

    async def close(self) -> None:
        await self._client.aclose()

    def _leave_out(self, refused: str, options: dict[str, Any], error: UnscorableError) -> None:
        """Sends the option under its other name from now on, or no more; other calls may have done so meanwhile."""
        if self._options is not options:
            return
        self._options = {name: value for name, value in options.items() if name != refused}
        if refused in RENAMED:
            self._options[RENAMED[refused]] = options[refused]
        log.warning("The judge %s is asked without %s from now on: %s", self._model, refused, error)
