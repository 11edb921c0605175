"""The objects inside a request; `schemas` explains the marks."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue

from reranker.candidate import Message
from reranker.reward_posterior import UNKNOWN, Prior
from reranker.stopping import WAVE, AdaptiveN, SpeculativeRejection, Stopping, StragglerCut
from server.errors import BadRequestError
from server.pipeline.blockwise import DEFAULT_BLOCK_TOKENS
from server.pipeline.strategies import WITHOUT_REWARDS, SelectionOptions, Strategy
from server.pipeline.types import RewardFailurePolicy
from server.schemas.strict import EmptyList, FieldHint, IgnoredField, OnlyFalse, StrictModel

MAX_DEADLINE_S = 86_400.0
"""A day. Timers overflow on far larger numbers, and nobody waits that long."""
MAX_PATTERN_CHARS = 1000
MAX_CHECKPOINTS = 16
MAX_PRIOR = 1_000_000
"""Far past any reward, and its square still a number."""


def _text_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class TextPart(StrictModel):
    """A piece of a message."""

    type: Annotated[
        Literal["text"],
        FieldHint("only text parts are read here, not image_url, input_audio, file or refusal parts; send text."),
    ]
    text: str
    prompt_cache_breakpoint: Annotated[None, IgnoredField("prefixes are shared without breakpoints; leave it out.")] = (
        None
    )


class ChatMessage(StrictModel):
    """One turn. `developer` is OpenAI's newer name for `system` and is rendered as such."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        FieldHint("roles here are system, developer, user and assistant; tool and function need a tool parser."),
    ]
    content: Annotated[list[TextPart], BeforeValidator(_text_parts, json_schema_input_type=str | list[TextPart])]
    name: Annotated[None, IgnoredField("chat templates have no place for names; write it into the content.")] = None
    refusal: Annotated[None, IgnoredField("refusals are not rendered; send the text as content.")] = None
    audio: Annotated[None, IgnoredField("audio is not read here; send text.")] = None
    annotations: Annotated[EmptyList | None, IgnoredField("annotations are not rendered; leave them out.")] = None
    tool_calls: Annotated[EmptyList | None, IgnoredField("tool calls are not rendered here; send text only.")] = None
    function_call: Annotated[None, IgnoredField("function calls are not rendered here; send text only.")] = None
    tool_call_id: Annotated[None, IgnoredField("there is no tool parser here; send text only.")] = None

    def to_message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        return Message(role, "\n".join(part.text for part in self.content))


class JsonSchemaFormat(StrictModel):
    """A schema that every candidate is held to while it is generated."""

    name: str
    schema_: Annotated[
        dict[str, JsonValue], Field(alias="schema"), FieldHint("give the JSON schema as an object of finite values.")
    ]
    strict: bool | None = Field(default=None, description="The schema is enforced either way.")
    description: Annotated[None, IgnoredField("the model does not see it; describe the output in a message.")] = None


class ResponseFormat(StrictModel):
    """What the text of a candidate must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def to_json_schema(self) -> dict[str, Any] | None:
        """The JSON schema of `SamplingParams`: None for free text, {} for any JSON object."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise BadRequestError(
                "response_format.json_schema goes with type json_schema and with no other; send both or neither.",
                param="response_format.json_schema",
            )
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {} if self.type == "json_object" else None


class StreamOptions(StrictModel):
    """OpenAI's options of a stream."""

    include_usage: bool | None = Field(default=None, description="Send a last chunk with the usage.")
    include_obfuscation: Annotated[
        OnlyFalse | None, IgnoredField("chunks are not padded against traffic analysis; leave it out.")
    ] = None


class PriorFields(StrictModel):
    """What is known of a prompt's rewards before the first is drawn; `nbest batch` tells it as reward_prior."""

    mean: float = Field(ge=-MAX_PRIOR, le=MAX_PRIOR)
    mean_weight: float = Field(ge=0, le=MAX_PRIOR, description="So many rewards tell a prompt's mean as well.")
    sd: float = Field(gt=0, le=MAX_PRIOR, description="Standard deviation of one prompt's rewards.")
    sd_weight: int = Field(ge=0, le=MAX_PRIOR, description="So many rewards tell a prompt's deviation as well.")

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
"""What each policy reads of `StoppingFields`."""
DEFAULT_QUANTILE = 0.9


class StoppingFields(StrictModel):
    """When to stop before all candidates are complete; each option goes with some policies (docs/stopping.md)."""

    policy: Annotated[
        PolicyName,
        FieldHint("stop by none, adaptive, speculative_rejection, adaptive_rejection or straggler_cut."),
    ]
    price: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="adaptive: what one more candidate costs, in units of the reward; drawing stops when the expected "
        "rise of the best is less.",
    )
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="adaptive, in place of a price: stop when the best is estimated to beat this share of what the "
        f"policy would write. Default: {DEFAULT_QUANTILE:g}.",
    )
    prior: PriorFields | None = Field(
        default=None,
        description="adaptive: how rewards are distributed. Without it little is saved (docs/stopping.md).",
    )
    target_reward: float | None = Field(
        default=None, description="adaptive, straggler_cut: a candidate with this reward or more is enough."
    )
    wave: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description=f"adaptive: candidates drawn at a time. Default: {WAVE}."
    )
    checkpoints: (
        Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=MAX_CHECKPOINTS)] | None
    ) = Field(
        default=None,
        description="speculative_rejection: tokens, ascending, at which the candidates are scored as they stand and "
        "the worst given up.",
    )
    reject_share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="speculative_rejection: the share given up at each checkpoint. Default: 0.5."
    )
    wait_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="straggler_cut: the share of candidates to wait for. Default: 1."
    )

    def to_stopping(self, best_of: int, n: int) -> Stopping:
        """The policy for `best_of` candidates of which `n` are asked for.

        Raises:
            BadRequestError: an option that the policy would not look at, or none where it needs one.
        """
        given = self.model_dump(exclude_none=True, exclude={"policy"})
        for name in sorted(given.keys() - STOPPING_OPTIONS_OF[self.policy]):
            policies = " and ".join(one for one, options in STOPPING_OPTIONS_OF.items() if name in options)
            param = f"nbest.stopping.{name}"
            raise BadRequestError(f"{param} goes with {policies}, and the policy is {self.policy}.", param=param)
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
                f"{self.policy} needs {param}: the lengths in tokens at which to compare, such as [16, 32].",
                param=param,
            )
        if sorted(set(self.checkpoints)) != self.checkpoints:
            raise BadRequestError(f"{param} are not ascending; sort them, each once.", param=param)
        return SpeculativeRejection(tuple(self.checkpoints), self.reject_share or 0.5, n)

    def _stragglers(self, n: int) -> StragglerCut:
        if self.wait_share is None and self.target_reward is None:
            raise BadRequestError(
                "straggler_cut needs nbest.stopping.wait_share or target_reward, else there is nothing to cut.",
                param="nbest.stopping",
            )
        return StragglerCut(self.wait_share or 1.0, self.target_reward, n)


class SelectionFields(StrictModel):
    """Options of the strategies; each goes with some of them and is refused beside the others."""

    answer_regex: Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARS)] | None = Field(
        default=None,
        description="majority, weighted_majority: the answer is what the one group of this RE2 pattern holds where it "
        "first matches; default: the whole text.",
    )
    answer_json_pointer: Annotated[str, Field(max_length=MAX_PATTERN_CHARS)] | None = Field(
        default=None,
        description="majority, weighted_majority: the answer is what this JSON pointer (RFC 6901) leads to.",
    )
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] | None = Field(
        default=None, description="soft, weighted_majority: in units of the reward; small is argmax. Default: 1."
    )
    beta: Annotated[float, Field(ge=0, le=1e3)] | None = Field(
        default=None, description="mbr: weight of the mean similarity to the other candidates; 0 is argmax. Default: 1."
    )


OPTIONS_OF: dict[Strategy, set[str]] = {
    "argmax": set(),
    "majority": {"answer_regex", "answer_json_pointer"},
    "weighted_majority": {"answer_regex", "answer_json_pointer", "temperature"},
    "soft": {"temperature"},
    "mbr": {"beta"},
    "blockwise": set(),
}
"""What each strategy reads of `SelectionFields`."""


class NBestOptions(StrictModel):
    """Our extension of OpenAI's requests."""

    reward_model: str | None = Field(default=None, description="One of the served scorers; default: the first.")
    strategy: Annotated[
        Strategy | None,
        FieldHint("how the winner is chosen: argmax (default), majority, weighted_majority, soft, mbr or blockwise."),
    ] = None
    selection: SelectionFields | None = None
    block_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description=f"blockwise: tokens drawn before the best is gone on from. Default: {DEFAULT_BLOCK_TOKENS}.",
    )
    deadline_s: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S)] | None = Field(
        default=None, description="Answer after this many seconds with the best finished so far; the reply says so."
    )
    stopping: StoppingFields | None = None
    on_reward_failure: RewardFailurePolicy | None = Field(
        default=None,
        description="What orders the candidates if the reward model fails; default: error, which answers 503.",
    )
    return_candidates: bool | None = Field(default=None, description="Also return every candidate with its reward.")
    stream_candidates: bool | None = Field(
        default=None,
        description="With stream: tell at once, in a chunk without choices, when a candidate has finished, failed, or "
        "been scored.",
    )

    def to_stopping(self, best_of: int, n: int) -> Stopping:
        """The stopping policy.

        Raises:
            BadRequestError: it cannot be followed under this strategy, or its options contradict it.
        """
        if self.stopping is None:
            return Stopping()
        policy = self.stopping.to_stopping(best_of, n)
        if policy.reads_rewards and (self.strategy or "argmax") != "argmax":
            raise BadRequestError(
                f"{policy.policy} looks for the highest reward, and the strategy {self.strategy} for something else; "
                "leave one of them out.",
                param="nbest.stopping",
            )
        return policy

    def tokens_of_block(self, n: int) -> int | None:
        """Tokens between two choices; None where there is one choice, at the end.

        Raises:
            BadRequestError: the strategy has no blocks, or something else that was asked for goes by whole candidates.
        """
        if self.strategy != "blockwise":
            if self.block_tokens is not None:
                raise BadRequestError(
                    "nbest.block_tokens goes with the strategy blockwise; name that, or leave it out.",
                    param="nbest.block_tokens",
                )
            return None
        if self.stopping is not None and self.stopping.policy != "none":
            raise BadRequestError(
                "blockwise draws all candidates of every block; leave nbest.stopping out.", param="nbest.stopping"
            )
        if self.stream_candidates:
            raise BadRequestError(
                "blockwise streams what it has chosen and no other candidate; leave nbest.stream_candidates out.",
                param="nbest.stream_candidates",
            )
        if n > 1:
            raise BadRequestError(f"blockwise ends with one answer, not with n={n}; leave n out.", param="n")
        return self.block_tokens or DEFAULT_BLOCK_TOKENS

    def to_selection(self) -> SelectionOptions:
        """The options of the strategy.

        Raises:
            BadRequestError: a field that the strategy would not look at, or an answer that cannot be extracted so.
        """
        strategy = self.strategy or "argmax"
        if strategy in WITHOUT_REWARDS and self.reward_model is not None:
            raise BadRequestError(
                f"The strategy {strategy} asks no reward model; leave reward_model out, or choose weighted_majority.",
                param="nbest.reward_model",
            )
        given = self.selection.model_dump(exclude_none=True) if self.selection else {}
        for name in sorted(given.keys() - OPTIONS_OF[strategy]):
            strategies = " and ".join(one for one, options in OPTIONS_OF.items() if name in options)
            param = f"nbest.selection.{name}"
            raise BadRequestError(f"{param} goes with {strategies}, and the strategy is {strategy}.", param=param)
        if given.keys() >= {"answer_regex", "answer_json_pointer"}:
            raise BadRequestError(
                "Give one of nbest.selection.answer_regex and answer_json_pointer.",
                param="nbest.selection.answer_json_pointer",
            )
        options = SelectionOptions(**given)
        options.extract()
        return options
