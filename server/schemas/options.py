"""The objects inside a request; `server.schemas.requests` explains `FieldHint` and `IgnoredField`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue

from reranker.candidate import Message
from reranker.reward_posterior import UNKNOWN, Prior
from reranker.stopping import WAVE, AdaptiveN, SpeculativeRejection, Stopping, StragglerCut
from server.errors import BadRequestError
from server.generation.structured_output import check_size
from server.pipeline.blockwise import DEFAULT_BLOCK_TOKENS
from server.pipeline.strategies import WITHOUT_REWARDS, SelectionOptions, Strategy
from server.pipeline.types import RewardFailurePolicy
from server.schemas.strict import EmptyList, FieldHint, IgnoredField, OnlyFalse, StrictModel

MAX_DEADLINE_S = 86_400.0
"""A day; timers overflow on far larger numbers."""
MAX_PATTERN_CHARS = 1000
MAX_CHECKPOINTS = 16
MAX_PRIOR = 1_000_000
"""Far above any reward, and its square is still finite."""


def _text_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class TextPart(StrictModel):
    """A part of a message."""

    type: Annotated[
        Literal["text"],
        FieldHint("only text parts are supported, not image_url, input_audio, file or refusal parts; send text."),
    ]
    text: str
    prompt_cache_breakpoint: Annotated[None, IgnoredField("the prefix cache needs no breakpoints; leave it out.")] = (
        None
    )


class ChatMessage(StrictModel):
    """One message of a conversation. `developer` is OpenAI's newer name for `system` and is rendered as `system`."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        FieldHint("the roles are system, developer, user and assistant; tool and function would need a tool parser."),
    ]
    content: Annotated[list[TextPart], BeforeValidator(_text_parts, json_schema_input_type=str | list[TextPart])]
    name: Annotated[None, IgnoredField("chat templates do not render names; write it into the content.")] = None
    refusal: Annotated[None, IgnoredField("refusals are not rendered; send the text as content.")] = None
    audio: Annotated[None, IgnoredField("audio is not supported; send text.")] = None
    annotations: Annotated[EmptyList | None, IgnoredField("annotations are not rendered; leave them out.")] = None
    tool_calls: Annotated[EmptyList | None, IgnoredField("tool calls are not rendered; send text only.")] = None
    function_call: Annotated[None, IgnoredField("function calls are not rendered; send text only.")] = None
    tool_call_id: Annotated[None, IgnoredField("there is no tool parser; send text only.")] = None

    def to_message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        return Message(role, "\n".join(part.text for part in self.content))


class JsonSchemaFormat(StrictModel):
    """A JSON schema that every candidate is forced to follow while it is generated."""

    name: str
    schema_: Annotated[
        dict[str, JsonValue], Field(alias="schema"), FieldHint("give the JSON schema as an object of finite values.")
    ]
    strict: bool | None = Field(default=None, description="The schema is enforced either way.")
    description: Annotated[None, IgnoredField("the model does not read it; describe the output in a message.")] = None


class ResponseFormat(StrictModel):
    """The format that the text of every candidate must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def to_json_schema(self) -> dict[str, Any] | None:
        """The JSON schema of `SamplingParams`: None for free text, {} for any JSON object."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise BadRequestError(
                "response_format.json_schema is used by type json_schema only; send both or neither.",
                param="response_format.json_schema",
            )
        if self.json_schema is not None:
            check_size(self.json_schema.schema_)
            return self.json_schema.schema_
        return {} if self.type == "json_object" else None


class StreamOptions(StrictModel):
    """OpenAI's options of a stream."""

    include_usage: bool | None = Field(default=None, description="Send a last chunk with the usage.")
    include_obfuscation: Annotated[
        OnlyFalse | None, IgnoredField("chunks are not padded to hide their length; leave it out.")
    ] = None


class PriorFields(StrictModel):
    """The distribution of a prompt's rewards, as expected before sampling; `nbest batch` reports it as reward_prior."""

    mean: float = Field(ge=-MAX_PRIOR, le=MAX_PRIOR, description="Expected mean of a prompt's rewards.")
    mean_weight: float = Field(
        ge=0, le=MAX_PRIOR, description="Prior strength of the mean, in equivalent observed rewards."
    )
    sd: float = Field(gt=0, le=MAX_PRIOR, description="Expected standard deviation of a prompt's rewards.")
    sd_weight: int = Field(
        ge=0, le=MAX_PRIOR, description="Prior strength of the standard deviation, in equivalent observed rewards."
    )

    def to_prior(self) -> Prior:
        return Prior(**self.model_dump())


PolicyName = Literal["none", "adaptive", "speculative_rejection", "adaptive_rejection", "straggler_cut"]
STOPPING_OPTIONS_OF: dict[PolicyName, set[str]] = {
    "none": set(),
    "adaptive": {"price", "quantile", "prior", "target_reward", "wave"},
    "speculative_rejection": {"checkpoints", "reject_share"},
    "adaptive_rejection": {"price", "quantile", "prior", "target_reward", "wave", "checkpoints", "reject_share"},
    "straggler_cut": {"wait_share", "target_reward"},
}
"""The fields of `StoppingFields` that each policy uses."""
DEFAULT_QUANTILE = 0.9


class StoppingFields(StrictModel):
    """When to stop before all candidates are complete; each option is used by some policies (docs/stopping.md)."""

    policy: Annotated[
        PolicyName,
        FieldHint("choose none, adaptive, speculative_rejection, adaptive_rejection or straggler_cut."),
    ]
    price: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="adaptive: cost of one more candidate, in units of the reward; sampling stops when the expected "
        "increase of the best reward is less than this.",
    )
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="adaptive, instead of a price: stop when the best reward is estimated to exceed this share of the "
        f"rewards of all answers that the model would sample. Default: {DEFAULT_QUANTILE:g}.",
    )
    prior: PriorFields | None = Field(
        default=None,
        description="adaptive: expected distribution of the rewards. Without it few candidates are saved "
        "(docs/stopping.md).",
    )
    target_reward: float | None = Field(
        default=None, description="adaptive, straggler_cut: stop when a candidate has this reward or more."
    )
    wave: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description=f"adaptive: candidates sampled at a time. Default: {WAVE}."
    )
    checkpoints: (
        Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=MAX_CHECKPOINTS)] | None
    ) = Field(
        default=None,
        description="speculative_rejection: lengths in tokens, ascending, at which unfinished candidates are scored "
        "and the worst cancelled.",
    )
    reject_share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="speculative_rejection: share of candidates to cancel at each checkpoint. Default: 0.5.",
    )
    wait_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="straggler_cut: share of candidates to wait for. Default: 1."
    )

    def to_stopping(self, best_of: int, n: int) -> Stopping:
        """The policy for a request of `best_of` candidates and `n` choices.

        Raises:
            BadRequestError: an option that the policy does not use, or a missing option that it needs.
        """
        given = self.model_dump(exclude_none=True, exclude={"policy"})
        for name in sorted(given.keys() - STOPPING_OPTIONS_OF[self.policy]):
            policies = " and ".join(policy for policy, options in STOPPING_OPTIONS_OF.items() if name in options)
            param = f"nbest.stopping.{name}"
            raise BadRequestError(f"{param} is used by {policies}, and the policy is {self.policy}.", param=param)
        if self.policy == "none":
            return Stopping()
        options = STOPPING_OPTIONS_OF[self.policy]
        return Stopping(
            policy=self.policy,
            waves=self._waves(best_of, n) if "wave" in options else None,
            rejection=self._rejection(n) if "checkpoints" in options else None,
            stragglers=self._stragglers(n) if "wait_share" in options else None,
        )

    def _waves(self, best_of: int, n: int) -> AdaptiveN:
        if self.price is not None and self.quantile is not None:
            raise BadRequestError("Give a price or a quantile, not both.", param="nbest.stopping.quantile")
        quantile = DEFAULT_QUANTILE if self.price is None and self.quantile is None else self.quantile
        prior = self.prior.to_prior() if self.prior else UNKNOWN
        return AdaptiveN(best_of, n, self.price, quantile, self.target_reward, self.wave or WAVE, prior)

    def _rejection(self, n: int) -> SpeculativeRejection:
        param = "nbest.stopping.checkpoints"
        if self.checkpoints is None:
            raise BadRequestError(
                f"{self.policy} needs {param}: the lengths in tokens at which to compare candidates, such as [16, 32].",
                param=param,
            )
        if sorted(set(self.checkpoints)) != self.checkpoints:
            raise BadRequestError(f"{param} is not ascending; sort it and remove duplicates.", param=param)
        return SpeculativeRejection(tuple(self.checkpoints), self.reject_share or 0.5, n)

    def _stragglers(self, n: int) -> StragglerCut:
        if self.wait_share is None and self.target_reward is None:
            raise BadRequestError(
                "straggler_cut needs nbest.stopping.wait_share or target_reward; otherwise it would wait for all "
                "candidates.",
                param="nbest.stopping",
            )
        return StragglerCut(self.wait_share or 1.0, self.target_reward, n)


class SelectionFields(StrictModel):
    """Options of the strategies; an option that the chosen strategy does not use is refused."""

    answer_regex: Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARS)] | None = Field(
        default=None,
        description="majority, weighted_majority: the answer is the only group of this RE2 pattern, at its first match "
        "in the text; default: the whole text.",
    )
    answer_json_pointer: Annotated[str, Field(max_length=MAX_PATTERN_CHARS)] | None = Field(
        default=None,
        description="majority, weighted_majority: the answer is the value at this JSON pointer (RFC 6901) in the text.",
    )
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] | None = Field(
        default=None,
        description="soft, weighted_majority: temperature of the weights exp(reward / temperature), in units of the "
        "reward; a small value approaches argmax. Default: 1.",
    )
    beta: Annotated[float, Field(ge=0, le=1e3)] | None = Field(
        default=None,
        description="mbr: weight of a candidate's mean similarity to the other candidates; 0 is argmax. Default: 1.",
    )


OPTIONS_OF: dict[Strategy, set[str]] = {
    "argmax": set(),
    "majority": {"answer_regex", "answer_json_pointer"},
    "weighted_majority": {"answer_regex", "answer_json_pointer", "temperature"},
    "soft": {"temperature"},
    "mbr": {"beta"},
    "blockwise": set(),
}
"""The fields of `SelectionFields` that each strategy uses."""


class NBestOptions(StrictModel):
    """nbest's extension of OpenAI's requests."""

    reward_model: str | None = Field(default=None, description="Name of one of the served scorers; default: the first.")
    strategy: Annotated[
        Strategy | None,
        FieldHint("how the winner is chosen: argmax (default), majority, weighted_majority, soft, mbr or blockwise."),
    ] = None
    selection: SelectionFields | None = None
    block_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="blockwise: tokens of each block, after which all candidates continue from the best one. "
        f"Default: {DEFAULT_BLOCK_TOKENS}.",
    )
    deadline_s: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S)] | None = Field(
        default=None,
        description="Seconds after which the best finished candidate is the answer; stopped_by is then deadline.",
    )
    stopping: StoppingFields | None = None
    on_reward_failure: RewardFailurePolicy | None = Field(
        default=None,
        description="How candidates are ranked if the reward model fails; default: error, a reply with status 503.",
    )
    return_candidates: bool | None = Field(default=None, description="Also return every candidate with its reward.")
    stream_candidates: bool | None = Field(
        default=None,
        description="With stream: send an event, in a chunk without choices, when a candidate has finished, failed or "
        "been scored.",
    )

    def to_stopping(self, best_of: int, n: int) -> Stopping:
        """The stopping policy.

        Raises:
            BadRequestError: the policy cannot be combined with the strategy, or its options are invalid.
        """
        if self.stopping is None:
            return Stopping()
        policy = self.stopping.to_stopping(best_of, n)
        if policy.reads_rewards and (self.strategy or "argmax") != "argmax":
            raise BadRequestError(
                f"{policy.policy} stops by the highest reward, and the strategy {self.strategy} does not choose by the "
                "highest reward; leave one of them out.",
                param="nbest.stopping",
            )
        return policy

    def tokens_of_block(self, n: int) -> int | None:
        """The tokens of a block; None where the strategy selects among whole candidates.

        Raises:
            BadRequestError: block_tokens without blockwise, or a field that blockwise cannot be combined with.
        """
        if self.strategy != "blockwise":
            if self.block_tokens is not None:
                raise BadRequestError(
                    "nbest.block_tokens is used by the strategy blockwise only; choose that, or leave it out.",
                    param="nbest.block_tokens",
                )
            return None
        if self.stopping is not None and self.stopping.policy != "none":
            raise BadRequestError(
                "blockwise samples all candidates of every block; leave nbest.stopping out.", param="nbest.stopping"
            )
        if self.stream_candidates:
            raise BadRequestError(
                "blockwise streams the chosen blocks only; leave nbest.stream_candidates out.",
                param="nbest.stream_candidates",
            )
        if n > 1:
            raise BadRequestError(f"blockwise returns one choice, not n={n}; leave n out.", param="n")
        return self.block_tokens or DEFAULT_BLOCK_TOKENS

    def to_selection(self) -> SelectionOptions:
        """The options of the strategy.

        Raises:
            BadRequestError: a field that the strategy does not use, or an invalid pattern or pointer for the answer.
        """
        strategy = self.strategy or "argmax"
        if strategy in WITHOUT_REWARDS and self.reward_model is not None:
            raise BadRequestError(
                f"The strategy {strategy} uses no reward model; leave reward_model out, or choose weighted_majority.",
                param="nbest.reward_model",
            )
        given = self.selection.model_dump(exclude_none=True) if self.selection else {}
        for name in sorted(given.keys() - OPTIONS_OF[strategy]):
            strategies = " and ".join(other for other, options in OPTIONS_OF.items() if name in options)
            param = f"nbest.selection.{name}"
            raise BadRequestError(f"{param} is used by {strategies}, and the strategy is {strategy}.", param=param)
        if given.keys() >= {"answer_regex", "answer_json_pointer"}:
            raise BadRequestError(
                "Give either nbest.selection.answer_regex or answer_json_pointer, not both.",
                param="nbest.selection.answer_json_pointer",
            )
        options = SelectionOptions(**given)
        options.extract()
        return options
