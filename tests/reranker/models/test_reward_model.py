import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    T5Config,
    XLNetConfig,
)

from reranker.candidate import Message, Prompt
from reranker.models.bundled import PRETRAINED_REWARDS
from reranker.models.device import Precision
from reranker.models.reward_model import ADAPTER_FILE, RewardConfig, RewardModel, RewardModelError, load_classifier
from tests.support.tiny_models import (
    Architecture,
    draw_weights,
    save_tiny_policy,
    save_tiny_reward_adapter,
    save_tiny_reward_model,
    tiny_bert_tokenizer,
    tiny_tokenizer,
)

TEXT = Prompt(text="The film was")
CHAT = Prompt(messages=(Message("user", "What is the capital of France?"),))
CPU = torch.device("cpu")
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "bert", "deberta-v2")


def load(directory: Path, dtype: Precision = "float32", **options: Any) -> RewardModel:
    return RewardModel.load(str(directory), device="cpu", dtype=dtype, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_candidate_has_the_same_score_alone_and_in_a_batch(architecture: Architecture, tmp_path: Path) -> None:
    model = load(save_tiny_reward_model(tmp_path, architecture))
    texts = [" great", " a delight from start to finish and the cast was great", "", " dull <|im_end|> dull", " a"]
    rendered = [model.render(TEXT, text) for text in texts]
    alone = [model.score([sequence])[0] for sequence in rendered]
    assert min(abs(left - right) for left, right in itertools.combinations(alone, 2)) > 0.01, "all scores are equal"
    assert model.score(rendered) == pytest.approx(alone, abs=1e-4)


def test_one_token_is_enough_to_score(tmp_path: Path) -> None:
    model = load(save_tiny_reward_model(tmp_path))
    short = model.render(Prompt(text=""), "a")
    longer = model.render(TEXT, " a delight from start to finish")
    assert len(short.token_ids) == 1
    assert model.score([longer, short])[1] == pytest.approx(model.score([short])[0], abs=1e-4)


def test_a_decoder_agrees_with_transformers_where_no_token_equals_pad(tmp_path: Path) -> None:
    model = load(save_tiny_reward_model(tmp_path))
    rendered = model.render(TEXT, " great")
    expected = AutoModelForSequenceClassification.from_pretrained(tmp_path)(torch.tensor([rendered.token_ids]))
    assert model.score([rendered])[0] == pytest.approx(expected.logits.item(), abs=1e-5)


def test_a_final_eos_is_scored_although_it_equals_pad(tmp_path: Path) -> None:
    # transformers would score the token before it, so that both texts had the same score.
    model = load(save_tiny_reward_model(tmp_path))
    ended, open_ended = (model.render(TEXT, text) for text in (" great<|im_end|>", " great"))
    rewards = model.score([ended, open_ended])
    assert abs(rewards[0] - rewards[1]) > 0.01


def test_the_reward_model_tokenises_the_text_with_its_own_tokenizer(tmp_path: Path) -> None:
    other = tiny_tokenizer(corpus=["quite other words make quite other tokens"])
    model = load(save_tiny_reward_model(tmp_path, tokenizer=other))
    rendered = model.render(TEXT, " great")
    assert other.decode(rendered.token_ids) == "The film was great"
    assert rendered.token_ids != tuple(tiny_tokenizer()("The film was great")["input_ids"])


def test_a_merged_adapter_scores_as_the_separate_adapter(tmp_path: Path) -> None:
    directory = save_tiny_reward_adapter(tmp_path / "adapter", save_tiny_policy(tmp_path / "base"))
    merged = load(directory)
    rendered = [merged.render(TEXT, text) for text in (" great", " dull")]
    assert not any("lora" in name for name, _ in merged._model.named_parameters())
    trunk = load_classifier(str(tmp_path / "base"), new_head=True)
    adapted = RewardModel("", PeftModel.from_pretrained(trunk, directory).get_base_model(), merged.renderer, CPU)
    assert any("lora" in name for name, _ in adapted._model.named_parameters())
    plain = load_classifier(str(tmp_path / "base"), new_head=True)
    plain.score.weight.data = load_file(directory / ADAPTER_FILE)["base_model.model.score.weight"]
    unadapted = RewardModel("plain", plain, merged.renderer, CPU)
    rewards = merged.score(rendered)
    assert rewards == pytest.approx(adapted.score(rendered), abs=1e-4)
    assert rewards != pytest.approx(unadapted.score(rendered), abs=0.1)


def test_in_bfloat16_an_adapter_is_merged_before_it_is_rounded(tmp_path: Path) -> None:
    base = save_tiny_policy(tmp_path / "base")
    directory = save_tiny_reward_adapter(tmp_path / "adapter", base)
    exact, rounded = load(directory), load(directory, dtype="bfloat16")
    weights = dict(rounded._model.named_parameters())
    assert not any("lora" in name for name in weights)
    assert weights.pop("score.weight").dtype is torch.float32, "the head computes in float32"
    for name, weight in weights.items():
        assert torch.equal(weight, exact._model.get_parameter(name).to(torch.bfloat16)), name
    rendered = [exact.render(TEXT, text) for text in (" great", " dull")]
    rewards = exact.score(rendered)
    assert rounded.score(rendered) == pytest.approx(rewards, abs=0.05 * max(map(abs, rewards)))


def test_an_adapter_reads_only_its_configured_layers(tmp_path: Path) -> None:
    base = save_tiny_policy(tmp_path / "base", num_layers=4)
    whole = load(save_tiny_reward_adapter(tmp_path / "whole", base))
    lower = load(save_tiny_reward_adapter(tmp_path / "lower", base, num_layers=1))
    one_layer = sum(parameter.numel() for parameter in whole._model.model.layers[0].parameters())
    assert whole.num_parameters - lower.num_parameters == 3 * one_layer


def test_the_context_is_the_shorter_of_the_models_and_the_tokenizers(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 40
    assert load(save_tiny_reward_model(tmp_path, tokenizer=tokenizer)).max_length == 40


def test_an_empty_batch_has_no_rewards(tmp_path: Path) -> None:
    assert load(save_tiny_reward_model(tmp_path)).score([]) == []


def test_the_pretrained_reward_prefers_praise() -> None:
    model = RewardModel.load("movie-sentiment", device="cpu", dtype="float32")
    texts = ["A delight: warm, funny and superbly acted.", "It is a film.", "A dull, lifeless and badly acted mess."]
    rewards = model.score([model.render(CHAT, text) for text in texts])
    assert rewards == sorted(rewards, reverse=True)
    assert rewards[0] - rewards[2] > 3


def test_the_pretrained_reward_names_its_base_and_no_local_directory() -> None:
    directory = PRETRAINED_REWARDS["movie-sentiment"]
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == RewardConfig.load(directory).base_model == "smollm2-135m-instruct"


def test_several_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardModelError, match="has 3 labels and a reward model has one"):
        load(save_tiny_reward_model(tmp_path, num_labels=3))


def test_a_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardModelError, match=r"is a LlamaForCausalLM .* nbest train reward"):
        load(save_tiny_policy(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(
            T5Config(architectures=["T5ForSequenceClassification"], num_labels=1),
            "is a T5ForSequenceClassification, an encoder-decoder, and a reward model is an encoder or a decoder",
            id="an encoder-decoder",
        ),
        pytest.param(
            LlamaConfig(
                architectures=["LlamaForRewardModelWithGating"],
                auto_map={"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
            ),
            r"is a LlamaForRewardModelWithGating and not a sequence classifier .*python:FILE\.py:FUNCTION",
            id="ArmoRM: several heads and code of its own",
        ),
        pytest.param(
            Qwen2Config(architectures=["Qwen2ForProcessRewardModel"]),
            r"a process reward model: it scores the steps of an answer.*python:FILE\.py:FUNCTION",
            id="a process reward model",
        ),
        pytest.param(
            Qwen2Config(architectures=["Qwen2ForTokenClassification"], num_labels=2),
            "a process reward model: it scores the steps",
            id="a process reward model by TRL",
        ),
        pytest.param(BertConfig(architectures=["BertModel"]), "is a BertModel and not a sequence", id="an encoder"),
        pytest.param(
            GraniteConfig(architectures=["GraniteForCausalLM"]),
            "transformers has no sequence classifier of the type granite",
            id="an architecture without a classifier",
        ),
    ],
)
def test_what_is_no_reward_model_is_refused_with_what_to_do(
    config: PretrainedConfig, message: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RewardModelError, match=message) as refusal:
        load(tmp_path)
    assert len(str(refusal.value)) < 400
    assert "\n" not in str(refusal.value)


def test_an_empty_directory_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RewardModelError, match=r"contains no model: it has no config\.json; give the directory"):
        load(tmp_path)


def test_a_model_that_padding_changes_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_bert_tokenizer()
    config = XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=1, n_head=4, d_inner=64, num_labels=1)
    draw_weights(AutoModelForSequenceClassification.from_config(config), seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RewardModelError, match=r"scores a text .* alone and .* in a batch"):
        load(tmp_path, style="pair")


def test_a_missing_head_is_refused(tmp_path: Path) -> None:
    save_tiny_reward_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardModelError, match=r"lacks the weights score\.weight"):
        load(tmp_path)


def test_an_adapter_without_a_head_is_refused(tmp_path: Path) -> None:
    directory = save_tiny_reward_adapter(tmp_path / "adapter", save_tiny_policy(tmp_path / "base"))
    weights = load_file(directory / ADAPTER_FILE)
    del weights["base_model.model.score.weight"]
    save_file(weights, directory / ADAPTER_FILE)
    with pytest.raises(RewardModelError, match="contains no scalar head"):
        load(directory)


def test_an_adapter_without_its_reward_config_is_refused(tmp_path: Path) -> None:
    directory = save_tiny_reward_adapter(tmp_path / "adapter", save_tiny_policy(tmp_path / "base"))
    (directory / "reward_config.json").unlink()
    with pytest.raises(RewardModelError, match=r"reward_config\.json"):
        load(directory)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    save_tiny_reward_model(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RewardModelError, match="pickled weights are never loaded"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_file_is_an_error_that_names_the_model(file: str, tmp_path: Path) -> None:
    whole = (save_tiny_reward_model(tmp_path) / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RewardModelError, match=f"cannot load the reward model {tmp_path}"):
        load(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RewardModelError, match="run with --device cpu"):
        RewardModel.load(str(save_tiny_reward_model(tmp_path)), device="cuda")


def test_a_missing_directory_is_an_error_without_a_hub_request(tmp_path: Path) -> None:
    with pytest.raises(RewardModelError, match="there is no directory"):
        load(tmp_path / "nowhere")


def test_a_models_own_code_is_not_run_by_default(tmp_path: Path) -> None:
    save_tiny_reward_model(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path).to_dict()
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(RewardModelError):
        load(tmp_path)
