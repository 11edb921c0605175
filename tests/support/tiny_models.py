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
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertTokenizer,
    DebertaV2Tokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from reranker.models.reward_model import RewardConfig, load_classifier
from training.lora_targets import lora_targets

Architecture = Literal["llama", "qwen2", "bert", "deberta-v2", "gpt2", "opt", "qwen3_moe"]
ENCODERS: tuple[Architecture, ...] = ("bert", "deberta-v2")

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
    """A WordPiece tokenizer of pairs, [CLS] … [SEP] … [SEP] with segments 0 and 1; it has no chat template.

    Its vocabulary is not trained, because the trainer's depends on the run.
    """
    words, characters = _words_and_characters()
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *characters,
        *(f"##{piece}" for piece in characters),
        *words,
    ]
    vocabulary = {piece: token_id for token_id, piece in enumerate(dict.fromkeys(pieces))}
    return BertTokenizer(vocab=vocabulary, do_lower_case=False, model_max_length=CONTEXT_LENGTH)


def tiny_deberta_tokenizer() -> PreTrainedTokenizerBase:
    """A Unigram tokenizer of pairs as `tiny_bert_tokenizer`."""
    words, characters = _words_and_characters()
    special_tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    scores = dict.fromkeys(special_tokens, 0.0) | dict.fromkeys(["▁", *characters], -6.0)
    scores |= {f"▁{word}": -3.0 for word in words}
    return DebertaV2Tokenizer(
        vocab=list(scores.items()), unk_id=special_tokens.index("[UNK]"), model_max_length=CONTEXT_LENGTH
    )


def _words_and_characters() -> tuple[list[str], list[str]]:
    """Those of the corpus, in a fixed order."""
    return sorted({word for text in CORPUS for word in text.split()}), sorted(set("".join(CORPUS)) - {" "})


def tiny_config(
    architecture: Architecture, tokenizer: PreTrainedTokenizerBase, *, num_layers: int = 2, **more: Any
) -> PretrainedConfig:
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    grouped: dict[str, Any] = {"intermediate_size": 64, "num_key_value_heads": 2}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    own: dict[Architecture, dict[str, Any]] = {
        "llama": grouped,
        "qwen2": grouped,
        "bert": {"intermediate_size": 64},
        "deberta-v2": {"intermediate_size": 64, "pooler_hidden_size": 32, **relative},
        "gpt2": {"n_inner": 64},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "qwen3_moe": grouped | experts,
    }
    return AutoConfig.for_model(architecture, **fields | own[architecture] | more)


def save_tiny_policy(
    directory: Path,
    *,
    architecture: Architecture = "llama",
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_layers: int = 2,
    seed: int = 0,
    **more: Any,
) -> Path:
    """Saves a tiny language model with its tokenizer; `more` are fields of its configuration."""
    tokenizer = tokenizer or tiny_tokenizer()
    config = tiny_config(architecture, tokenizer, num_layers=num_layers, **{"tie_word_embeddings": True} | more)
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
    encoders = {"bert": tiny_bert_tokenizer, "deberta-v2": tiny_deberta_tokenizer}
    tokenizer = tokenizer or encoders.get(architecture, tiny_tokenizer)()
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
    classifier = load_classifier(str(policy), new_head=True, num_layers=num_layers)
    model = get_peft_model(classifier, LoraConfig(task_type=task_type, r=2, **lora_targets(classifier.base_model)))
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
