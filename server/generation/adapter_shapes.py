"""Checks that a LoRA adapter was made for this policy, before an engine reads it.

The engine itself would pad and accept an adapter of a smaller model, and would ignore layers that the policy does not
have. So every matrix of the adapter is compared with the matrix it changes: A is rank × inputs, B is outputs × rank.
"""

from collections.abc import Mapping

from server.errors import BadRequestError
from server.generation.weight_store import Adapter

PEFT_PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[int, ...]]


def policy_shapes(path: str, *, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every weight matrix of a model, by module name; reads only the model's configuration."""
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


def check_fits(adapter: Adapter, policy: Shapes, *, source: str) -> None:
    """Compares each change of the adapter with the policy's own matrix, in either order of the two dimensions.

    The order depends on the layer. `source` is the adapter's path in error messages.

    Raises:
        BadRequestError: the adapter was made for another model.
    """
    remedy = "; it was made for another model, give the adapter of this one."
    for module, shape in changed_shapes(adapter.shapes).items():
        if module not in policy:
            raise BadRequestError(f"The adapter {source} changes {module}, which the policy does not have{remedy}")
        if sorted(shape) != sorted(policy[module]):
            change, own = (" by ".join(map(str, dimensions)) for dimensions in (shape, policy[module]))
            raise BadRequestError(
                f"The adapter {source} changes {module} as a matrix of {change}, and the policy's is {own}{remedy}"
            )


def changed_shapes(tensors: Shapes) -> dict[str, tuple[int, int]]:
    """Module name -> (outputs, inputs) of the product B·A that the adapter adds to the module's weights."""
    dimensions: dict[str, dict[str, int]] = {}
    for name, shape in tensors.items():
        stem, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in ("lora_A", "lora_embedding_A"):
            dimensions.setdefault(stem, {})["inputs"] = shape[1]
        elif kind in ("lora_B", "lora_embedding_B"):
            dimensions.setdefault(stem, {})["outputs"] = shape[0]
    return {
        stem.removeprefix(PEFT_PREFIX): (pair["outputs"], pair["inputs"])
        for stem, pair in dimensions.items()
        if len(pair) == 2
    }
