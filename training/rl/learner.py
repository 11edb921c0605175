"""The trained policy, its reference and its value head, in the memory of about one model.

The base is frozen and a LoRA adapter is trained, so the reference is the same model with the adapter switched off. A
linear head computes the values from the policy's own last hidden states; its loss has no gradient in the policy. A
reward adapter over the same base can use the base too (`shared_trunk`). With `full` the reference is a separate copy.

Log-probabilities are those of softmax(logits / temperature), the distribution that is sampled, for policy and reference
alike. Dropout is off. Trained parameters are float32. Products may be in bfloat16 (`reranker.models.device`); a frozen
base that is stored in bfloat16 is then held in bfloat16.
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
from training.atomic_directory import atomic_model_directory
from training.policy.finetune import TrainablePolicy, write_adapter, write_weights
from training.rl.config import PPOTraining, RLTraining
from training.rl.losses import entropies, token_logprobs
from training.rl.trajectories import Completion, PaddedBatch

ADAM_EPS = 1e-5
LARGEST_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class PolicyOutputs:
    """Log-probability and value of each token of N completions; values are 0 without a value head."""

    logprobs_N_T: torch.Tensor
    values_N_T: torch.Tensor


@dataclass(frozen=True, slots=True)
class BatchMeasures:
    """What is computed for a batch of N completions before the update; logprobs and entropies are in nats."""

    logprobs_N_T: torch.Tensor
    ref_logprobs_N_T: torch.Tensor
    values_N_T: torch.Tensor
    entropies_N_T: torch.Tensor
    mask_N_T: torch.Tensor


class Learner:
    """Computes log-probabilities and values of completions, and takes optimiser steps."""

    def __init__(self, settings: RLTraining, device: torch.device, *, optimiser_steps: int) -> None:
        self.device = device
        self._settings = settings
        self._policy = TrainablePolicy(settings, dropout=False, bfloat16=self.computes_bfloat16 and not settings.full)
        base = self._policy.model.to(device).eval()
        self.shared_trunk = None if settings.full else SharedTrunk(self._policy.directory, alias(base.base_model))
        self._reference = copy.deepcopy(base).requires_grad_(False) if settings.full else None
        self.model: Any = base if settings.full else get_peft_model(base, self._policy.adapters).eval()
        if settings.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()  # checkpointing works in training mode only; dropout is 0, so nothing else changes
        self._value_head = torch.nn.Linear(base.config.hidden_size, 1).to(device)
        torch.nn.init.zeros_(self._value_head.weight)
        torch.nn.init.zeros_(self._value_head.bias)
        self._has_values = isinstance(settings, PPOTraining)
        self.trained_parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [{"params": self.trained_parameters, "lr": settings.learning_rate}]
        if isinstance(settings, PPOTraining):
            groups.append({"params": list(self._value_head.parameters()), "lr": settings.value_learning_rate})
        self._optimiser = torch.optim.Adam(groups, eps=ADAM_EPS)
        warmup_steps = round(settings.warmup_fraction * optimiser_steps)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimiser, lambda step: _rate_factor(step, warmup_steps, optimiser_steps)
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
        """All parameters by purpose; the reference has parameters of its own only with `full`."""
        adapter = [] if self._reference is not None else self.trained_parameters
        in_adapter = {id(parameter) for parameter in adapter}
        return {
            "base": [parameter for parameter in self.model.parameters() if id(parameter) not in in_adapter],
            "policy": adapter,
            "values": list(self._value_head.parameters()),
            "reference": [] if self._reference is None else list(self._reference.parameters()),
        }

    @property
    def optimiser_state(self) -> list[torch.Tensor]:
        return [tensor for state in self._optimiser.state.values() for tensor in state.values()]

    def forward(self, completions: Sequence[Completion]) -> PolicyOutputs:
        """The outputs of the current policy, with gradients."""
        batch = PaddedBatch.of(completions, self.device)
        logits_N_T_V, values_N_T = self._forward(self.model, batch)
        return PolicyOutputs(token_logprobs(logits_N_T_V, batch.token_ids_N_T), values_N_T)

    @torch.no_grad()
    def measure(self, completions: Sequence[Completion]) -> BatchMeasures:
        """The outputs of policy, reference and value head, without gradients, before these completions are learnt."""
        mask_N_T = PaddedBatch.of(completions, self.device).mask_N_T
        logprobs_N_T, ref_logprobs_N_T, values_N_T, entropies_N_T = (torch.zeros_like(mask_N_T) for _ in range(4))
        for begin in range(0, len(completions), self._settings.rows_at_once):
            part = PaddedBatch.of(completions[begin : begin + self._settings.rows_at_once], self.device)
            index = (slice(begin, begin + len(part.mask_N_T)), slice(part.mask_N_T.shape[1]))
            logits_N_T_V, values_N_T[index] = self._forward(self.model, part)
            logprobs_N_T[index] = token_logprobs(logits_N_T_V, part.token_ids_N_T)
            entropies_N_T[index] = entropies(logits_N_T_V)
            with self._as_reference() as reference:
                logits_N_T_V, _ = self._forward(reference, part)
            ref_logprobs_N_T[index] = token_logprobs(logits_N_T_V, part.token_ids_N_T)
        return BatchMeasures(logprobs_N_T, ref_logprobs_N_T, values_N_T, entropies_N_T, mask_N_T)

    def step(self) -> float:
        """Takes one optimiser step with the accumulated gradients; returns the norm of the policy's gradient."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained_parameters, LARGEST_GRADIENT_NORM)
        torch.nn.utils.clip_grad_norm_(self._value_head.parameters(), LARGEST_GRADIENT_NORM)
        self._optimiser.step()
        self._schedule.step()
        self._optimiser.zero_grad()
        return float(norm)

    def write_for_engine(self, out: Path) -> Path:
        """Writes OUT/adapter or, with `full`, OUT/model without rounding; returns the directory written."""
        if not self._settings.full:
            return write_adapter(self.model, self._policy, out)
        with atomic_model_directory(out / "model") as unfinished:
            self.model.save_pretrained(unfinished)
        return out / "model"

    def write_result(self, out: Path, *, merge: bool) -> Path:
        """Writes OUT/adapter, and OUT/model with `full` or `merge`; returns the directory to serve.

        OUT/model is rounded to the precision of its base, in place, so the learner cannot be used afterwards.
        """
        return write_weights(self.model, self._policy, out, merge=merge)

    def is_finite(self) -> bool:
        """Whether all trained parameters are finite."""
        return all(bool(parameter.isfinite().all()) for parameter in self.trained_parameters)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to continue exactly from here."""
        return {
            "learning": [parameter.detach() for parameter in self.trained_parameters],
            "value_head": self._value_head.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        for parameter, saved in zip(self.trained_parameters, state["learning"], strict=True):
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

    def _forward(self, model: Any, batch: PaddedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits_N_T_V, values_N_T) that predict each token of the completions from the tokens before it."""
        attention_mask_N_L = batch.attention_mask_N_L[:, :-1]  # the last token is predicted, but predicts nothing
        states: list[torch.Tensor] = []  # the input of the output head; returning the states of all layers takes memory
        head = model.get_output_embeddings()
        with (
            head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.computes_bfloat16),
        ):
            output = model(
                input_ids=batch.input_ids_N_L[:, :-1],
                attention_mask=attention_mask_N_L,
                position_ids=(attention_mask_N_L.cumsum(-1) - 1).clamp(min=0),
                logits_to_keep=batch.mask_N_T.shape[1],
                use_cache=False,
            )
        logits_N_T_V = output.logits.float()
        if self._settings.temperature != 1:
            logits_N_T_V = logits_N_T_V / self._settings.temperature
        if not self._has_values:
            return logits_N_T_V, torch.zeros_like(batch.mask_N_T)
        return logits_N_T_V, self._value_head(states[0].detach().float())[..., 0]


def _rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """The factor of the peak learning rate: it rises over the warm-up steps and then falls to 0 at the last step."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))
