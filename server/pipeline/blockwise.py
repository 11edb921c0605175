"""Best-of-N block by block (blockwise controlled decoding, Mudgal et al. 2024, arXiv 2310.17022).

    the prompt        -> N beginnings of block_tokens tokens  -> scored, the best is told
    ... and the best  -> N continuations of it                -> scored, the best is told
    ...                                                          until the best has ended

Every block is best-of-N as ever, of candidates that go on from what was chosen before them, token by token: the engine
finds that in its prefix cache. A beginning is worth what the reward model makes of it as it stands. Candidate i of
block b, counted from 0, has the seed of the request + b · N + i.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from reranker.candidate import Candidate
from server.errors import ContextLengthError, DeadlineError
from server.generation.base import SamplingParams
from server.generation.candidate_builder import certain_text
from server.pipeline.best_of_n import BestOfNRequest, BestOfNResult, StoppedBy, Timings

DEFAULT_BLOCK_TOKENS = 16


class RunBlock(Protocol):
    """Best-of-N of one block, as `BestOfN.run` does it."""

    async def __call__(self, request: BestOfNRequest, *, queued_s: float) -> BestOfNResult: ...


async def answer(
    run_block: RunBlock,
    request: BestOfNRequest,
    on_chosen: Callable[[Candidate], None] | None = None,
    queued_s: float = 0.0,
) -> BestOfNResult:
    """Answers a request whose sampling has `block_tokens`. The candidates of the result are those of the last block.

    `on_chosen` hears of each block but the last, with all before it, as soon as it is chosen. A deadline ends the
    answer with the last block chosen in time.

    Raises:
        server.errors.NbestError: whatever `run_block` raises. A deadline is none once a block has been chosen.
    """
    began_s = time.perf_counter() - queued_s
    blocks: list[BestOfNResult] = []
    while True:
        try:
            blocks.append(await run_block(_block(request, blocks, began_s), queued_s=0.0 if blocks else queued_s))
        except (DeadlineError, ContextLengthError) as error:
            if not blocks:
                raise
            return _joined(blocks, "deadline" if isinstance(error, DeadlineError) else "all", began_s)
        chosen, stopped_by = blocks[-1].selection.winner.candidate, blocks[-1].stopped_by
        if stopped_by == "deadline" or has_ended(chosen, _sampling(request, blocks[:-1])):
            return _joined(blocks, stopped_by, began_s)
        if on_chosen is not None:
            on_chosen(replace(chosen, text=certain_text(chosen.text, request.sampling.stop), finish_reason=None))


def has_ended(candidate: Candidate, sampling: SamplingParams) -> bool:
    """Whether nothing can follow a candidate that was drawn like this: it ended by itself, or the room did."""
    if candidate.finish_reason != "length" or sampling.block_tokens is None:
        return True
    is_full = sampling.max_tokens is not None and candidate.num_tokens >= sampling.max_tokens
    return is_full or candidate.num_tokens - sampling.begun_tokens < sampling.block_tokens


def _block(request: BestOfNRequest, chosen: Sequence[BestOfNResult], began_s: float) -> BestOfNRequest:
    """The request for the block after those."""
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
    """The last block, with the cost of all. What ordered any of them other than the reward is told."""
    return replace(
        blocks[-1],
        ranked_by=next((one.ranked_by for one in blocks if one.ranked_by != "reward"), "reward"),
        stopped_by=stopped_by,
        blocks=len(blocks),
        generated_tokens=sum(one.generated_tokens for one in blocks),
        scored_tokens=sum(one.scored_tokens for one in blocks),
        prompt_tokens_cut=max(one.prompt_tokens_cut for one in blocks),
        candidate_s=sum(one.candidate_s for one in blocks),
        timings=Timings(
            queue=sum(one.timings.queue for one in blocks),
            generate=sum(one.timings.generate for one in blocks),
            score=sum(one.timings.score for one in blocks),
            select=sum(one.timings.select for one in blocks),
            total=time.perf_counter() - began_s,
        ),
    )
