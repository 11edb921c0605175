from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import film_reviews, training_openings
from benchmarks.sequence_likelihood import BATCH, log_probs
from tests.support.tiny_models import save_tiny_policy


def test_the_log_probability_is_the_continuations_alone_and_does_not_depend_on_padding(tmp_path: Path) -> None:
    model = str(save_tiny_policy(tmp_path / "policy"))
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    texts = [("The film", " was great", False), ("The film was a delight from", " start", True), ("The", "", False)]
    results = log_probs(model, texts * BATCH)  # more than a batch
    assert [nats for nats, _ in results[:3]] == pytest.approx([nats for nats, _ in results[-3:]], abs=1e-3)
    for (prompt, text, ends), (nats, tokens) in zip(texts, results, strict=False):
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = (tokenizer(text)["input_ids"] if text else []) + [tokenizer.eos_token_id] * ends
        with torch.inference_mode():
            logits_T_V = policy(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
        start = len(prompt_ids) - 1
        expected = sum(float(logits_T_V[start + index, token]) for index, token in enumerate(ids))
        assert nats == pytest.approx(expected, abs=1e-3)
        assert tokens == len(ids)


def test_training_openings_and_held_out_openings_are_disjoint() -> None:
    assert not set(training_openings.OPENINGS) & set(film_reviews.OPENINGS)
    assert len(set(training_openings.OPENINGS)) == len(training_openings.OPENINGS) == 48
