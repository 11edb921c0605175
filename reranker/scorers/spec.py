"""The grammar of SPEC, by which scorers are named on the command line: `--reward-model NAME=SPEC`.

    movie-sentiment · DIR · OWNER/NAME     a reward model: prepared name, directory, hub id
    vllm:URL[/classify|/score|/pooling][#TOKENIZER]
    judge:MODEL · pairwise:judge:MODEL     MODEL at the judge's address, or `self` for the served policy
    python:FILE_OR_MODULE:FUNCTION
    logprob · self_certainty
    ensemble:mean:NAME,NAME · ensemble:min:NAME,NAME · ensemble:mean-std:K:NAME,NAME
    cascade:KEEP:CHEAP,DEAR

What stands before the first colon decides; anything else is a reward model (a directory that is called like a form is
written ./logprob). Nothing is loaded or looked up here, so the command line can check a SPEC at once. Each form's
meaning is in the header of the module that makes it (`reranker.scorers.registry` has the table).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args
from urllib.parse import urldefrag

Route = Literal["classify", "score", "pooling"]
Measure = Literal["logprob", "self_certainty"]
Combination = Literal["mean", "min", "mean-std"]

OWN_POLICY = "self"
"""The MODEL of a judge that is the served policy."""


class ScorerSpecError(ValueError):
    """What was named is not a scorer that can be served. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class RewardModelSpec:
    """A prepared name, directory or hub id."""

    source: str


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """`server` is the address before /v1/models; `tokenizer` None is the one the server names."""

    server: str
    route: Route
    tokenizer: str | None


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """`pairwise`: it compares two candidates instead of grading one."""

    model: str
    pairwise: bool


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """A file that ends in .py, or a module, and the name of the function in it."""

    file_or_module: str
    name: str


@dataclass(frozen=True, slots=True)
class LikelihoodSpec:
    """Which of the policy's own probabilities."""

    measure: Measure


@dataclass(frozen=True, slots=True)
class EnsembleSpec:
    """`k` is the weight of the standard deviation in mean-std."""

    combination: Combination
    members: tuple[str, ...]
    k: float = 0.0


@dataclass(frozen=True, slots=True)
class CascadeSpec:
    """Of what the first of `members` ranks highest, `keep` go to the second: a count, or below 1 a share."""

    keep: float
    members: tuple[str, str]


OfOthers = EnsembleSpec | CascadeSpec
"""Made of other served scorers."""
ScorerSpec = RewardModelSpec | EndpointSpec | JudgeSpec | FunctionSpec | LikelihoodSpec | OfOthers


def parse(spec: str) -> ScorerSpec:
    """What the SPEC names.

    Raises:
        ScorerSpecError: it begins like one of the forms and does not go on like it.
    """
    form, _, rest = spec.partition(":")
    return FORMS[form](spec, rest) if form in FORMS else RewardModelSpec(spec)


def parse_all(specs: Mapping[str, str]) -> dict[str, ScorerSpec]:
    """The SPEC of every served name, in order; the members of those made of others are among the names.

    Raises:
        ScorerSpecError: with the first name that is wrong.
    """
    parsed: dict[str, ScorerSpec] = {}
    for name, spec in specs.items():
        try:
            parsed[name] = parse(spec)
        except ScorerSpecError as error:
            raise ScorerSpecError(f"{name}={error}") from error
    for place, (name, one) in enumerate(parsed.items()):
        for member in one.members if isinstance(one, OfOthers) else ():
            if member not in parsed:
                raise ScorerSpecError(
                    f"{name}={specs[name]}: no scorer {member!r} is served; add it with --reward-model {member}=SPEC"
                )
            if isinstance(parsed[member], OfOthers) and list(parsed).index(member) >= place:
                raise ScorerSpecError(f"{name}={specs[name]}: {member!r}, made of others, must come before this one")
    return parsed


def _endpoint(spec: str, rest: str) -> EndpointSpec:
    address, tokenizer = urldefrag(rest)
    if not address.startswith(("http://", "https://")):
        raise ScorerSpecError(f"{spec} needs an address, as in vllm:http://localhost:8001/classify")
    address = address.rstrip("/")
    server, _, last = address.rpartition("/")
    if last not in get_args(Route):
        server, last = address, "classify"
    return EndpointSpec(server.removesuffix("/v1"), cast(Route, last), tokenizer or None)


def _judge(spec: str, rest: str) -> JudgeSpec:
    if not rest:
        raise ScorerSpecError(f"{spec} needs a model, as in judge:MODEL, or judge:{OWN_POLICY} for the served policy")
    return JudgeSpec(rest, pairwise=False)


def _pairwise(spec: str, rest: str) -> JudgeSpec:
    form, _, model = rest.partition(":")
    if form != "judge" or not model:
        raise ScorerSpecError(f"{spec} should read pairwise:judge:MODEL or pairwise:judge:{OWN_POLICY}")
    return JudgeSpec(model, pairwise=True)


def _function(spec: str, rest: str) -> FunctionSpec:
    file_or_module, _, name = rest.rpartition(":")
    is_module = all(part.isidentifier() for part in file_or_module.split("."))
    if not name.isidentifier() or not (is_module or file_or_module.endswith(".py")):
        raise ScorerSpecError(f"{spec} should read python:FILE.py:FUNCTION or python:MODULE:FUNCTION")
    return FunctionSpec(file_or_module, name)


def _likelihood(spec: str, rest: str) -> LikelihoodSpec:
    if rest:
        raise ScorerSpecError(f"{spec} takes nothing after the colon; leave {rest} out")
    return LikelihoodSpec(cast(Measure, spec.removesuffix(":")))


def _ensemble(spec: str, rest: str) -> EnsembleSpec:
    how, _, names = rest.partition(":")
    k = 0.0
    if how == "mean-std":
        number, _, names = names.partition(":")
        try:
            k = float(number)
        except ValueError:
            k = math.nan
        if not 0 <= k < math.inf:
            raise ScorerSpecError(f"{spec}: K is {number!r} and should be a number not below 0, as in mean-std:1.0:…")
    members = tuple(name for name in names.split(",") if name)
    if how not in get_args(Combination) or len(members) < 2 or len(set(members)) < len(members):
        raise ScorerSpecError(
            f"{spec} should read ensemble:mean:NAME,NAME, ensemble:min:NAME,NAME or ensemble:mean-std:K:NAME,NAME, "
            "with the names of two or more other served scorers"
        )
    return EnsembleSpec(cast(Combination, how), members, k)


def _cascade(spec: str, rest: str) -> CascadeSpec:
    number, _, names = rest.partition(":")
    members = tuple(name for name in names.split(",") if name)
    try:
        keep = float(number)
    except ValueError:
        keep = math.nan
    if not (0 < keep < 1 or (keep >= 1 and keep.is_integer())) or len(members) != 2 or members[0] == members[1]:
        raise ScorerSpecError(
            f"{spec} should read cascade:KEEP:CHEAP,DEAR, with KEEP a count as in cascade:4:… or a share as in "
            "cascade:0.25:…, and the names of two other served scorers"
        )
    return CascadeSpec(keep, members)


FORMS: dict[str, Callable[[str, str], ScorerSpec]] = {
    "vllm": _endpoint,
    "judge": _judge,
    "pairwise": _pairwise,
    "python": _function,
    "logprob": _likelihood,
    "self_certainty": _likelihood,
    "ensemble": _ensemble,
    "cascade": _cascade,
}
"""What stands before the first colon -> the parser of (SPEC, what stands after it)."""
