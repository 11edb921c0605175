"""Models and tokenizers of a few kilobytes, created from scratch: real code paths, no download, milliseconds to run.

Weights are random with a large standard deviation, so that every token changes the score and a test that two scores are
equal can fail. They are drawn by numpy, because torch's generator gives other numbers on a CPU with other vector
instructions.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from reranker.models.reward_model import RewardConfig, load_classifier

Architecture = Literal["llama", "qwen2", "bert"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The film was a delight from start to finish and the cast was great.",
    "The film was dull, far too long, and the ending made no sense at all.",
    "What is the capital of France? The capital of France is Paris.",
]
CONTEXT_LENGTH = 128
WEIGHT_STD = 0.3
ENGINE_HEAD_DIM = 32
"""The smallest head dimension that the engine's attention supports on a CPU."""


def tiny_tokenizer(
    *, adds_bos: bool = False, chat_template: str | None = CHATML, corpus: list[str] = CORPUS
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer whose pad token is EOS, as in most chat models; another corpus gives other tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=chat_template,
        model_max_length=CONTEXT_LENGTH,
    )


def tiny_bert_tokenizer() -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer that encodes a text as [CLS] … [SEP]; it has no chat template."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    special_tokens = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=special_tokens
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=CONTEXT_LENGTH,
    )


def tiny_config(
    architecture: Architecture, tokenizer: PreTrainedTokenizerBase, *, num_layers: int = 2, **more: Any
) -> PretrainedConfig:
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "bert": BertConfig}[architecture]
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    heads = {} if architecture == "bert" else {"num_key_value_heads": 2}
    return kind(**fields | heads | more)


def save_tiny_policy(
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_layers: int = 2,
    seed: int = 0,
    **more: Any,
) -> Path:
    """Saves a tiny Llama language model with its tokenizer; `more` are fields of its configuration."""
    tokenizer = tokenizer or tiny_tokenizer()
    config = tiny_config("llama", tokenizer, num_layers=num_layers, **{"tie_word_embeddings": True} | more)
    draw_weights(AutoModelForCausalLM.from_config(config), seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_tiny_reward_model(
    directory: Path,
    architecture: Architecture = "llama",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_labels: int = 1,
    seed: int = 0,
) -> Path:
    """Saves a tiny sequence classifier with its tokenizer."""
    tokenizer = tokenizer or (tiny_bert_tokenizer() if architecture == "bert" else tiny_tokenizer())
    config = tiny_config(architecture, tokenizer, num_labels=num_labels)
    draw_weights(AutoModelForSequenceClassification.from_config(config), seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_tiny_adapter(directory: Path, policy: Path, *, seed: int = 0, rank: int = 4, **more: Any) -> Path:
    """Saves a random LoRA adapter for a saved policy; `more` are fields of its configuration."""
    targets = more.pop("target_modules", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **more)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(policy), config)
    draw_weights(adapted, seed).save_pretrained(directory)
    return directory


def save_tiny_reward_adapter(
    directory: Path, policy: Path, *, num_layers: int | None = None, task_type: str = "SEQ_CLS"
) -> Path:
    """Saves a reward adapter for a saved policy with every weight random, as if it had been trained."""
    model = get_peft_model(
        load_classifier(str(policy), new_head=True, num_layers=num_layers),
        LoraConfig(task_type=task_type, target_modules="all-linear", r=2),
    )
    draw_weights(model, seed=1).save_pretrained(directory)
    RewardConfig(str(policy), "document", num_layers).save(directory)
    return directory


@torch.no_grad()
def draw_weights(model: Any, seed: int) -> Any:
    """Replaces every trainable weight and bias by random numbers, except those of norms; returns the model."""
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "norm" not in name.lower():
            parameter.copy_(torch.from_numpy(rng.normal(0, WEIGHT_STD, parameter.shape)))
    return model
