"""Every field of OpenAI's API is of exactly one kind: supported, without effect, or refused."""

import math
from typing import Any, ClassVar

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionFunctionMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_params
from openai.types.shared_params import ResponseFormatJSONSchema
from openai.types.shared_params.response_format_json_schema import JSONSchema
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from reranker.candidate import Message, Prompt
from reranker.reward_posterior import Prior
from reranker.stopping import AdaptiveN, SpeculativeRejection, Stopping, StragglerCut
from server.config import Settings
from server.errors import BadRequestError
from server.pipeline.strategies import Strategy
from server.pipeline.types import BestOfNRequest
from server.schemas.options import (
    OPTIONS_OF,
    STOPPING_OPTIONS_OF,
    ChatMessage,
    JsonSchemaFormat,
    PolicyName,
    ResponseFormat,
    SelectionFields,
    StoppingFields,
    StreamOptions,
    TextPart,
)
from server.schemas.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest, ScoreRequest
from server.schemas.strict import IgnoredField

SETTINGS = Settings(default_best_of=4, max_best_of=8)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello?"}]}
TEXT = {"model": "m", "prompt": "Once"}
BASES: dict[type[GenerationRequest], dict[str, Any]] = {ChatCompletionRequest: CHAT, CompletionRequest: TEXT}

SAMPLING: dict[str, Any] = {
    "best_of": 2,
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["a", "b"],
    "seed": 3,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "logit_bias": {"17": -100},
}
SUPPORTED: dict[type[GenerationRequest], dict[str, Any]] = {
    ChatCompletionRequest: {
        **SAMPLING,
        "messages": [{"role": "user", "content": "Goodbye."}],
        "max_completion_tokens": 5,
        "logprobs": True,
        "response_format": {"type": "json_object"},
    },
    CompletionRequest: {**SAMPLING, "prompt": "Twice", "logprobs": 2},
}
"""For each supported field, a value that changes the request for the pipeline."""

CHANGE_THE_REPLY = {"model", "n", "stream", "stream_options", "top_logprobs", "nbest"}
"""Supported fields that have an effect only with other fields, or only on the reply; other tests cover each of them."""

NO_EFFECT: dict[type[GenerationRequest], dict[str, tuple[list[Any], Any]]] = {
    ChatCompletionRequest: {
        "audio": ([], {"format": "wav", "voice": "alloy"}),
        "function_call": (["none", "auto"], {"name": "f"}),
        "functions": ([[]], [{"name": "f"}]),
        "metadata": ([{}, {"a": "b"}], {"a": 1}),
        "modalities": ([["text"]], ["text", "audio"]),
        "moderation": ([], {"model": "m"}),
        "parallel_tool_calls": ([True, False], "yes"),
        "prediction": ([], {"type": "content", "content": "x"}),
        "prompt_cache_key": (["k"], 1),
        "prompt_cache_options": ([{}], {"mode": "explicit"}),
        "prompt_cache_retention": (["in_memory"], "24h"),
        "reasoning_effort": (["none"], "high"),
        "safety_identifier": (["s"], 1),
        "service_tier": (["auto", "default"], "priority"),
        "store": ([False], True),
        "tool_choice": (["none", "auto"], "required"),
        "tools": ([[]], [{"type": "function", "function": {"name": "f"}}]),
        "user": (["u"], 1),
        "verbosity": (["medium"], "low"),
        "web_search_options": ([], {}),
    },
    CompletionRequest: {"echo": ([False], True), "suffix": ([""], "end"), "user": (["u"], 1)},
}
"""Each field without effect: the accepted values, and a value that would need an effect and is refused."""


def api_request(model: type[GenerationRequest], fields: dict[str, Any]) -> GenerationRequest:
    return model.model_validate(BASES[model] | fields)


def to_request(model: type[GenerationRequest], **fields: Any) -> BestOfNRequest:
    return api_request(model, fields).to_request(SETTINGS)


def fields_of(params: Any) -> set[str]:
    return {name for kind in params.__mro__ for name in getattr(kind, "__annotations__", {})}


def has_no_effect(field: FieldInfo) -> bool:
    return any(isinstance(mark, IgnoredField) for mark in field.metadata)


def cases(table: dict[type[GenerationRequest], Any]) -> list[tuple[type[GenerationRequest], str]]:
    return [(model, name) for model, fields in table.items() for name in fields]


OPENAI_REQUESTS = [
    (ChatCompletionRequest, fields_of(chat_params.CompletionCreateParamsStreaming), {"best_of", "nbest"}),
    (CompletionRequest, fields_of(text_params.CompletionCreateParamsStreaming), {"nbest"}),
]


@pytest.mark.parametrize(("model", "openai_fields", "nbest_fields"), OPENAI_REQUESTS)
def test_every_openai_field_is_of_exactly_one_kind(
    model: type[GenerationRequest], openai_fields: set[str], nbest_fields: set[str]
) -> None:
    assert set(model.model_fields) == openai_fields | nbest_fields
    no_effect = {name for name, field in model.model_fields.items() if has_no_effect(field)}
    assert no_effect == set(NO_EFFECT[model])
    supported = set(SUPPORTED[model]) | (CHANGE_THE_REPLY & set(model.model_fields))
    assert supported == set(model.model_fields) - no_effect


@pytest.mark.parametrize(("model", "name"), cases(SUPPORTED))
def test_a_supported_field_reaches_the_pipeline(model: type[GenerationRequest], name: str) -> None:
    assert to_request(model, **{name: SUPPORTED[model][name]}) != to_request(model)


@pytest.mark.parametrize(("model", "name"), cases(NO_EFFECT))
def test_a_field_without_effect_accepts_only_values_that_need_none(model: type[GenerationRequest], name: str) -> None:
    accepted, refused = NO_EFFECT[model][name]
    for value in [None, *accepted]:
        assert to_request(model, **{name: value}) == to_request(model)
    with pytest.raises(ValueError, match=r"send|leave it out") as refusal:
        api_request(model, {name: refused})
    assert f"\n{name}\n" in str(refusal.value)


@pytest.mark.parametrize(
    ("schema", "openai_params"),
    [
        (ChatMessage, ChatCompletionSystemMessageParam),
        (ChatMessage, ChatCompletionDeveloperMessageParam),
        (ChatMessage, ChatCompletionUserMessageParam),
        (ChatMessage, ChatCompletionAssistantMessageParam),
        (ChatMessage, ChatCompletionToolMessageParam),
        (ChatMessage, ChatCompletionFunctionMessageParam),
        (TextPart, ChatCompletionContentPartTextParam),
        (StreamOptions, ChatCompletionStreamOptionsParam),
        (ResponseFormat, ResponseFormatJSONSchema),
        (JsonSchemaFormat, JSONSchema),
    ],
)
def test_every_field_inside_an_openai_request_is_known(schema: type[BaseModel], openai_params: Any) -> None:
    known = {field.alias or name for name, field in schema.model_fields.items()}
    assert fields_of(openai_params) <= known


@pytest.mark.parametrize("model", BASES)
def test_null_means_the_default(model: type[GenerationRequest]) -> None:
    optional = {name: None for name, field in model.model_fields.items() if not field.is_required()}
    assert to_request(model, **optional) == to_request(model)


def test_zero_is_not_accepted_as_false() -> None:
    with pytest.raises(ValueError, match="store"):
        api_request(ChatCompletionRequest, {"store": 0})


def test_the_sampling_defaults_are_those_of_openai() -> None:
    sampling = to_request(ChatCompletionRequest).sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 1.0, None)
    assert to_request(CompletionRequest).sampling.max_tokens == 16


class TestBestOf:
    @pytest.mark.parametrize(
        ("fields", "best_of"),
        [({}, 4), ({"n": 2}, 4), ({"n": 6}, 6), ({"best_of": 1}, 1), ({"best_of": 8}, 8), ({"best_of": 3, "n": 3}, 3)],
    )
    def test_it_is_the_one_given_or_the_larger_of_n_and_the_default(self, fields: dict[str, int], best_of: int) -> None:
        assert to_request(ChatCompletionRequest, **fields).best_of == best_of

    @pytest.mark.parametrize(
        ("fields", "param"), [({"best_of": 9}, "best_of"), ({"n": 9}, "n"), ({"best_of": 2, "n": 3}, "n")]
    )
    def test_over_a_limit_it_is_refused_with_the_field(self, fields: dict[str, int], param: str) -> None:
        with pytest.raises(BadRequestError) as refusal:
            to_request(ChatCompletionRequest, **fields)
        assert refusal.value.param == param


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("best_of", [1, 8], [0, -1, 1.5, "2", True]),
        ("n", [1, 4], [0, "1"]),
        ("max_tokens", [1, 10**6], [0, -5, 2.5, 2**31]),
        ("temperature", [0, 2], [-0.1, 2.1, math.nan, math.inf, "1"]),
        ("top_p", [0.1, 1], [0, 1.1, math.nan]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
        ("stop", ["a", ["a", "b", "c", "d"], []], [["a"] * 5, [""], "", 3]),
        ("seed", [0, 2**62], [-1, 2**63, 0.5]),
        ("logit_bias", [{"0": 100, "17": -100.0}], [{"a": 1}, {"-1": 1}, {"1": 101}, {"1": math.nan}, [1]]),
        ("top_logprobs", [], [-1, 21]),
        ("messages", [], [[], "Hello?", [{"role": "user"}], [{"content": "Hello?"}]]),
        (
            "nbest",
            [{}, {"deadline_s": 86400}],
            [
                {"deadline_s": 0},
                {"deadline_s": 1e9},
                {"deadline_s": math.nan},
                {"on_reward_failure": "ignore"},
                {"best": 1},
            ],
        ),
        ("stream", [True, False], ["yes", 1]),
    ],
)
def test_values_inside_the_range_are_accepted_and_others_refused(
    field: str, inside: list[Any], outside: list[Any]
) -> None:
    for value in inside:
        to_request(ChatCompletionRequest, **{field: value})
    for value in outside:
        with pytest.raises(ValueError, match=field):
            api_request(ChatCompletionRequest, {field: value})


def test_sampling_fields_are_passed_on_unchanged() -> None:
    sampling = to_request(ChatCompletionRequest, **SAMPLING, logprobs=True, top_logprobs=5).sampling
    assert sampling.stop == ("a", "b")
    assert sampling.logit_bias == ((17, -100.0),)
    assert (sampling.seed, sampling.logprobs, sampling.json_schema) == (3, 5, None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 2}, 2)],
)
def test_the_number_of_logprobs_of_a_chat_follows_both_fields(fields: dict[str, Any], expected: int | None) -> None:
    assert to_request(ChatCompletionRequest, **fields).sampling.logprobs == expected


def test_each_response_format_becomes_a_json_schema() -> None:
    schema = {"type": "object", "properties": {"stars": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "review", "schema": schema, "strict": True}}
    for response_format, expected in [({"type": "text"}, None), ({"type": "json_object"}, {}), (named, schema)]:
        request = to_request(ChatCompletionRequest, response_format=response_format)
        assert request.sampling.json_schema == expected


def test_the_options_of_nbest_reach_the_pipeline() -> None:
    options = {"reward_model": "taste", "deadline_s": 2, "on_reward_failure": "first", "strategy": "argmax"}
    request = to_request(ChatCompletionRequest, nbest={**options, "stopping": {"policy": "none"}})
    assert (request.reward_model, request.deadline_s, request.on_reward_failure) == ("taste", 2.0, "first")


@pytest.mark.parametrize(
    ("fields", "likelihood"),
    [
        ({}, False),
        ({"logprobs": True}, False),  # the reply has the log-probability of each token, and no sum
        ({"nbest": {"return_candidates": True}}, True),
        ({"nbest": {"stream_candidates": True}, "stream": True}, True),
    ],
)
def test_the_likelihood_is_requested_only_where_the_reply_has_it(fields: dict[str, Any], *, likelihood: bool) -> None:
    assert to_request(ChatCompletionRequest, **fields).sampling.likelihood is likelihood


class TestStoppingOptions:
    OPTIONS: ClassVar[dict[str, Any]] = {
        "price": 0.5,
        "quantile": 0.8,
        "prior": {"mean": 1.0, "mean_weight": 2.0, "sd": 3.0, "sd_weight": 4},
        "target_reward": -1.0,
        "wave": 2,
        "checkpoints": [8, 16],
        "reject_share": 0.25,
        "wait_share": 0.75,
    }
    NEEDED: ClassVar[dict[str, dict[str, Any]]] = {
        "speculative_rejection": {"checkpoints": [8]},
        "adaptive_rejection": {"checkpoints": [8]},
        "straggler_cut": {"wait_share": 0.5},
    }

    @pytest.mark.parametrize("policy", STOPPING_OPTIONS_OF)
    @pytest.mark.parametrize("name", OPTIONS)
    def test_an_option_reaches_the_policy_or_is_refused(self, policy: PolicyName, name: str) -> None:
        without_option = {"policy": policy, **self.NEEDED.get(policy, {})}
        with_option = without_option | {name: self.OPTIONS[name]}
        if name in STOPPING_OPTIONS_OF[policy]:
            stopping = to_request(ChatCompletionRequest, nbest={"stopping": with_option}).stopping
            assert stopping.policy == policy
            assert stopping != to_request(ChatCompletionRequest, nbest={"stopping": without_option}).stopping
        else:
            with pytest.raises(BadRequestError, match=f"and the policy is {policy}") as refusal:
                to_request(ChatCompletionRequest, nbest={"stopping": with_option})
            assert refusal.value.param == f"nbest.stopping.{name}"

    def test_every_option_is_tested(self) -> None:
        assert (
            set(self.OPTIONS)
            == set(StoppingFields.model_fields) - {"policy"}
            == set().union(*STOPPING_OPTIONS_OF.values())
        )

    def test_each_policy_is_built_from_its_options(self) -> None:
        prior = Prior(mean=1.0, mean_weight=2.0, sd=3.0, sd_weight=4)
        fields = {"policy": "adaptive", "price": 0.5, "prior": self.OPTIONS["prior"], "target_reward": 9, "wave": 2}
        stopping = to_request(ChatCompletionRequest, best_of=6, n=2, nbest={"stopping": fields}).stopping
        assert stopping == Stopping("adaptive", waves=AdaptiveN(6, 2, 0.5, None, 9.0, 2, prior))
        assert (stopping.at_once(6), stopping.at_once(1), Stopping().at_once(6)) == (2, 1, 6)
        fields = {"policy": "adaptive_rejection", "checkpoints": [8, 16], "reject_share": 0.25}
        stopping = to_request(ChatCompletionRequest, n=3, nbest={"stopping": fields}).stopping
        rejection = SpeculativeRejection((8, 16), 0.25, least=3)
        assert stopping == Stopping("adaptive_rejection", waves=AdaptiveN(4, 3, quantile=0.9), rejection=rejection)
        fields = {"policy": "straggler_cut", "wait_share": 0.75}
        stopping = to_request(ChatCompletionRequest, n=2, nbest={"stopping": fields}).stopping
        assert stopping == Stopping("straggler_cut", stragglers=StragglerCut(0.75, least=2))

    @pytest.mark.parametrize(
        ("nbest", "param"),
        [
            ({"stopping": {"policy": "adaptive", "price": 1.0, "quantile": 0.5}}, "nbest.stopping.quantile"),
            ({"stopping": {"policy": "adaptive"}, "strategy": "majority"}, "nbest.stopping"),
            ({"stopping": {"policy": "adaptive"}, "strategy": "mbr"}, "nbest.stopping"),
            ({"stopping": {"policy": "straggler_cut", "target_reward": 1}, "strategy": "majority"}, "nbest.stopping"),
            ({"stopping": {"policy": "straggler_cut"}}, "nbest.stopping"),
            ({"stopping": {"policy": "speculative_rejection"}}, "nbest.stopping.checkpoints"),
            ({"stopping": {"policy": "speculative_rejection", "checkpoints": [8, 8]}}, "nbest.stopping.checkpoints"),
            ({"stopping": {"policy": "speculative_rejection", "checkpoints": [9, 8]}}, "nbest.stopping.checkpoints"),
        ],
    )
    def test_invalid_combinations_are_refused_with_the_field(self, nbest: dict[str, Any], param: str) -> None:
        with pytest.raises(BadRequestError) as refusal:
            to_request(ChatCompletionRequest, nbest=nbest)
        assert refusal.value.param == param

    @pytest.mark.parametrize("policy", ["speculative_rejection", "adaptive_rejection"])
    def test_rejection_is_refused_with_an_upstream_generator(self, policy: str) -> None:
        upstream = Settings(generator="openai", base_url="http://127.0.0.1:1/v1")
        options = {"stopping": {"policy": policy, "checkpoints": [8]}}
        request = ChatCompletionRequest.model_validate(CHAT | {"nbest": options})
        with pytest.raises(BadRequestError, match="use adaptive or straggler_cut"):
            request.to_request(upstream)


class TestSelectionOptions:
    OPTIONS: ClassVar[dict[str, Any]] = {
        "answer_regex": "is ([0-9]+)",
        "answer_json_pointer": "/answer",
        "temperature": 0.5,
        "beta": 2.0,
    }

    @pytest.mark.parametrize("strategy", OPTIONS_OF)
    @pytest.mark.parametrize("name", OPTIONS)
    def test_an_option_reaches_the_pipeline_or_is_refused(self, strategy: Strategy, name: str) -> None:
        nbest = {"strategy": strategy, "selection": {name: self.OPTIONS[name]}}
        if name in OPTIONS_OF[strategy]:
            request = to_request(ChatCompletionRequest, nbest=nbest)
            assert (request.strategy, getattr(request.selection, name)) == (strategy, self.OPTIONS[name])
        else:
            with pytest.raises(BadRequestError, match=f"and the strategy is {strategy}") as refusal:
                to_request(ChatCompletionRequest, nbest=nbest)
            assert refusal.value.param == f"nbest.selection.{name}"

    def test_every_option_is_tested(self) -> None:
        assert set(self.OPTIONS) == set(SelectionFields.model_fields) == set().union(*OPTIONS_OF.values())

    @pytest.mark.parametrize("empty", [None, {}, dict.fromkeys(OPTIONS)])
    def test_null_means_the_default(self, empty: Any) -> None:
        request = to_request(ChatCompletionRequest, nbest={"strategy": "soft", "selection": empty})
        assert request == to_request(ChatCompletionRequest, nbest={"strategy": "soft"})

    @pytest.mark.parametrize(
        ("nbest", "param"),
        [
            ({"strategy": "majority", "reward_model": "taste"}, "nbest.reward_model"),
            ({"selection": {"temperature": 1}}, "nbest.selection.temperature"),
            ({"strategy": "majority", "selection": {"answer_regex": "no group"}}, "nbest.selection.answer_regex"),
            (
                {"strategy": "majority", "selection": {"answer_json_pointer": "no slash"}},
                "nbest.selection.answer_json_pointer",
            ),
            (
                {"strategy": "majority", "selection": {"answer_regex": "(.)", "answer_json_pointer": ""}},
                "nbest.selection.answer_json_pointer",
            ),
        ],
    )
    def test_invalid_combinations_are_refused_with_the_field(self, nbest: dict[str, Any], param: str) -> None:
        with pytest.raises(BadRequestError) as refusal:
            to_request(ChatCompletionRequest, nbest=nbest)
        assert refusal.value.param == param

    @pytest.mark.parametrize(
        ("strategy", "field", "outside"),
        [
            ("soft", "temperature", [0, -1, 1e4, math.nan]),
            ("mbr", "beta", [-0.1, 1e4, math.inf]),
            ("majority", "answer_regex", ["", "(a)" + "b" * 1000, 3]),
        ],
    )
    def test_values_outside_the_range_are_refused(self, strategy: str, field: str, outside: list[Any]) -> None:
        for value in outside:
            with pytest.raises(ValueError, match=field):
                api_request(ChatCompletionRequest, {"nbest": {"strategy": strategy, "selection": {field: value}}})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as refusal:
        to_request(ChatCompletionRequest, **fields)
    assert refusal.value.param == param


def test_messages_become_a_prompt_with_text_parts_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "Three.", "refusal": None, "tool_calls": None, "annotations": []},
    ]
    assert to_request(ChatCompletionRequest, messages=messages).prompt == Prompt(
        messages=(Message("system", "Be brief."), Message("user", "one\ntwo"), Message("assistant", "Three."))
    )


@pytest.mark.parametrize("prompt", ["Once", ["Once"]])
def test_a_single_text_is_accepted_as_the_prompt(prompt: Any) -> None:
    assert to_request(CompletionRequest, prompt=prompt).prompt == Prompt(text="Once")


@pytest.mark.parametrize("prompt", [["Once", "Twice"], [], [1, 2], [[1, 2]], None])
def test_several_prompts_and_token_ids_are_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match="a request takes one text"):
        api_request(CompletionRequest, {"prompt": prompt})


class TestScore:
    def test_candidates_keep_their_order(self) -> None:
        request = ScoreRequest.model_validate({"prompt": "Once", "candidates": ["a", "b"]})
        prompt, candidates = request.to_prompt_and_candidates(SETTINGS)
        assert prompt == Prompt(text="Once")
        assert [(candidate.index, candidate.text) for candidate in candidates] == [(0, "a"), (1, "b")]

    @pytest.mark.parametrize("fields", [{}, {"prompt": "Once", "messages": CHAT["messages"]}])
    def test_both_or_neither_of_messages_and_prompt_are_refused(self, fields: dict[str, Any]) -> None:
        with pytest.raises(BadRequestError, match="exactly one"):
            ScoreRequest.model_validate({"candidates": ["a"], **fields}).to_prompt_and_candidates(SETTINGS)

    def test_more_candidates_than_the_maximum_are_refused(self) -> None:
        with pytest.raises(BadRequestError, match="At most 8"):
            ScoreRequest.model_validate({"prompt": "Once", "candidates": ["a"] * 9}).to_prompt_and_candidates(SETTINGS)
