from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from server.generation.adapter_shapes import check_fits, policy_shapes
from server.generation.weight_store import WeightStore
from tests.support.tiny_models import Architecture, save_tiny_policy
from training.lora_targets import lora_targets


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        pytest.param("gpt2", {"c_attn", "c_proj", "c_fc"}, id="GPT-2's Conv1D"),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
        pytest.param("qwen3_moe", {"q_proj", "k_proj", "v_proj", "o_proj"}, id="the attention of a mixture of experts"),
    ],
)
def test_the_linear_layers_of_all_blocks_get_adapters_that_the_server_accepts(
    architecture: Architecture, modules: set[str], tmp_path: Path
) -> None:
    base = save_tiny_policy(tmp_path / "base", architecture=architecture)
    policy = AutoModelForCausalLM.from_pretrained(base)
    targets = lora_targets(policy.base_model)
    get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", r=2, **targets)).save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == modules == set(targets["target_modules"])
    adapter = WeightStore().copy_adapter(tmp_path / "adapter")
    check_fits(adapter, policy_shapes(str(base), trust_remote_code=False), source="adapter")
