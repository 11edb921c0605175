"""Ranks candidates that you already have by a reward model, without a policy or an engine.

    python -m examples.rerank_candidates

`FixedCandidates` takes the engine's place in the pipeline, so every selection strategy works on existing candidates.
For files of prompts with candidates use `nbest rerank` (docs/offline.md), over HTTP `POST /v1/score`.
"""

import asyncio
from collections.abc import Sequence

from reranker.candidate import Candidate, Prompt, ScoredCandidate
from server import factory
from server.config import Settings
from server.generation.base import SamplingParams
from server.offline.fixed_candidates import FixedCandidates
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest

PROMPT = "I saw this movie last night and"
CANDIDATES = (
    " fell asleep after ten minutes. A waste of an evening.",
    " loved every minute of it, above all the music.",
    " it was two hours long.",
)


async def rerank(settings: Settings, prompt: str, texts: Sequence[str]) -> Sequence[ScoredCandidate]:
    """The candidates with their rewards, best first."""
    candidates = [Candidate(index, text, num_tokens=0, finish_reason="stop") for index, text in enumerate(texts)]
    existing = FixedCandidates(candidates)
    async with factory.started_scorers(settings, existing) as scorers:
        request = BestOfNRequest(Prompt(text=prompt), SamplingParams(), best_of=len(texts))
        result = await BestOfN(existing, scorers).run(request)
    return result.selection.ranking


def main() -> None:
    for scored in asyncio.run(rerank(Settings(), PROMPT, CANDIDATES)):
        print(f"{scored.reward:7.2f}  {scored.candidate.index}  {scored.candidate.text!r}")


if __name__ == "__main__":
    main()
