"""A reward model: a transformer trunk and a scalar head that reads the last token.

Two formats can be loaded:

    Hugging Face   any `AutoModelForSequenceClassification` with one label, an encoder (BERT) or a decoder (Llama);
                   a `reward_config.json` beside it may give the rendering style
    adapter        a PEFT directory (adapter_config.json, adapter_model.safetensors with the head inside) over a base
                   model, with `reward_config.json` beside it: the base, the rendering style, the number of layers

Weights are loaded from safetensors only, because a pickle can run code. A missing head is an error, because
transformers would initialise it at random, and random scores look like scores.

A decoder's own forward finds the scored token by comparing with the pad token, which is wrong where pad equals EOS. So
this module runs the trunk, selects the hidden state by the attention mask, and applies the head only to that. For
scoring, the trunk reads packed rows that hold each prompt once (`prefix_sharing`), or padded batches if it cannot. An
encoder has its own pooling, so its own forward is used.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from reranker.candidate import Prompt
from reranker.models.bundled import PreparationError, resolve
from reranker.models.device import Device, Precision, pick_device, takes_bfloat16
from reranker.models.prefix_sharing import PrefixSharingTrunk
from reranker.models.rendering import Rendered, Renderer, pad, pad_segments, reads_segments, scored_index, style_of
from reranker.models.rendering_style import STYLES, RenderingStyle
from reranker.models.shared_trunk import SharedTrunk, keep_lowest_layers

CONFIG_FILE = "reward_config.json"
OWN_FUNCTION = "a function of your own (python:FILE.py:FUNCTION)"
ADAPTER_FILE = "adapter_model.safetensors"
HEAD_NAMES = ("score", "classifier")
"""Names that transformers gives the head of a sequence classifier: `score` in decoders, `classifier` in encoders."""


class RewardModelError(Exception):
    """The reward model cannot be loaded. The message gives the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """How to use a reward model.

    `base_model` is the trunk of an adapter; a model with weights of its own needs none. `num_layers` is how many of the
    trunk's lowest layers it reads; None stands for all.
    """

    base_model: str | None
    style: RenderingStyle
    num_layers: int | None = None

    def save(self, directory: Path) -> None:
        """Writes `reward_config.json` to the directory."""
        (directory / CONFIG_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Reads `reward_config.json` from the directory; unknown fields are those of other versions.

        Raises:
            RewardModelError: it is missing or wrong.
        """
        try:
            content = json.loads((directory / CONFIG_FILE).read_text())
            return cls(content.get("base_model"), content["style"], content.get("num_layers"))
        except OSError as error:
            raise RewardModelError(f"{directory}: an adapter needs a {CONFIG_FILE} beside it: {error}") from error
        except (ValueError, KeyError, AttributeError) as error:
            raise RewardModelError(
                f'{directory / CONFIG_FILE} should hold an object with "style", one of {", ".join(STYLES)}'
            ) from error


@dataclass(frozen=True, slots=True)
class ComputedReward:
    """A reward and the tokens computed for it: the candidate's, and the prompt's unless they were cached or shared."""

    reward: float
    computed_tokens: int


class RewardModel:
    """Scores rendered candidates with plain, blocking torch calls; not thread-safe.

    Rewards are unbounded and not comparable between models; higher is better. If `shares_prompts`, a prompt is computed
    once for all its candidates (`reranker.models.prefix_sharing`), and batches have no padding.
    """

    def __init__(self, name: str, model: Any, renderer: Renderer, device: torch.device) -> None:
        self.name = name
        self.renderer = renderer
        self._model = model.to(device).eval()
        self._device = device
        self._sharing = PrefixSharingTrunk.if_supported(self._model, device)

    @classmethod
    def load(
        cls,
        spec: str,
        *,
        device: Device = "auto",
        dtype: Precision = "auto",
        trust_remote_code: bool = False,
        shared_trunk: SharedTrunk | None = None,
        style: RenderingStyle | None = None,
    ) -> "RewardModel":
        """Loads the reward model of a prepared name, a directory or a hub id.

        With `style` None the model's `reward_config.json` decides the form that it reads, else
        `reranker.models.rendering.style_of`.

        With `device` auto it uses CUDA if present; with `dtype` auto the precision that the device computes fastest.
        On a CPU an adapter is merged into the trunk in float32, which saves its matrix products, and the sum is
        rounded once if the model computes in bfloat16. On other devices the trunk is loaded in bfloat16, where merging
        would round small adapter weights to nothing, so the adapter stays separate. It also stays separate over
        `shared_trunk`, which is used if it is the trunk of the adapter's base.

        Raises:
            RewardModelError: the model cannot be loaded.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise RewardModelError("torch finds no usable CUDA device; run with --device cpu")
        torch_device = torch.device(pick_device(device))
        compute_dtype = torch.bfloat16 if takes_bfloat16(dtype, torch_device.type) else torch.float32
        load_dtype = torch.float32 if torch_device.type == "cpu" else compute_dtype
        with _as_reward_model_error(spec):
            directory = resolve(spec)
            _check_directory(directory)
            if not (Path(directory) / "adapter_config.json").is_file():
                model = load_classifier(directory, dtype=compute_dtype, trust_remote_code=trust_remote_code)
                if style is None and (Path(directory) / CONFIG_FILE).is_file():
                    style = RewardConfig.load(Path(directory)).style
                renderer = make_renderer(directory, model, style, trust_remote_code=trust_remote_code)
                reward_model = cls(spec, model, renderer, torch_device)
                reward_model._check_padding()
                return reward_model
            config = RewardConfig.load(Path(directory))
            _check_adapter(Path(directory))
            if config.base_model is None:
                raise RewardModelError(f"{Path(directory) / CONFIG_FILE} names no base_model, which an adapter needs")
            base = resolve(config.base_model)
            if shared_trunk is not None and shared_trunk.is_of(base):
                classifier = shared_trunk.classifier(config.num_layers)
                model = PeftModel.from_pretrained(classifier, directory).get_base_model()
            else:
                model = load_classifier(
                    base,
                    new_head=True,
                    num_layers=config.num_layers,
                    dtype=load_dtype,
                    trust_remote_code=trust_remote_code,
                )
                adapted = PeftModel.from_pretrained(model, directory)
                model = adapted.merge_and_unload() if load_dtype is torch.float32 else adapted.get_base_model()
                _with_float32_head(model.to(compute_dtype))
            renderer = make_renderer(base, model, style or config.style, trust_remote_code=trust_remote_code)
            return cls(spec, model, renderer, torch_device)

    def _check_padding(self) -> None:
        """Refuses a model that scores a text differently in a padded batch than alone, as XLNet does.

        Raises:
            RewardModelError: it does.
        """
        if self._sharing is not None:
            return
        short, long = (self.render(Prompt(text="a"), text) for text in ("a", "a a a"))
        (alone,), batched = self.score([short]), self.score([short, long])[0]
        rounding = torch.finfo(next(self._model.parameters()).dtype).eps ** 0.5
        if not abs(batched - alone) <= rounding * (1 + abs(alone)):
            raise RewardModelError(
                f"{self.name} scores a text {alone:g} alone and {batched:g} in a batch, so its scores cannot be "
                "compared; choose another reward model"
            )

    @property
    def max_length(self) -> int:
        """The most tokens that a prompt and a candidate may have together."""
        return self.renderer.max_length

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def device(self) -> str:
        return str(self._device)

    def render(self, prompt: Prompt, candidate_text: str) -> Rendered:
        """The token sequence of a candidate; see `reranker.models.rendering`.

        Raises:
            reranker.models.rendering.RenderingError: the candidate cannot be rendered for this model.
        """
        return self.renderer.render(prompt, candidate_text)

    @property
    def shares_prompts(self) -> bool:
        return self._sharing is not None

    def score(self, batch_N: Sequence[Rendered]) -> list[float]:
        """N rewards from one batch, in order; each is the same as if the candidate were scored alone."""
        return [result.reward for result in self.compute(batch_N)]

    @torch.inference_mode()
    def compute(self, batch_N: Sequence[Rendered]) -> list[ComputedReward]:
        """N rewards from one batch, in order, each with the number of tokens computed for it."""
        if not batch_N:
            return []
        if self._sharing is None:
            tokenizer = self.renderer.tokenizer
            input_ids_N_T, mask_N_T = pad(batch_N, pad_id=tokenizer.pad_token_id or 0)
            segment_ids_N_T = pad_segments(batch_N)
            rewards_N = forward_rewards(
                self._model,
                input_ids_N_T.to(self._device),
                mask_N_T.to(self._device),
                None if segment_ids_N_T is None else segment_ids_N_T.to(self._device),
            )
            computed_tokens_N = [len(rendered.token_ids) for rendered in batch_N]
        else:
            scored_N_D, computed_tokens_N = self._sharing.scored_states(batch_N)
            rewards_N = _head_rewards(self._model.score, scored_N_D)
        return [
            ComputedReward(reward, computed_tokens)
            for reward, computed_tokens in zip(rewards_N.tolist(), computed_tokens_N, strict=True)
        ]


def forward_rewards(
    model: Any,
    input_ids_N_T: torch.Tensor,
    attention_mask_N_T: torch.Tensor,
    segment_ids_N_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """rewards_N in float32 of a sequence classifier with one label; differentiable, used by reward training too.

    Only encoders read `segment_ids_N_T`.
    """
    head = getattr(model, "score", None)
    if head is None:
        segments = {} if segment_ids_N_T is None else {"token_type_ids": segment_ids_N_T}
        output = model(input_ids=input_ids_N_T, attention_mask=attention_mask_N_T, **segments)
        logits_N_1: torch.Tensor = output.logits
        return logits_N_1[:, 0].float()
    trunk = model.base_model
    states_N_T_D = trunk(input_ids=input_ids_N_T, attention_mask=attention_mask_N_T, use_cache=False).last_hidden_state
    rows_N = torch.arange(len(states_N_T_D), device=states_N_T_D.device)
    scored_N_D = states_N_T_D[rows_N, scored_index(attention_mask_N_T)]
    return _head_rewards(head, scored_N_D)


def _head_rewards(head: Any, scored_N_D: torch.Tensor) -> torch.Tensor:
    with torch.autocast(scored_N_D.device.type, enabled=False):  # float32 costs nothing for one dot product
        rewards_N: torch.Tensor = head(scored_N_D.float())[:, 0]
    return rewards_N


def load_classifier(
    directory: str,
    *,
    new_head: bool = False,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Any:
    """Loads a sequence classifier with one label.

    With `new_head` the weights need not contain a head, because an adapter or the training provides it.

    Raises:
        RewardModelError: it is no sequence classifier, has several labels, or lacks weights.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    _check_architecture(directory, config, new_head=new_head)
    if new_head:
        config.num_labels = 1
    if num_layers is not None:
        keep_lowest_layers(config, num_layers)
    with _quiet_transformers():  # it warns of layers and heads left out on purpose; missing weights are checked below
        model, report = AutoModelForSequenceClassification.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    missing = {name for name in report["missing_keys"] if not (new_head and name.startswith(HEAD_NAMES))}
    if missing:
        raise RewardModelError(
            f"{directory} lacks the weights {', '.join(sorted(missing)[:3])}, which would be initialised at random; "
            "it is not a complete reward model"
        )
    return _with_float32_head(model)


def _with_float32_head(model: Any) -> Any:
    """Converts a decoder's head to float32, in which `_head_rewards` computes."""
    if hasattr(model, "score"):
        model.score.float()
    return model


def make_renderer(
    directory: str, model: Any, style: RenderingStyle | None, *, trust_remote_code: bool = False
) -> Renderer:
    """The renderer of a model; without a `style` it is `reranker.models.rendering.style_of` the model."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    return Renderer(
        tokenizer,
        style or style_of(tokenizer, model.config, directory),
        max_length=int(min(tokenizer.model_max_length, _context(model))),
        segments=reads_segments(model.config),
    )


def _context(model: Any) -> float:
    """The most tokens that the model's positions allow; infinite for a model without a limit."""
    positions = max(0, getattr(model.config.get_text_config(), "max_position_embeddings", 0)) or math.inf
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return float(positions - module.padding_idx - 1)  # RoBERTa counts positions from after the padding's
    return float(positions)


def _check_architecture(directory: str, config: Any, *, new_head: bool) -> None:
    """Refuses what is no reward model, or with `new_head` what cannot become one, with what to do instead."""
    architectures = config.architectures or ["model"]
    kind = f"{directory} is a {', '.join(architectures)}"
    if config.is_encoder_decoder:
        raise RewardModelError(f"{kind}, an encoder-decoder, and a reward model is an encoder or a decoder")
    has_own_code = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not has_own_code:
        raise RewardModelError(
            f"{kind}, and transformers has no sequence classifier of the type {config.model_type}; choose a model of "
            "another type, such as llama or qwen3"
        )
    if new_head:
        return
    names = " ".join(architectures)
    if "ForSequenceClassification" in names:
        if config.num_labels != 1:
            raise RewardModelError(
                f"{directory} has {config.num_labels} labels and a reward model has one; choose a model trained to "
                f"give a single score, or combine the labels in {OWN_FUNCTION}"
            )
    elif re.search("TokenClassification|ProcessReward|PRM", names, re.IGNORECASE):
        raise RewardModelError(
            f"{kind}, a process reward model: it scores the steps of an answer, and a reward model gives an answer one "
            f"score; choose one that does, or combine the steps' scores in {OWN_FUNCTION}"
        )
    elif "ForCausalLM" in names or "LMHead" in names:
        raise RewardModelError(
            f"{kind} and not a sequence classifier; train a reward adapter over it with: nbest train reward"
        )
    else:
        raise RewardModelError(
            f"{kind} and not a sequence classifier with one score; choose one that is, or call this model with its own "
            f"code in {OWN_FUNCTION}"
        )


def _check_directory(spec: str) -> None:
    """Rejects a name that is clearly wrong before it is looked up on the hub."""
    path = Path(spec)
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            raise RewardModelError(
                f"{spec} contains no .safetensors file, and pickled weights are never loaded because they can run "
                "code; save the model again with save_pretrained"
            )
    elif path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:  # no hub id looks like this
        raise RewardModelError(f"there is no directory {spec}; give a reward model's directory, name or hub id")


def _check_adapter(directory: Path) -> None:
    if not (directory / ADAPTER_FILE).is_file():
        raise RewardModelError(f"{directory} has no {ADAPTER_FILE}; train it with: nbest train reward")
    with safe_open(directory / ADAPTER_FILE, framework="pt") as tensors:
        if not any(part in HEAD_NAMES for name in tensors.keys() for part in name.split(".")):  # noqa: SIM118 no dict
            raise RewardModelError(
                f"{directory / ADAPTER_FILE} contains no scalar head, so it adapts a policy and not a reward model; "
                "train a reward model with: nbest train reward"
            )


@contextmanager
def _as_reward_model_error(spec: str) -> Iterator[None]:
    """Turns the libraries' errors about unreadable files into a `RewardModelError` that names the model."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, PreparationError) as error:
        raise RewardModelError(f"cannot load the reward model {spec}: {error}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
