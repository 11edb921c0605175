"""Best-of-N block by block (blockwise controlled decoding, Mudgal et al. 2024, arXiv 2310.17022).

    the prompt           -> N beginnings of block_tokens tokens -> scored, the best is streamed
    ... and the best     -> N continuations of it               -> scored, the best is streamed
    ...                                                            until the best candidate has ended

Each block is a plain best-of-N whose candidates continue the text chosen before, token by token: the engine finds its
keys and values in the prefix cache. The reward model scores a beginning as it stands. Candidate i of block b, counted
from 0, has the seed of the request + b · N + i.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from reranker.candidate import Candidate
from server.errors import ContextLengthError, DeadlineError
from server.generation.base import SamplingParams
from server.generation.stop_strings import text_before_possible_stop
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver, StoppedBy, Timings

DEFAULT_BLOCK_TOKENS = 16

RunBlock = Callable[[BestOfNRequest, float], Awaitable[BestOfNResult]]
"""Runs best-of-N for one block, of a request that has waited this many seconds for admission."""


async def run(
    run_block: RunBlock, request: BestOfNRequest, observer: RunObserver, queued_s: float = 0.0
) -> BestOfNResult:
    """Answers a request whose sampling has `block_tokens`. The candidates of the result are those of the last block.

    The observer is called with each chosen block but the last, with the text before it. A deadline ends the answer with
    the last block that was chosen in time.

    Raises:
        server.errors.NbestError: whatever `run_block` raises; no DeadlineError once a block has been chosen.
    """
    began_s = time.perf_counter() - queued_s
    blocks: list[BestOfNResult] = []
    while True:
        try:
            blocks.append(await run_block(_block(request, blocks, began_s), 0.0 if blocks else queued_s))
        except (DeadlineError, ContextLengthError) as error:
            if not blocks:
                raise
            return _joined(blocks, "deadline" if isinstance(error, DeadlineError) else "all", began_s)
        chosen, stopped_by = blocks[-1].selection.winner.candidate, blocks[-1].stopped_by
        if stopped_by == "deadline" or has_ended(chosen, _sampling(request, blocks[:-1])):
            return _joined(blocks, stopped_by, began_s)
        text = text_before_possible_stop(chosen.text, request.sampling.stop)
        observer.block(replace(chosen, text=text, finish_reason=None))


def has_ended(candidate: Candidate, sampling: SamplingParams) -> bool:
    """Whether nothing can follow a candidate of this sampling: it stopped, or max_tokens or the context is reached."""
    if candidate.finish_reason != "length" or sampling.block_tokens is None:
        return True
    is_full = sampling.max_tokens is not None and candidate.num_tokens >= sampling.max_tokens
    return is_full or candidate.num_tokens - sampling.begun_tokens < sampling.block_tokens


def _block(request: BestOfNRequest, chosen: Sequence[BestOfNResult], began_s: float) -> BestOfNRequest:
    """The request for the block after the chosen ones."""
    if not chosen or request.deadline_s is None:
        return replace(request, sampling=_sampling(request, chosen))
    left_s = request.deadline_s - (time.perf_counter() - began_s)
    return replace(request, sampling=_sampling(request, chosen), deadline_s=left_s)


def _sampling(request: BestOfNRequest, chosen: Sequence[BestOfNResult]) -> SamplingParams:
    seed = request.sampling.seed
    return replace(
        request.sampling,
        after=chosen[-1].selection.winner.candidate if chosen else None,
        seed=None if seed is None else seed + len(chosen) * request.best_of,
    )


def _joined(blocks: Sequence[BestOfNResult], stopped_by: StoppedBy, began_s: float) -> BestOfNResult:
    """The last block, with the cost of all blocks; `ranked_by` is the first that is not the reward, if any."""
    return replace(
        blocks[-1],
        ranked_by=next((block.ranked_by for block in blocks if block.ranked_by != "reward"), "reward"),
        stopped_by=stopped_by,
        blocks=len(blocks),
        generated_tokens=sum(block.generated_tokens for block in blocks),
        scored_tokens=sum(block.scored_tokens for block in blocks),
        prompt_tokens_cut=max(block.prompt_tokens_cut for block in blocks),
        candidate_s=sum(block.candidate_s for block in blocks),
        timings=Timings(
            queue=sum(block.timings.queue for block in blocks),
            generate=sum(block.timings.generate for block in blocks),
            score=sum(block.timings.score for block in blocks),
            select=sum(block.timings.select for block in blocks),
            total=time.perf_counter() - began_s,
        ),
    )
