"""The requests of the API, and their conversion to a `BestOfNRequest`.

The classes here and in `server.schemas.options` list every field of OpenAI's API. There are three kinds of fields:

    supported    an ordinary field
    no effect    marked `IgnoredField`; its type accepts only the values that ask for what happens anyway
    refused      marked `IgnoredField`, of type None; no value is accepted

The sentence in the mark is the error for any other value. A field in none of the classes is refused as unknown, so no
field is silently ignored. null always means the default.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from reranker.candidate import Candidate, Prompt
from reranker.stopping import Stopping
from server.config import ConfigError, Settings
from server.errors import BadRequestError
from server.generation.base import SamplingParams
from server.pipeline.types import BestOfNRequest
from server.schemas.options import ChatMessage, NBestOptions, ResponseFormat, StoppingFields, StreamOptions
from server.schemas.strict import (
    EmptyList,
    EmptyObject,
    FieldHint,
    IgnoredField,
    OnlyFalse,
    StrictModel,
    parse_object,
    validated,
)

DEFAULT_COMPLETION_TOKENS = 16
"""The max_tokens of OpenAI's /v1/completions if it is not given; chat continues to the end of the context."""
MAX_INT32 = 2**31 - 1
"""Far more than any context, and still an integer that every engine accepts."""
MAX_SEED = 2**62
"""Candidate i uses seed + i, which must stay within 64 bits."""

StopString = Annotated[str, Field(min_length=1)]
StopStrings = Annotated[list[StopString], Field(max_length=4)]
OneText = Annotated[list[str], Field(min_length=1, max_length=1)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class GenerationRequest(StrictModel, ABC):
    """The fields of both completion endpoints."""

    model: str
    best_of: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Candidates to sample; the default and the maximum are settings of the server."
    )
    n: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Choices to return, best first; at most best_of."
    )
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = Field(
        default=None, description="Maximum tokens of each candidate."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Annotated[StopStrings, BeforeValidator(_listed, json_schema_input_type=StopString | StopStrings)] | None = (
        None
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        default=None,
        description="Candidate i is sampled with seed + i, so the same request gives the same candidates.",
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(
        default=None,
        description="What to add to the logits of tokens: token id of the served model, as a string, to a number.",
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    nbest: NBestOptions | None = None
    user: Annotated[str | None, IgnoredField("users are not distinguished; send any string or leave it out.")] = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def return_candidates(self) -> bool:
        return self.nbest is not None and bool(self.nbest.return_candidates)

    @property
    def stream_candidates(self) -> bool:
        return self.nbest is not None and bool(self.nbest.stream_candidates)

    def to_request(self, settings: Settings) -> BestOfNRequest:
        """The request for the pipeline.

        Raises:
            BadRequestError: valid fields contradict each other or exceed the server's limits.
        """
        if self.stream_options is not None and not self.stream:
            raise BadRequestError("stream_options needs stream: true; send both or neither.", param="stream_options")
        if self.stream_candidates and not self.stream:
            raise BadRequestError(
                "nbest.stream_candidates needs stream: true; send both, or ask for nbest.return_candidates.",
                param="nbest.stream_candidates",
            )
        options = self.nbest or NBestOptions()
        best_of = self._best_of(settings)
        stopping = options.to_stopping(best_of, self.num_choices)
        if self.best_of is None and not {"stopping", "strategy", "reward_model"} & options.model_fields_set:
            stopping = default_stopping(settings, best_of, self.num_choices)
        if stopping.rejection is not None and settings.generator == "openai":
            raise BadRequestError(
                f"{stopping.policy} cancels single candidates, which an upstream server cannot do; leave stopping out, "
                "or use adaptive or straggler_cut.",
                param="nbest.stopping.policy",
            )
        sampling = replace(self.to_sampling(), block_tokens=options.tokens_of_block(self.num_choices))
        if sampling.block_tokens is not None:
            _check_blocks(sampling, settings)
        return BestOfNRequest(
            prompt=self.to_prompt(),
            sampling=sampling,
            best_of=best_of,
            reward_model=options.reward_model,
            strategy=options.strategy or "argmax",
            selection=options.to_selection(),
            deadline_s=options.deadline_s,
            stopping=stopping,
            on_reward_failure=options.on_reward_failure or "error",
        )

    @abstractmethod
    def to_prompt(self) -> Prompt:
        """The prompt of the request."""

    def to_sampling(self) -> SamplingParams:
        """The sampling parameters of each candidate; the subclasses add those of their own fields."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=tuple(self.stop or ()),
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items()),
            likelihood=self.return_candidates or self.stream_candidates,
        )

    def _best_of(self, settings: Settings) -> int:
        n = self.num_choices
        best_of = self.best_of or max(settings.default_best_of, n)
        if best_of > settings.max_best_of:
            param = "best_of" if self.best_of else "n"
            raise BadRequestError(
                f"{param} is over the {settings.max_best_of} candidates that a request may sample here; lower it.",
                param=param,
            )
        if n > best_of:
            raise BadRequestError(f"n={n} is more than best_of={best_of}; raise best_of or lower n.", param="n")
        return best_of


def default_stopping(settings: Settings, best_of: int, n: int) -> Stopping:
    """The stopping policy of the setting `default_stopping`.

    Raises:
        ConfigError: the setting is not a valid nbest.stopping.
    """
    if settings.default_stopping is None:
        return Stopping()
    try:
        return _stopping_fields(settings.default_stopping).to_stopping(best_of, n)
    except BadRequestError as error:
        raise ConfigError(f"default_stopping cannot be used: {error.message}") from error


@cache
def _stopping_fields(text: str) -> StoppingFields:
    return validated(parse_object(text.encode(), "setting"), StoppingFields)


def _check_blocks(sampling: SamplingParams, settings: Settings) -> None:
    """Refuses fields that blockwise cannot apply: in each block the answer so far is part of the prompt."""
    if settings.generator == "openai":
        raise BadRequestError(
            "blockwise continues from token ids, and an upstream server accepts text only; choose another strategy.",
            param="nbest.strategy",
        )
    if sampling.json_schema is not None:
        raise BadRequestError(
            "blockwise would start the JSON again in every block; leave response_format out, or choose argmax.",
            param="response_format",
        )
    for param in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, param):
            raise BadRequestError(
                f"With blockwise, {param} would count only the tokens of each block; leave it out, or choose argmax.",
                param=param,
            )


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = Field(
        default=None, description="OpenAI's newer name of max_tokens."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    tools: Annotated[
        EmptyList | None,
        IgnoredField("there is no tool parser; leave it out, or use response_format to get structured text."),
    ] = None
    tool_choice: Annotated[
        Literal["none", "auto"] | None, IgnoredField("there are no tools to choose; leave it out.")
    ] = None
    parallel_tool_calls: Annotated[bool | None, IgnoredField("there are no tools to call; leave it out.")] = None
    functions: Annotated[EmptyList | None, IgnoredField("there is no function parser; leave it out.")] = None
    function_call: Annotated[
        Literal["none", "auto"] | None, IgnoredField("there are no functions to call; leave it out.")
    ] = None
    modalities: Annotated[
        list[Literal["text"]] | None, IgnoredField('only text is generated; send ["text"] or leave it out.')
    ] = None
    audio: Annotated[None, IgnoredField("only text is generated; leave it out.")] = None
    store: Annotated[OnlyFalse | None, IgnoredField("answers are not stored; send false or leave it out.")] = None
    metadata: Annotated[
        dict[str, str] | None,
        IgnoredField("it labels stored answers, and answers are not stored; send strings, or leave it out."),
    ] = None
    moderation: Annotated[None, IgnoredField("there is no moderation; leave it out.")] = None
    prediction: Annotated[None, IgnoredField("predicted outputs are not used; leave it out.")] = None
    prompt_cache_key: Annotated[
        str | None, IgnoredField("prefixes are shared among all requests; send any string or leave it out.")
    ] = None
    prompt_cache_options: Annotated[
        EmptyObject | None, IgnoredField("the prefix cache has no options; leave it out.")
    ] = None
    prompt_cache_retention: Annotated[
        Literal["in_memory"] | None, IgnoredField("the prefix cache is in memory; send in_memory or leave it out.")
    ] = None
    reasoning_effort: Annotated[
        Literal["none"] | None,
        IgnoredField("reasoning is not separated from the answer; send none or leave it out."),
    ] = None
    safety_identifier: Annotated[
        str | None, IgnoredField("users are not distinguished; send any string or leave it out.")
    ] = None
    service_tier: Annotated[
        Literal["auto", "default"] | None,
        IgnoredField("there is only one tier; send auto or default, or leave it out."),
    ] = None
    verbosity: Annotated[
        Literal["medium"] | None,
        IgnoredField("leave it out; ask for a length in a message, and limit it with max_tokens."),
    ] = None
    web_search_options: Annotated[None, IgnoredField("there is no web search; leave it out.")] = None

    def to_prompt(self) -> Prompt:
        return Prompt(messages=tuple(message.to_message() for message in self.messages))

    def to_sampling(self) -> SamplingParams:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise BadRequestError(
                "max_tokens and max_completion_tokens differ; send one of them.", param="max_completion_tokens"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequestError("top_logprobs needs logprobs: true; send both or neither.", param="top_logprobs")
        return replace(
            super().to_sampling(),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=self.response_format.to_json_schema() if self.response_format else None,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[
        OneText,
        BeforeValidator(_listed, json_schema_input_type=str | OneText),
        FieldHint("a request takes one text: send several prompts as several requests, and token ids as decoded text."),
    ]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    echo: Annotated[OnlyFalse | None, IgnoredField("the prompt is not repeated in the text; leave it out.")] = None
    suffix: Annotated[Literal[""] | None, IgnoredField("text is not inserted before a suffix; leave it out.")] = None

    def to_prompt(self) -> Prompt:
        return Prompt(text=self.prompt[0])

    def to_sampling(self) -> SamplingParams:
        return replace(
            super().to_sampling(), max_tokens=self.max_tokens or DEFAULT_COMPLETION_TOKENS, logprobs=self.logprobs
        )


class AdapterRequest(StrictModel):
    """POST /admin/adapter: load this adapter for all later requests."""

    path: str = Field(min_length=1, description="The adapter's directory, absolute or relative to --adapter-root.")


class ScoreRequest(StrictModel):
    """POST /v1/score: score these candidates as answers; give `messages` or `prompt`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    prompt: str | None = None
    candidates: Annotated[list[str], Field(min_length=1)]
    reward_model: str | None = Field(default=None, description="Name of one of the served scorers; default: the first.")

    def to_prompt_and_candidates(self, settings: Settings) -> tuple[Prompt, list[Candidate]]:
        """The prompt and its candidates, which have only text: no tokens and no log-probabilities.

        Raises:
            BadRequestError: both or neither of messages and prompt, or more candidates than the server allows.
        """
        if (self.messages is None) == (self.prompt is None):
            raise BadRequestError("Give exactly one of messages and prompt.", param="messages")
        if len(self.candidates) > settings.max_best_of:
            raise BadRequestError(
                f"At most {settings.max_best_of} candidates are scored in a request; send several requests.",
                param="candidates",
            )
        prompt = Prompt(messages=tuple(message.to_message() for message in self.messages or ()), text=self.prompt)
        return prompt, [
            Candidate(index, text, num_tokens=0, finish_reason="stop") for index, text in enumerate(self.candidates)
        ]
