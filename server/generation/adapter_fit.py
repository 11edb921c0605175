"""Whether an adapter was made for this policy, told before an engine reads it.

The engine itself would take an adapter of a smaller model, padded, and pass over layers that the policy does not have.
So every matrix of the adapter is compared with the one it changes: A is rank × inputs, B is outputs × rank.
"""

from collections.abc import Mapping

from server.errors import BadRequestError
from server.generation.weights import Adapter

PEFT_PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[int, ...]]


def policy_shapes(path: str, *, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every matrix of a model, by the name of its module; its configuration is all that is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):  # no memory for weights
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor) and weight.dim() == 2
    }


def check_fits(adapter: Adapter, policy: Shapes, *, told_as: str) -> None:
    """Compares each pair of matrices with the policy's own; the order of a matrix's sides is the layer's affair.

    Raises:
        BadRequestError: it was made for another model.
    """
    made_for = "; it was made for another model, give the adapter of this one."
    for module, changed in changed_shapes(adapter.shapes).items():
        if module not in policy:
            raise BadRequestError(f"The adapter {told_as} changes {module}, which the policy does not have{made_for}")
        if sorted(changed) != sorted(policy[module]):
            sides, own = (" by ".join(map(str, shape)) for shape in (changed, policy[module]))
            raise BadRequestError(
                f"The adapter {told_as} changes {module} as a matrix of {sides}, and the policy's is {own}{made_for}"
            )


def changed_shapes(tensors: Shapes) -> dict[str, tuple[int, int]]:
    """Module -> outputs and inputs of what B·A adds to it."""
    sides: dict[str, dict[str, int]] = {}
    for name, shape in tensors.items():
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in ("lora_A", "lora_embedding_A"):
            sides.setdefault(stem, {})["inputs"] = shape[1]
        elif kind in ("lora_B", "lora_embedding_B"):
            sides.setdefault(stem, {})["outputs"] = shape[0]
    return {
        stem.removeprefix(PEFT_PREFIX): (found["outputs"], found["inputs"])
        for stem, found in sides.items()
        if len(found) == 2
    }
