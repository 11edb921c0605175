import asyncio
import math
from dataclasses import replace
from pathlib import Path

import pytest

from reranker.candidate import Candidate, Message, Prompt
from reranker.models.reward_model import RewardModel
from reranker.scorers.base import UnscorableCandidatesError, UnscorableError
from reranker.scorers.reward_model import RewardModelScorer
from tests.support.tiny_models import CHATML, CONTEXT_LENGTH, Architecture, save_tiny_reward_model, tiny_tokenizer

QUESTION = Prompt(messages=(Message("user", "What is the capital of France?"),))


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate(index, text, num_tokens=1) for index, text in enumerate(texts)]


@pytest.fixture
def model(tmp_path: Path) -> RewardModel:
    return RewardModel.load(str(save_tiny_reward_model(tmp_path)), device="cpu", dtype="float32")


def scorer(model: RewardModel, batches: list[int] | None = None) -> RewardModelScorer:
    sizes = batches if batches is not None else []
    return RewardModelScorer(
        "tiny", model, max_batch_tokens=1000, max_wait_ms=1, on_batch=lambda sequences, _: sizes.append(sequences)
    )


def tokens(model: RewardModel, *texts: str) -> tuple[int, list[int]]:
    """(tokens of the prompt, tokens of each candidate)."""
    rendered = [model.render(QUESTION, text) for text in texts]
    return rendered[0].prompt_length, [len(sequence.token_ids) - sequence.prompt_length for sequence in rendered]


async def test_a_shared_prompt_and_a_repeated_candidate_count_once(model: RewardModel) -> None:
    batches: list[int] = []
    scoring = scorer(model, batches)
    scores = await scoring.score(QUESTION, candidates("Paris.", "Rome, I think.", "Paris."))
    await scoring.close()
    prompt, (paris, rome) = tokens(model, "Paris.", "Rome, I think.")
    assert scores.rewards_N[0] == scores.rewards_N[2] != scores.rewards_N[1]
    assert scores.scored_tokens == prompt + paris + rome
    assert batches == [2]


async def test_the_prompt_is_not_computed_again_for_later_candidates(model: RewardModel) -> None:
    scoring = scorer(model)
    first = await scoring.score(QUESTION, candidates("Paris."))
    later = await scoring.score(QUESTION, candidates("Rome, I think."))
    await scoring.close()
    prompt, (paris, rome) = tokens(model, "Paris.", "Rome, I think.")
    assert (first.scored_tokens, later.scored_tokens) == (prompt + paris, rome)


async def test_a_continuation_of_a_beginning_costs_only_the_rest(model: RewardModel) -> None:
    scoring, whole = scorer(model), "Paris is the capital of France, and has been for long."
    beginning = replace(candidates(whole[:38])[0], is_beginning=True)
    _, (begun, all_of_it) = tokens(model, beginning.text, whole)
    await scoring.score(QUESTION, [beginning])
    rest = await scoring.score(QUESTION, candidates(whole))
    fresh = scorer(RewardModel.load(model.name, device="cpu", dtype="float32"))
    assert rest.rewards_N == pytest.approx((await fresh.score(QUESTION, candidates(whole))).rewards_N, abs=1e-4)
    assert (
        all_of_it - begun <= rest.scored_tokens <= all_of_it - begun + 4
    )  # 4 for the tokens that closed the beginning
    await scoring.close()
    await fresh.close()


async def test_pairs_of_the_same_tokens_that_end_their_prompt_elsewhere_are_scored_apart(tmp_path: Path) -> None:
    model = RewardModel.load(str(save_tiny_reward_model(tmp_path, "bert")), device="cpu", dtype="float32", style="pair")
    splits = [(Prompt(text="The film"), "was [SEP] great"), (Prompt(text="The film [SEP] was"), "great")]
    first, second = (model.render(prompt, text) for prompt, text in splits)
    assert first.token_ids == second.token_ids
    scoring = scorer(model)
    together = await asyncio.gather(*(scoring.score(prompt, candidates(text)) for prompt, text in splits))
    await scoring.close()
    rewards = [scores.rewards_N[0] for scores in together]
    assert rewards == pytest.approx([model.score([pair])[0] for pair in (first, second)], abs=1e-4)
    assert abs(rewards[0] - rewards[1]) > 0.01


class TestUnscorable:
    async def test_a_prompt_that_the_chat_template_refuses_is_known_before_there_are_candidates(
        self, tmp_path: Path
    ) -> None:
        template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
        directory = save_tiny_reward_model(tmp_path, tokenizer=tiny_tokenizer(chat_template=template))
        scoring = scorer(RewardModel.load(str(directory), device="cpu", dtype="float32"))
        await scoring.check(QUESTION)
        refused = Prompt(messages=(Message("system", "Be brief."), *QUESTION.messages))
        for call in (scoring.check(refused), scoring.score(refused, candidates("Paris."))):
            with pytest.raises(UnscorableError, match=r"tiny: the reward model's .* refused .* no system role"):
                await call
        await scoring.close()

    async def test_candidates_that_are_too_long_are_another_error_than_a_prompt_that_cannot_be_read(
        self, model: RewardModel
    ) -> None:
        scoring = scorer(model)
        too_long = "x" * (CONTEXT_LENGTH + 1)
        with pytest.raises(UnscorableCandidatesError, match=r"the candidate alone is 1\d\d tokens and the"):
            await scoring.score(QUESTION, candidates(too_long))
        missing, known = (await scoring.score(QUESTION, candidates(too_long, "Paris."))).rewards_N
        await scoring.close()
        assert math.isnan(missing)
        assert math.isfinite(known)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
async def test_a_prompt_that_does_not_fit_is_cut_and_the_cut_is_reported(
    architecture: Architecture, tmp_path: Path
) -> None:
    model = RewardModel.load(str(save_tiny_reward_model(tmp_path, architecture)), device="cpu", dtype="float32")
    prompt = Prompt(text="The film was dull. " * 60)
    texts = [" great", " a delight from start to finish"]
    rendered = [model.render(prompt, text) for text in texts]
    assert [len(sequence.token_ids) for sequence in rendered] == [CONTEXT_LENGTH] * 2
    scoring = scorer(model)
    scores = await scoring.score(prompt, candidates(*texts))
    short = await scoring.score(Prompt(text="The film was"), candidates(*texts))
    await scoring.close()
    assert scores.prompt_tokens_cut == rendered[1].cut_tokens > rendered[0].cut_tokens > 0
    assert scores.rewards_N == pytest.approx([model.score([sequence])[0] for sequence in rendered], abs=1e-4)
    assert short.prompt_tokens_cut == 0
