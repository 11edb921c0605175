"""log p(text | prompt) under a language model, computed with transformers; KL and perplexity are derived from it."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reranker.candidate import Prompt
from server.generation.prompt_tokens import encode_prompt

BATCH = 16


@torch.inference_mode()
def log_probs(model: str, texts: Sequence[tuple[str, str, bool]]) -> list[tuple[float, int]]:
    """(log-probability in nats, number of tokens) of each (prompt, continuation, whether EOS follows).

    Prompt and continuation are tokenised separately, as the policy samples them.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    results: list[tuple[float, int]] = []
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        prompts = [encode_prompt(tokenizer, Prompt(text=prompt)) for prompt, _, _ in batch]
        continuations = [
            list(tokenizer(text, add_special_tokens=False)["input_ids"]) + [tokenizer.eos_token_id] * ends
            for _, text, ends in batch
        ]
        rows = [a + b for a, b in zip(prompts, continuations, strict=True)]
        width = max(map(len, rows))
        # Right padding needs no mask: later tokens do not change a token's probability.
        input_ids_N_T = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        logits_N_T_V = policy(input_ids=input_ids_N_T).logits
        for row_logits_T_V, prompt, continuation in zip(logits_N_T_V, prompts, continuations, strict=True):
            positions = slice(len(prompt) - 1, len(prompt) + len(continuation) - 1)
            log_probs_T_V = row_logits_T_V[positions].log_softmax(-1)
            chosen_T = log_probs_T_V.gather(1, torch.tensor(continuation, dtype=torch.long)[:, None])
            results.append((float(chosen_T.sum()), len(continuation)))
    return results
