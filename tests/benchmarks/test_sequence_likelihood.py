from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import film_reviews, training_openings
from benchmarks.sequence_likelihood import BATCH, log_probs
from tests.support.tiny_models import save_tiny_policy


def test_a_likelihood_is_that_of_the_continuation_alone_and_padding_does_not_change_it(tmp_path: Path) -> None:
    model = str(save_tiny_policy(tmp_path / "policy"))
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    texts = [("The film", " was great", False), ("The film was a delight from", " start", True), ("The", "", False)]
    found = log_probs(model, texts * BATCH)  # more than a batch
    assert [nats for nats, _ in found[:3]] == pytest.approx([nats for nats, _ in found[-3:]], abs=1e-3)
    for (prompt, text, ends), (nats, tokens) in zip(texts, found, strict=False):
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = (tokenizer(text)["input_ids"] if text else []) + [tokenizer.eos_token_id] * ends
        with torch.inference_mode():
            logits_T_V = policy(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
        alone = sum(float(logits_T_V[len(prompt_ids) - 1 + at, token]) for at, token in enumerate(ids))
        assert nats == pytest.approx(alone, abs=1e-3)
        assert tokens == len(ids)


def test_no_opening_is_both_trained_on_and_measured_on() -> None:
    assert not set(training_openings.OPENINGS) & set(film_reviews.OPENINGS)
    assert len(set(training_openings.OPENINGS)) == len(training_openings.OPENINGS) == 48
