"""The grammar of SPEC, which defines a scorer on the command line: `--reward-model NAME=SPEC`.

    movie-sentiment · DIR · OWNER/NAME     a reward model: prepared name, directory, hub id
    vllm:URL[/classify|/score|/pooling][#TOKENIZER]
    style:STYLE:SPEC                       a SPEC of one of the two forms above, and the style in which it reads prompts
    judge:MODEL · pairwise:judge:MODEL     MODEL at the judge's address, or `self` for the served policy
    python:FILE_OR_MODULE:FUNCTION
    logprob · self_certainty
    ensemble:mean:NAME,NAME · ensemble:min:NAME,NAME · ensemble:mean-std:K:NAME,NAME
    cascade:KEEP:CHEAP,EXPENSIVE

The word before the first colon selects the form. Any other SPEC is a reward model (write ./logprob for a directory that
is named like a form). Nothing is loaded or looked up here, so the command line can check a SPEC at once. The header of
each scorer's module explains its form; `reranker.scorers.registry` maps a form to its scorer.

Modules that handle every form import this one whole (`from reranker.scorers import spec`) and write `spec.JudgeSpec`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args
from urllib.parse import urldefrag

from reranker.models.rendering_style import STYLES, RenderingStyle

Route = Literal["classify", "score", "pooling"]
Measure = Literal["logprob", "self_certainty"]
Combination = Literal["mean", "min", "mean-std"]

OWN_POLICY = "self"
"""The MODEL in a judge's SPEC that stands for the served policy."""


class ScorerSpecError(ValueError):
    """The SPEC does not define a scorer that can be served. The message gives the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class RewardModelSpec:
    """A reward model; `source` is a prepared name, a directory or a hub id.

    `style` is how it reads a prompt; None stands for what is known of the model.
    """

    source: str
    style: RenderingStyle | None = None


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """A pooling server: its base address, the endpoint, and the tokenizer; None stands for the one it reports.

    `style` is as for `RewardModelSpec`.
    """

    server: str
    route: Route
    tokenizer: str | None
    style: RenderingStyle | None = None


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """A language model as judge; `pairwise` if it compares two candidates instead of grading one."""

    model: str
    pairwise: bool


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """A Python function: a file that ends in .py or a module, and the function's name in it."""

    file_or_module: str
    name: str


@dataclass(frozen=True, slots=True)
class LogprobSpec:
    """A measure of the policy's own log-probabilities."""

    measure: Measure


@dataclass(frozen=True, slots=True)
class EnsembleSpec:
    """A combination of other served scorers; `k` weights the standard deviation in mean-std."""

    combination: Combination
    members: tuple[str, ...]
    k: float = 0.0


@dataclass(frozen=True, slots=True)
class CascadeSpec:
    """Two other served scorers: the second scores the `keep` (a count, or below 1 a share) best of the first."""

    keep: float
    members: tuple[str, str]


CompositeSpec = EnsembleSpec | CascadeSpec
"""Scorers that are made of other served scorers, their `members`."""
ScorerSpec = RewardModelSpec | EndpointSpec | JudgeSpec | FunctionSpec | LogprobSpec | CompositeSpec


def parse(spec: str) -> ScorerSpec:
    """Parses one SPEC.

    Raises:
        ScorerSpecError: it begins with a form's name and does not match that form.
    """
    form, _, rest = spec.partition(":")
    return FORMS[form](spec, rest) if form in FORMS else RewardModelSpec(spec)


def parse_all(specs: Mapping[str, str]) -> dict[str, ScorerSpec]:
    """Parses the SPEC of every served name, in order, and checks that members of composite scorers are served.

    Raises:
        ScorerSpecError: a SPEC is wrong; the message names the first such scorer.
    """
    parsed: dict[str, ScorerSpec] = {}
    for name, spec in specs.items():
        try:
            parsed[name] = parse(spec)
        except ScorerSpecError as error:
            raise ScorerSpecError(f"{name}={error}") from error
    for position, (name, scorer_spec) in enumerate(parsed.items()):
        for member in scorer_spec.members if isinstance(scorer_spec, CompositeSpec) else ():
            if member not in parsed:
                raise ScorerSpecError(
                    f"{name}={specs[name]}: no scorer {member!r} is served; add it with --reward-model {member}=SPEC"
                )
            if isinstance(parsed[member], CompositeSpec) and list(parsed).index(member) >= position:
                raise ScorerSpecError(
                    f"{name}={specs[name]}: {member!r} is itself made of other scorers and must come before {name!r}"
                )
    return parsed


def _endpoint(spec: str, rest: str) -> EndpointSpec:
    address, tokenizer = urldefrag(rest)
    if not address.startswith(("http://", "https://")):
        raise ScorerSpecError(f"{spec} needs an address, such as vllm:http://localhost:8001/classify")
    address = address.rstrip("/")
    server, _, last = address.rpartition("/")
    if last not in get_args(Route):
        server, last = address, "classify"
    return EndpointSpec(server.removesuffix("/v1"), cast(Route, last), tokenizer or None)


def _style(spec: str, rest: str) -> RewardModelSpec | EndpointSpec:
    style, _, source = rest.partition(":")
    scorer_spec = parse(source) if style in STYLES and source else None
    if not isinstance(scorer_spec, RewardModelSpec | EndpointSpec):
        raise ScorerSpecError(
            f"{spec} should read style:STYLE:SPEC, with a STYLE of {', '.join(STYLES)} and the SPEC of a reward model, "
            "such as style:pair:org/model"
        )
    if isinstance(scorer_spec, EndpointSpec) and scorer_spec.route == "score":
        raise ScorerSpecError(f"{spec}: the server combines prompt and candidate for /score; leave style:{style}: out")
    return replace(scorer_spec, style=cast(RenderingStyle, style))


def _judge(spec: str, rest: str) -> JudgeSpec:
    if not rest:
        raise ScorerSpecError(f"{spec} needs a model: judge:MODEL, or judge:{OWN_POLICY} for the served policy")
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


def _logprob(spec: str, rest: str) -> LogprobSpec:
    if rest:
        raise ScorerSpecError(f"{spec} takes nothing after the colon; remove {rest}")
    return LogprobSpec(cast(Measure, spec.removesuffix(":")))


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
            raise ScorerSpecError(f"{spec}: K is {number!r} and must be a number of at least 0, as in mean-std:1.0:…")
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
            f"{spec} should read cascade:KEEP:CHEAP,EXPENSIVE, with KEEP a count as in cascade:4:… or a share as in "
            "cascade:0.25:…, and the names of two other served scorers"
        )
    return CascadeSpec(keep, members)


FORMS: dict[str, Callable[[str, str], ScorerSpec]] = {
    "vllm": _endpoint,
    "style": _style,
    "judge": _judge,
    "pairwise": _pairwise,
    "python": _function,
    "logprob": _logprob,
    "self_certainty": _logprob,
    "ensemble": _ensemble,
    "cascade": _cascade,
}
"""The word before the first colon -> the parser, which takes the SPEC and the part after that colon."""
