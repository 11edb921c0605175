"""The policy that learns, its reference and its values, in the memory of about one model.

The base is frozen and learning is a LoRA adapter, so the reference is the same model with the adapter switched off, and
the values are read by a linear head from the policy's own last states (which the head's loss does not move). A reward
adapter over the same base may read it too (`held_trunk`). Where all weights learn, the reference is a copy of its own.

Log-probabilities are those of softmax(logits / temperature), of policy and reference alike: what is drawn is drawn from
that. Dropout is off. What learns is float32; products may be taken in bfloat16 (`reranker.models.device`), and a frozen
base that is stored in bfloat16 is then held in it.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from reranker.models.device import takes_bfloat16
from reranker.models.shared_trunk import SharedTrunk, alias
from training.atomic_directory import appearing_whole
from training.policy.finetune import TrainablePolicy, write_adapter, write_weights
from training.rl.config import PPOTraining, RLTraining
from training.rl.losses import entropies, token_logprobs
from training.rl.trajectories import Completion, Rows

ADAM_EPS = 1e-5
LARGEST_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class PolicyOutputs:
    """What the policy says of each token of some completions; `values` are 0 where there is no value head."""

    logprobs_N_T: torch.Tensor
    values_N_T: torch.Tensor


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of a batch before it is learnt from."""

    logprobs_N_T: torch.Tensor
    ref_logprobs_N_T: torch.Tensor
    values_N_T: torch.Tensor
    entropies_N_T: torch.Tensor
    mask_N_T: torch.Tensor


class Learner:
    """Reads completions, and takes steps of the optimiser."""

    def __init__(self, settings: RLTraining, device: torch.device, *, optimiser_steps: int) -> None:
        self.device = device
        self._settings = settings
        self._policy = TrainablePolicy(
            settings.policy, dropout=False, bfloat16=self.computes_bfloat16 and not settings.full
        )
        base = self._policy.model.to(device).eval()
        self.held_trunk = None if settings.full else SharedTrunk(self._policy.directory, alias(base.base_model))
        self._reference = copy.deepcopy(base).requires_grad_(False) if settings.full else None
        self.model: Any = base if settings.full else get_peft_model(base, self._policy.adapters).eval()
        if settings.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()  # which is what switches it on; there is no dropout that this could bring back
        self._value_head = torch.nn.Linear(base.config.hidden_size, 1).to(device)
        torch.nn.init.zeros_(self._value_head.weight)
        torch.nn.init.zeros_(self._value_head.bias)
        self._has_values = isinstance(settings, PPOTraining)
        self.learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [{"params": self.learning, "lr": settings.learning_rate}]
        if isinstance(settings, PPOTraining):
            groups.append({"params": list(self._value_head.parameters()), "lr": settings.value_learning_rate})
        self._optimiser = torch.optim.Adam(groups, eps=ADAM_EPS)
        warmup_steps = round(settings.warmup_fraction * optimiser_steps)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimiser, lambda step: _share_of_rate(step, warmup_steps, optimiser_steps)
        )

    @property
    def tokenizer(self) -> Any:
        return self._policy.tokenizer

    @property
    def max_length(self) -> int:
        return int(self._policy.max_length)

    @property
    def computes_bfloat16(self) -> bool:
        return takes_bfloat16(self._settings.dtype, self.device.type)

    @property
    def learning_rate(self) -> float:
        return float(self._schedule.get_last_lr()[0])

    @property
    def parameters(self) -> dict[str, list[torch.Tensor]]:
        """All that it holds, by what they are for; the reference has some of its own only where all weights learn."""
        adapter = [] if self._reference is not None else self.learning
        in_adapter = {id(parameter) for parameter in adapter}
        return {
            "base": [parameter for parameter in self.model.parameters() if id(parameter) not in in_adapter],
            "policy": adapter,
            "values": list(self._value_head.parameters()),
            "reference": [] if self._reference is None else list(self._reference.parameters()),
        }

    @property
    def optimiser_state(self) -> list[torch.Tensor]:
        return [tensor for of_one in self._optimiser.state.values() for tensor in of_one.values()]

    def read(self, completions: Sequence[Completion]) -> PolicyOutputs:
        """The policy as it is, with gradients."""
        rows = Rows.of(completions, self.device)
        logits_N_T_V, values_N_T = self._read(self.model, rows)
        return PolicyOutputs(token_logprobs(logits_N_T_V, rows.token_ids_N_T), values_N_T)

    @torch.no_grad()
    def measure(self, completions: Sequence[Completion]) -> Measured:
        """Policy, reference and values, before anything is learnt from these completions."""
        mask_N_T = Rows.of(completions, self.device).mask_N_T
        logprobs_N_T, ref_logprobs_N_T, values_N_T, entropies_N_T = (torch.zeros_like(mask_N_T) for _ in range(4))
        for begin in range(0, len(completions), self._settings.rows_at_once):
            rows = Rows.of(completions[begin : begin + self._settings.rows_at_once], self.device)
            place = (slice(begin, begin + len(rows.mask_N_T)), slice(rows.mask_N_T.shape[1]))
            logits_N_T_V, values_N_T[place] = self._read(self.model, rows)
            logprobs_N_T[place] = token_logprobs(logits_N_T_V, rows.token_ids_N_T)
            entropies_N_T[place] = entropies(logits_N_T_V)
            with self._as_reference() as reference:
                logits_N_T_V, _ = self._read(reference, rows)
            ref_logprobs_N_T[place] = token_logprobs(logits_N_T_V, rows.token_ids_N_T)
        return Measured(logprobs_N_T, ref_logprobs_N_T, values_N_T, entropies_N_T, mask_N_T)

    def step(self) -> float:
        """One step of the optimiser along the gradients that have come together; the norm of the policy's."""
        norm = torch.nn.utils.clip_grad_norm_(self.learning, LARGEST_GRADIENT_NORM)
        torch.nn.utils.clip_grad_norm_(self._value_head.parameters(), LARGEST_GRADIENT_NORM)
        self._optimiser.step()
        self._schedule.step()
        self._optimiser.zero_grad()
        return float(norm)

    def write_for_engine(self, out: Path) -> Path:
        """OUT/adapter, or OUT/model where all weights learn, which are not rounded."""
        if not self._settings.full:
            return write_adapter(self.model, self._policy, out)
        with appearing_whole(out / "model") as unfinished:
            self.model.save_pretrained(unfinished)
        return out / "model"

    def write_result(self, out: Path, *, merge: bool) -> Path:
        """The last of what can be served: OUT/adapter and, if all weights learn or it is merged, OUT/model.

        A model is rounded to the precision of its base, so the learner is of no use after this.
        """
        return write_weights(self.model, self._policy, out, merge=merge)

    def is_finite(self) -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in self.learning)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on as if nothing had happened."""
        return {
            "learning": [parameter.detach() for parameter in self.learning],
            "value_head": self._value_head.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        for parameter, saved in zip(self.learning, state["learning"], strict=True):
            parameter.copy_(saved)
        self._value_head.load_state_dict(state["value_head"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])

    @contextmanager
    def _as_reference(self) -> Iterator[Any]:
        if self._reference is not None:
            yield self._reference
            return
        with self.model.disable_adapter():
            yield self.model

    def _read(self, model: Any, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits_N_T_V, values_N_T) of each token of the completions, told by what stands before it."""
        attention_mask_N_L = rows.attention_mask_N_L[:, :-1]  # the last token is predicted, and predicts nothing
        states: list[torch.Tensor] = []  # the last ones, as the head reads them: those of all layers take memory
        head = model.get_output_embeddings()
        with (
            head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.computes_bfloat16),
        ):
            output = model(
                input_ids=rows.input_ids_N_L[:, :-1],
                attention_mask=attention_mask_N_L,
                position_ids=(attention_mask_N_L.cumsum(-1) - 1).clamp(min=0),
                logits_to_keep=rows.mask_N_T.shape[1],
                use_cache=False,
            )
        logits_N_T_V = output.logits.float()
        if self._settings.temperature != 1:
            logits_N_T_V = logits_N_T_V / self._settings.temperature
        if not self._has_values:
            return logits_N_T_V, torch.zeros_like(rows.mask_N_T)
        return logits_N_T_V, self._value_head(states[0].detach().float())[..., 0]


def _share_of_rate(step: int, warmup_steps: int, steps: int) -> float:
    """Up over the first steps, and then down to 0 at the last."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))
