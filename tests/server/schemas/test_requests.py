"""Every field of OpenAI's API is in exactly one class: honoured, a no-op, or refused."""

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
from server.pipeline.best_of_n import BestOfNRequest
from server.pipeline.strategies import Strategy
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
CHANGES_THE_PLAN: dict[type[GenerationRequest], dict[str, Any]] = {
    ChatCompletionRequest: {
        **SAMPLING,
        "messages": [{"role": "user", "content": "Goodbye."}],
        "max_completion_tokens": 5,
        "logprobs": True,
        "response_format": {"type": "json_object"},
    },
    CompletionRequest: {**SAMPLING, "prompt": "Twice", "logprobs": 2},
}
"""A value of each honoured field that reaches the pipeline."""

SHAPES_THE_REPLY = {"model", "n", "stream", "stream_options", "top_logprobs", "nbest"}
"""Honoured fields that need others beside them or the reply to show; tests below and in test_app take each in turn."""

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
"""Each field without effect: the values it may have, and one that asks for something."""


def ask(model: type[GenerationRequest], fields: dict[str, Any]) -> GenerationRequest:
    return model.model_validate(BASES[model] | fields)


def plan(model: type[GenerationRequest], **fields: Any) -> BestOfNRequest:
    return ask(model, fields).to_request(SETTINGS)


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


@pytest.mark.parametrize(("model", "openai_fields", "ours"), OPENAI_REQUESTS)
def test_every_openai_field_is_in_exactly_one_class(
    model: type[GenerationRequest], openai_fields: set[str], ours: set[str]
) -> None:
    assert set(model.model_fields) == openai_fields | ours
    no_effect = {name for name, field in model.model_fields.items() if has_no_effect(field)}
    assert no_effect == set(NO_EFFECT[model])
    honoured = set(CHANGES_THE_PLAN[model]) | (SHAPES_THE_REPLY & set(model.model_fields))
    assert honoured == set(model.model_fields) - no_effect


@pytest.mark.parametrize(("model", "name"), cases(CHANGES_THE_PLAN))
def test_an_honoured_field_reaches_the_pipeline(model: type[GenerationRequest], name: str) -> None:
    assert plan(model, **{name: CHANGES_THE_PLAN[model][name]}) != plan(model)


@pytest.mark.parametrize(("model", "name"), cases(NO_EFFECT))
def test_a_field_without_effect_takes_only_what_happens_anyway(model: type[GenerationRequest], name: str) -> None:
    allowed, asking = NO_EFFECT[model][name]
    for value in [None, *allowed]:
        assert plan(model, **{name: value}) == plan(model)
    with pytest.raises(ValueError, match=r"send|leave it out") as refusal:
        ask(model, {name: asking})
    assert f"\n{name}\n" in str(refusal.value)


@pytest.mark.parametrize(
    ("ours", "openai_params"),
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
def test_every_field_inside_an_openai_request_is_known(ours: type[BaseModel], openai_params: Any) -> None:
    known = {field.alias or name for name, field in ours.model_fields.items()}
    assert fields_of(openai_params) <= known


@pytest.mark.parametrize("model", BASES)
def test_null_means_the_default(model: type[GenerationRequest]) -> None:
    optional = {name: None for name, field in model.model_fields.items() if not field.is_required()}
    assert plan(model, **optional) == plan(model)


def test_zero_is_not_false() -> None:
    with pytest.raises(ValueError, match="store"):
        ask(ChatCompletionRequest, {"store": 0})


def test_the_defaults_are_openais() -> None:
    sampling = plan(ChatCompletionRequest).sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 1.0, None)
    assert plan(CompletionRequest).sampling.max_tokens == 16


class TestBestOf:
    @pytest.mark.parametrize(
        ("asked", "drawn"),
        [({}, 4), ({"n": 2}, 4), ({"n": 6}, 6), ({"best_of": 1}, 1), ({"best_of": 8}, 8), ({"best_of": 3, "n": 3}, 3)],
    )
    def test_candidates_drawn(self, asked: dict[str, int], drawn: int) -> None:
        assert plan(ChatCompletionRequest, **asked).best_of == drawn

    @pytest.mark.parametrize(
        ("asked", "param"), [({"best_of": 9}, "best_of"), ({"n": 9}, "n"), ({"best_of": 2, "n": 3}, "n")]
    )
    def test_over_a_limit(self, asked: dict[str, int], param: str) -> None:
        with pytest.raises(BadRequestError) as refusal:
            plan(ChatCompletionRequest, **asked)
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
def test_ranges(field: str, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        plan(ChatCompletionRequest, **{field: value})
    for value in outside:
        with pytest.raises(ValueError, match=field):
            ask(ChatCompletionRequest, {field: value})


def test_sampling_word_for_word() -> None:
    sampling = plan(ChatCompletionRequest, **SAMPLING, logprobs=True, top_logprobs=5).sampling
    assert sampling.stop == ("a", "b")
    assert sampling.logit_bias == ((17, -100.0),)
    assert (sampling.seed, sampling.logprobs, sampling.json_schema) == (3, 5, None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 2}, 2)],
)
def test_chat_logprobs(fields: dict[str, Any], expected: int | None) -> None:
    assert plan(ChatCompletionRequest, **fields).sampling.logprobs == expected


def test_response_formats() -> None:
    schema = {"type": "object", "properties": {"stars": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "review", "schema": schema, "strict": True}}
    for asked, expected in [({"type": "text"}, None), ({"type": "json_object"}, {}), (named, schema)]:
        assert plan(ChatCompletionRequest, response_format=asked).sampling.json_schema == expected


def test_options_of_the_extension_reach_the_pipeline() -> None:
    options = {"reward_model": "taste", "deadline_s": 2, "on_reward_failure": "first", "strategy": "argmax"}
    planned = plan(ChatCompletionRequest, nbest={**options, "stopping": {"policy": "none"}})
    assert (planned.reward_model, planned.deadline_s, planned.on_reward_failure) == ("taste", 2.0, "first")


@pytest.mark.parametrize(
    ("fields", "asked_for"),
    [
        ({}, False),
        ({"logprobs": True}, False),  # tells those of each token, and asks for them by itself
        ({"nbest": {"return_candidates": True}}, True),
        ({"nbest": {"stream_candidates": True}, "stream": True}, True),
    ],
)
def test_a_likelihood_is_asked_for_where_it_is_told(fields: dict[str, Any], *, asked_for: bool) -> None:
    assert plan(ChatCompletionRequest, **fields).sampling.likelihood is asked_for


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
        bare = {"policy": policy, **self.NEEDED.get(policy, {})}
        asked = {"stopping": bare | {name: self.OPTIONS[name]}}
        if name in STOPPING_OPTIONS_OF[policy]:
            changed = plan(ChatCompletionRequest, nbest=asked).stopping
            assert changed.policy == policy
            assert changed != plan(ChatCompletionRequest, nbest={"stopping": bare}).stopping
        else:
            with pytest.raises(BadRequestError, match=f"and the policy is {policy}") as refusal:
                plan(ChatCompletionRequest, nbest=asked)
            assert refusal.value.param == f"nbest.stopping.{name}"

    def test_every_option_is_tried(self) -> None:
        assert (
            set(self.OPTIONS)
            == set(StoppingFields.model_fields) - {"policy"}
            == set().union(*STOPPING_OPTIONS_OF.values())
        )

    def test_the_policies_in_full(self) -> None:
        prior = Prior(mean=1.0, mean_weight=2.0, sd=3.0, sd_weight=4)
        asked = {"policy": "adaptive", "price": 0.5, "prior": self.OPTIONS["prior"], "target_reward": 9, "wave": 2}
        planned = plan(ChatCompletionRequest, best_of=6, n=2, nbest={"stopping": asked}).stopping
        assert planned == Stopping("adaptive", waves=AdaptiveN(6, 2, 0.5, None, 9.0, 2, prior))
        assert (planned.at_once(6), planned.at_once(1), Stopping().at_once(6)) == (2, 1, 6)
        asked = {"policy": "adaptive_rejection", "checkpoints": [8, 16], "reject_share": 0.25}
        planned = plan(ChatCompletionRequest, n=3, nbest={"stopping": asked}).stopping
        rejection = SpeculativeRejection((8, 16), 0.25, least=3)
        assert planned == Stopping("adaptive_rejection", waves=AdaptiveN(4, 3, quantile=0.9), rejection=rejection)
        asked = {"policy": "straggler_cut", "wait_share": 0.75}
        planned = plan(ChatCompletionRequest, n=2, nbest={"stopping": asked}).stopping
        assert planned == Stopping("straggler_cut", stragglers=StragglerCut(0.75, least=2))

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
    def test_what_cannot_be_honoured_is_refused(self, nbest: dict[str, Any], param: str) -> None:
        with pytest.raises(BadRequestError) as refusal:
            plan(ChatCompletionRequest, nbest=nbest)
        assert refusal.value.param == param

    @pytest.mark.parametrize("policy", ["speculative_rejection", "adaptive_rejection"])
    def test_an_upstream_server_cannot_give_up_one_of_several(self, policy: str) -> None:
        upstream = Settings(generator="openai", base_url="http://127.0.0.1:1/v1")
        options = {"stopping": {"policy": policy, "checkpoints": [8]}}
        asked = ChatCompletionRequest.model_validate(CHAT | {"nbest": options})
        with pytest.raises(BadRequestError, match="use adaptive or straggler_cut"):
            asked.to_request(upstream)


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
            planned = plan(ChatCompletionRequest, nbest=nbest)
            assert (planned.strategy, getattr(planned.selection, name)) == (strategy, self.OPTIONS[name])
        else:
            with pytest.raises(BadRequestError, match=f"and the strategy is {strategy}") as refusal:
                plan(ChatCompletionRequest, nbest=nbest)
            assert refusal.value.param == f"nbest.selection.{name}"

    def test_every_option_is_tried(self) -> None:
        assert set(self.OPTIONS) == set(SelectionFields.model_fields) == set().union(*OPTIONS_OF.values())

    @pytest.mark.parametrize("empty", [None, {}, dict.fromkeys(OPTIONS)])
    def test_null_means_the_default(self, empty: Any) -> None:
        asked = plan(ChatCompletionRequest, nbest={"strategy": "soft", "selection": empty})
        assert asked == plan(ChatCompletionRequest, nbest={"strategy": "soft"})

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
    def test_what_cannot_be_honoured_is_refused(self, nbest: dict[str, Any], param: str) -> None:
        with pytest.raises(BadRequestError) as refusal:
            plan(ChatCompletionRequest, nbest=nbest)
        assert refusal.value.param == param

    @pytest.mark.parametrize(
        ("strategy", "field", "outside"),
        [
            ("soft", "temperature", [0, -1, 1e4, math.nan]),
            ("mbr", "beta", [-0.1, 1e4, math.inf]),
            ("majority", "answer_regex", ["", "(a)" + "b" * 1000, 3]),
        ],
    )
    def test_ranges(self, strategy: str, field: str, outside: list[Any]) -> None:
        for value in outside:
            with pytest.raises(ValueError, match=field):
                ask(ChatCompletionRequest, {"nbest": {"strategy": strategy, "selection": {field: value}}})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as refusal:
        plan(ChatCompletionRequest, **fields)
    assert refusal.value.param == param


def test_messages_become_a_prompt() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "Three.", "refusal": None, "tool_calls": None, "annotations": []},
    ]
    assert plan(ChatCompletionRequest, messages=messages).prompt == Prompt(
        messages=(Message("system", "Be brief."), Message("user", "one\ntwo"), Message("assistant", "Three."))
    )


@pytest.mark.parametrize("prompt", ["Once", ["Once"]])
def test_one_text_is_a_prompt(prompt: Any) -> None:
    assert plan(CompletionRequest, prompt=prompt).prompt == Prompt(text="Once")


@pytest.mark.parametrize("prompt", [["Once", "Twice"], [], [1, 2], [[1, 2]], None])
def test_several_prompts_and_token_ids_are_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match="one text a request"):
        ask(CompletionRequest, {"prompt": prompt})


class TestScore:
    def test_candidates_keep_their_order(self) -> None:
        asked = ScoreRequest.model_validate({"prompt": "Once", "candidates": ["a", "b"]})
        prompt, candidates = asked.to_prompt_and_candidates(SETTINGS)
        assert prompt == Prompt(text="Once")
        assert [(one.index, one.text) for one in candidates] == [(0, "a"), (1, "b")]

    @pytest.mark.parametrize("fields", [{}, {"prompt": "Once", "messages": CHAT["messages"]}])
    def test_either_messages_or_prompt(self, fields: dict[str, Any]) -> None:
        with pytest.raises(BadRequestError, match="exactly one"):
            ScoreRequest.model_validate({"candidates": ["a"], **fields}).to_prompt_and_candidates(SETTINGS)

    def test_more_candidates_than_a_request_may_draw(self) -> None:
        with pytest.raises(BadRequestError, match="At most 8"):
            ScoreRequest.model_validate({"prompt": "Once", "candidates": ["a"] * 9}).to_prompt_and_candidates(SETTINGS)
