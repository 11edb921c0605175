"""The engine gives the tokens and log-probabilities of transformers with the same weights, in float32."""

from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reranker.models.bundled import resolve
from tests.end_to_end.test_best_of_n import MODEL, OPENING

pytestmark = pytest.mark.engine


def test_greedy_tokens_and_logprobs_equal_transformers(client: openai.OpenAI) -> None:
    directory = resolve(MODEL)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt_T = tokenizer(OPENING, return_tensors="pt")["input_ids"]
    expected_T = model.generate(prompt_T, do_sample=False, max_new_tokens=12)[0, prompt_T.shape[1] :]
    with torch.inference_mode():
        logits_T_V = model(torch.cat([prompt_T[0], expected_T])[None]).logits[0, prompt_T.shape[1] - 1 : -1]
    logprobs_T = logits_T_V.log_softmax(-1).gather(-1, expected_T[:, None])[:, 0]

    reply: Any = client.completions.create(
        model=MODEL,
        prompt=OPENING,
        temperature=0,
        max_tokens=12,
        logprobs=0,
        extra_body={"best_of": 1, "nbest": {"return_candidates": True}},
    )
    assert reply.choices[0].text == tokenizer.decode(expected_T)
    assert reply.choices[0].logprobs.token_logprobs == pytest.approx(logprobs_T.tolist(), abs=1e-3)
    assert reply.nbest["candidates"][0]["cumulative_logprob"] == pytest.approx(logprobs_T.sum().item(), abs=1e-2)
