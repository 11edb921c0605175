"""A reward model: a transformer trunk and a scalar head, read at the last token.

Two formats load:

    Hugging Face   any `AutoModelForSequenceClassification` with one label; encoders (BERT) and decoders (Llama) alike
    adapter        a PEFT directory (adapter_config.json, adapter_model.safetensors with the head inside) over a base
                   model, with `reward_config.json` beside it: which base, how it renders, how many layers it reads

Weights come from safetensors only: a pickle can run code. A head that is missing is an error: transformers would make
one up at random and the scores would look like scores.

A decoder's own forward finds the scored token by comparing with the pad token, which is wrong where pad equals EOS;
so the trunk runs here, the hidden state is gathered by the attention mask, and the head is applied to that alone.
To score, the trunk reads rows in which each prompt stands once (`prefix_sharing`) if it can, padded batches if not.
An encoder pools in its own way, and does it itself.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from reranker.candidate import Prompt
from reranker.models.bundled import PreparationError, resolve
from reranker.models.device import Device, Precision, pick_device, takes_bfloat16
from reranker.models.prefix_sharing import SharingTrunk
from reranker.models.rendering import Rendered, Renderer, RenderingStyle, pad, scored_index
from reranker.models.shared_trunk import SharedTrunk, read_lowest

CONFIG_FILE = "reward_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
HEAD_NAMES = ("score", "classifier")
"""What transformers calls the head of a sequence classifier: decoders `score`, encoders `classifier`."""


class RewardModelError(Exception):
    """What was named is not a reward model that can be loaded. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """How a reward model trained here is to be used.

    `num_layers`: the trunk's layers it reads, from below; None for all of them. `reward_mean` and `reward_std`: of its
    rewards on candidates it was trained on, to set them to mean 0 and deviation 1; None where nobody measured.
    """

    base_model: str
    style: RenderingStyle
    num_layers: int | None = None
    reward_mean: float | None = None
    reward_std: float | None = None

    def save(self, directory: Path) -> None:
        (directory / CONFIG_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Self:
        try:
            return cls(**json.loads((directory / CONFIG_FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise RewardModelError(f"{directory}: an adapter needs a {CONFIG_FILE} beside it: {error}") from error


@dataclass(frozen=True, slots=True)
class ComputedReward:
    """A reward, and the tokens that were computed for it: the candidate's, and its prompt's unless they were known."""

    reward: float
    computed_tokens: int


class RewardModel:
    """Scores rendered candidates; plain torch, blocking. Higher is better, unbounded, not comparable between models.

    `shares_prompts`: a prompt is computed once for its candidates (`reranker.models.prefix_sharing`), and a batch has
    no padding. Not for two threads at once.
    """

    def __init__(self, name: str, model: Any, renderer: Renderer, device: torch.device) -> None:
        self.name = name
        self.renderer = renderer
        self._model = model.to(device).eval()
        self._device = device
        self._sharing = SharingTrunk.where_equal(self._model, device)

    @classmethod
    def load(
        cls,
        spec: str,
        *,
        device: Device = "auto",
        dtype: Precision = "auto",
        trust_remote_code: bool = False,
        held: SharedTrunk | None = None,
    ) -> "RewardModel":
        """The reward model of a prepared name, a directory or a hub id.

        `device` auto takes CUDA if present; `dtype` auto is what that device computes fastest. On a CPU an adapter is
        merged in float32, which saves its matrix products, and the sum rounded once if bfloat16 is what is computed.
        Elsewhere the trunk is loaded in bfloat16, where merging would round the adapter away: it stays beside it, as it
        does over a trunk that is `held`, if it is its own.

        Raises:
            RewardModelError: with the reason and the way out.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise RewardModelError("there is no CUDA device that torch can use here; run with --device cpu")
        place = torch.device(pick_device(device))
        computed = torch.bfloat16 if takes_bfloat16(dtype, place.type) else torch.float32
        loaded = torch.float32 if place.type == "cpu" else computed
        with _told_as_reward_model_error(spec):
            directory = resolve(spec)
            _check_directory(directory)
            if not (Path(directory) / "adapter_config.json").is_file():
                model = load_classifier(directory, dtype=computed, trust_remote_code=trust_remote_code)
                ours = (Path(directory) / CONFIG_FILE).is_file()  # fully fine-tuned here, in the style it tells
                style = RewardConfig.load(Path(directory)).style if ours else None
                renderer = make_renderer(directory, model, style, trust_remote_code=trust_remote_code)
                return cls(spec, model, renderer, place)
            config = RewardConfig.load(Path(directory))
            _check_adapter(Path(directory))
            base = resolve(config.base_model)
            if held is not None and held.is_of(base):
                model = PeftModel.from_pretrained(held.classifier(config.num_layers), directory).get_base_model()
            else:
                model = load_classifier(
                    base,
                    new_head=True,
                    num_layers=config.num_layers,
                    dtype=loaded,
                    trust_remote_code=trust_remote_code,
                )
                adapted = PeftModel.from_pretrained(model, directory)
                model = adapted.merge_and_unload() if loaded is torch.float32 else adapted.get_base_model()
                _keep_head(model.to(computed))
            renderer = make_renderer(base, model, config.style, trust_remote_code=trust_remote_code)
            return cls(spec, model, renderer, place)

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and candidate together."""
        return self.renderer.max_length

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def device(self) -> str:
        return str(self._device)

    def render(self, prompt: Prompt, candidate_text: str) -> Rendered:
        """The tokens to be scored; see `reranker.models.rendering`.

        Raises:
            reranker.models.rendering.RenderingError: the candidate cannot be read by this model.
        """
        return self.renderer.render(prompt, candidate_text)

    @property
    def shares_prompts(self) -> bool:
        return self._sharing is not None

    def score(self, batch_N: Sequence[Rendered]) -> list[float]:
        """N rewards from one batch, in order; each is what the candidate would get alone."""
        return [reading.reward for reading in self.read(batch_N)]

    @torch.inference_mode()
    def read(self, batch_N: Sequence[Rendered]) -> list[ComputedReward]:
        """N rewards from one batch, in order, and what each cost."""
        if not batch_N:
            return []
        if self._sharing is None:
            tokenizer = self.renderer.tokenizer
            input_ids_N_T, mask_N_T = pad(batch_N, pad_id=tokenizer.pad_token_id or 0)
            rewards_N = forward_rewards(self._model, input_ids_N_T.to(self._device), mask_N_T.to(self._device))
            computed_tokens_N = [len(rendered.token_ids) for rendered in batch_N]
        else:
            scored_N_D, computed_tokens_N = self._sharing.scored_states(batch_N)
            rewards_N = _head_rewards(self._model.score, scored_N_D)
        return [ComputedReward(*one) for one in zip(rewards_N.tolist(), computed_tokens_N, strict=True)]


def forward_rewards(model: Any, input_ids_N_T: torch.Tensor, attention_mask_N_T: torch.Tensor) -> torch.Tensor:
    """rewards_N in float32 of a sequence classifier with one label; differentiable, shared with reward training."""
    head = getattr(model, "score", None)
    if head is None:
        logits_N_1: torch.Tensor = model(input_ids=input_ids_N_T, attention_mask=attention_mask_N_T).logits
        return logits_N_1[:, 0].float()
    trunk = model.base_model
    states_N_T_D = trunk(input_ids=input_ids_N_T, attention_mask=attention_mask_N_T, use_cache=False).last_hidden_state
    rows_N = torch.arange(len(states_N_T_D), device=states_N_T_D.device)
    scored_N_D = states_N_T_D[rows_N, scored_index(attention_mask_N_T)]
    return _head_rewards(head, scored_N_D)


def _head_rewards(head: Any, scored_N_D: torch.Tensor) -> torch.Tensor:
    with torch.autocast(scored_N_D.device.type, enabled=False):  # one dot product: float32 costs nothing here
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
    """A sequence classifier with one label. `new_head`: the weights hold none yet, an adapter or training brings it.

    Raises:
        RewardModelError: several labels, or weights that are missing.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if new_head:
        config.num_labels = 1
    elif not any("ForSequenceClassification" in name for name in config.architectures or ()):
        raise RewardModelError(
            f"{directory} is a {', '.join(config.architectures or ['model'])} and not a sequence classifier; "
            "train a reward adapter for it with: nbest train reward"
        )
    elif config.num_labels != 1:
        raise RewardModelError(
            f"{directory} has {config.num_labels} labels and a reward model has one; "
            "choose a model trained to give a single score"
        )
    if num_layers is not None:
        read_lowest(config, num_layers)
    with _quiet_transformers():  # it reports the layers and heads left out on purpose; what matters is checked below
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
            f"{directory} lacks the weights {', '.join(sorted(missing)[:3])}, which would be made up at random; "
            "it is not a complete reward model"
        )
    return _keep_head(model)


def _keep_head(model: Any) -> Any:
    """A decoder's head is read in float32 (`_head_rewards`)."""
    if hasattr(model, "score"):
        model.score.float()
    return model


def make_renderer(
    directory: str, model: Any, style: RenderingStyle | None, *, trust_remote_code: bool = False
) -> Renderer:
    """The renderer of a model; by default in the chat style if its tokenizer has a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    context = model.config.get_text_config().max_position_embeddings
    chosen: RenderingStyle = style or ("chat" if tokenizer.chat_template else "document")
    return Renderer(tokenizer, chosen, max_length=min(tokenizer.model_max_length, context))


def _check_directory(spec: str) -> None:
    """Turns away what is plainly wrong before anyone asks the hub for it."""
    path = Path(spec)
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            raise RewardModelError(
                f"{spec} holds no .safetensors file, and pickled weights are never loaded because they can run code; "
                "save the model again with save_pretrained"
            )
    elif path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:  # no hub id looks like this
        raise RewardModelError(f"there is no directory {spec}; give a reward model's directory, name or hub id")


def _check_adapter(directory: Path) -> None:
    if not (directory / ADAPTER_FILE).is_file():
        raise RewardModelError(f"{directory} has no {ADAPTER_FILE}; train it with: nbest train reward")
    with safe_open(directory / ADAPTER_FILE, framework="pt") as tensors:
        if not any(part in HEAD_NAMES for name in tensors.keys() for part in name.split(".")):  # noqa: SIM118 no dict
            raise RewardModelError(
                f"{directory / ADAPTER_FILE} holds no scalar head, so it adapts a policy and not a reward model; "
                "train one with: nbest train reward"
            )


@contextmanager
def _told_as_reward_model_error(spec: str) -> Iterator[None]:
    """What the libraries raise over files they cannot read becomes one sentence that names the model."""
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
