"""Encoders read prompt and candidate as a pair: real tiny BERT and DeBERTa classifiers."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, RobertaConfig

from reranker.candidate import Message, Prompt
from reranker.models.reward_model import RewardModel, RewardModelError
from tests.support.tiny_models import ENCODERS, draw_weights, save_tiny_reward_model, tiny_bert_tokenizer

QUESTIONS = ["What is the capital of France?", "Was the film a delight?", "The film was dull, was it?"]
ANSWERS = ["The capital of France is Paris.", "great", "The film was far too long, and the ending made no sense."]


def conversation(question: str) -> Prompt:
    return Prompt(messages=(Message("user", question),))


def load(directory: Path, **options: Any) -> RewardModel:
    return RewardModel.load(str(directory), device="cpu", dtype="float32", **options)


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_reward_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(encoder: Path) -> RewardModel:
    return load(encoder)


def test_an_answer_has_another_score_under_each_question(model: RewardModel) -> None:
    first, second, third = model.score([model.render(conversation(question), ANSWERS[0]) for question in QUESTIONS])
    assert min(abs(first - second), abs(first - third), abs(second - third)) > 0.01


def test_the_score_is_that_of_transformers_for_the_text_pair(model: RewardModel, encoder: Path) -> None:
    theirs = AutoModelForSequenceClassification.from_pretrained(encoder).eval()
    for question in QUESTIONS:
        pair = model.renderer.tokenizer(question, ANSWERS[0], return_tensors="pt")
        expected = theirs(**pair).logits.item()
        assert model.score([model.render(conversation(question), ANSWERS[0])])[0] == pytest.approx(expected, abs=1e-4)


def test_alone_in_a_batch_and_beside_candidates_of_the_same_prompt_the_score_is_the_same(
    model: RewardModel,
) -> None:
    pairs = [model.render(conversation(question), answer) for question in QUESTIONS for answer in ANSWERS]
    alone = [model.score([pair])[0] for pair in pairs]
    assert model.score(pairs) == pytest.approx(alone, abs=1e-4)
    for start in range(0, len(pairs), len(ANSWERS)):
        same_prompt = slice(start, start + len(ANSWERS))
        assert model.score(pairs[same_prompt]) == pytest.approx(alone[same_prompt], abs=1e-4)


def test_a_question_that_is_too_long_is_cut_and_scored(model: RewardModel) -> None:
    rendered = model.render(conversation("The film was dull. " * 100), ANSWERS[0])
    assert len(rendered.token_ids) == model.max_length
    assert rendered.cut_tokens > 0
    model.score([rendered])


def test_the_guess_that_an_encoder_reads_pairs_is_logged(encoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(encoder).renderer.style == "pair"
    assert f"{encoder} has no chat template, so nbest guesses that it reads prompts in the style pair" in caplog.text


def test_the_config_beside_the_model_decides_and_a_spec_decides_over_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = save_tiny_reward_model(tmp_path, "bert")
    (directory / "reward_config.json").write_text(json.dumps({"style": "document"}))
    assert load(directory).renderer.style == "document"
    assert load(directory, style="transcript").renderer.style == "transcript"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("content", ["{}", "[]", '{"style": ', '"pair"'])
def test_a_config_without_a_style_is_refused(content: str, tmp_path: Path) -> None:
    directory = save_tiny_reward_model(tmp_path, "bert")
    (directory / "reward_config.json").write_text(content)
    with pytest.raises(RewardModelError, match=r'should hold an object with "style", one of chat, pair, transcript'):
        load(directory)


def test_roberta_reads_as_many_tokens_as_it_has_positions_after_that_of_padding(tmp_path: Path) -> None:
    tokenizer = tiny_bert_tokenizer()
    tokenizer.model_max_length = 10**9
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=40,
        pad_token_id=1,
        type_vocab_size=1,
        num_labels=1,
    )
    draw_weights(AutoModelForSequenceClassification.from_config(config), seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path)
    rendered = model.render(conversation("The film was dull. " * 100), "great")
    assert (model.max_length, len(rendered.token_ids), rendered.segment_ids) == (38, 38, ())
    assert torch.tensor(model.score([rendered])).isfinite().all()
