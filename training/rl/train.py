"""PPO and REINFORCE with the actors that serve: `nbest train ppo` and `nbest train reinforce`.

    prompts -> RolloutWorker (generator, scorer) -> completions with rewards -> update (learner) -> WeightSync -> ...
    held-out prompts -> Evaluator -> figures, samples, alarms

A step draws with the weights that the step before it ended with, so learning is on-policy. Learning blocks a thread and
not the event loop, on which the engine's answers arrive; so they may overlap, one step off:

    in turn     draw 0 | learn 0 | sync | draw 1 | learn 1 | sync | draw 2 | ...
    overlap     draw 0 | learn 0 | sync | learn 1 | sync | learn 2 | sync | ...
                       | draw 1  |      | draw 2  |      | draw 3  |

The weights in the engine change only while nothing is drawn. Every batch but the first is then drawn by the policy one
step before the one that learns from it, which `training.rl.losses` makes up for. After every `checkpoint_every` steps
all is kept to go on from (`training.rl.checkpoint`).
"""

import asyncio
import itertools
import random
import resource
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, pstdev

import torch

from reranker.models.device import pick_device
from reranker.scorers.busy_time import TimedScorer
from server.generation.base import SamplingParams
from training import checkpoints
from training.data.data_source import Source
from training.errors import TrainingError
from training.metrics_log import MetricsTable, plot_metrics
from training.policy.finetune import Parts, RunOptions
from training.policy.tokens import TokenisedRow
from training.rl.backend import Actors, Start, normalization_of, server_settings, started_actors
from training.rl.checkpoint import RunState
from training.rl.config import PPOTraining
from training.rl.evaluation.evaluator import Evaluator
from training.rl.kl import KLController
from training.rl.learner import Learner
from training.rl.memory_report import write_memory
from training.rl.progress import TrainingProgress
from training.rl.prompts import in_tokens, of_step, read_prompts, seeds_of_step
from training.rl.rewards import ScoreScale
from training.rl.rollout import Rollouts, RolloutWorker
from training.rl.update import Method, optimiser_steps, update
from training.rl.weight_sync import Probe, WeightSync

SCALE_SAMPLES = 128
"""Completions of the reference, at least, that the scale of the rewards is measured on."""
PROBE_TOKENS = 16
PLOT_EVERY_STEPS = 10
PANELS = {
    "reward": "reward",
    "kl": "KL to the reference, nats a completion",
    "entropy": "entropy, nats a token",
    "length": "length, tokens",
    "mismatch": "engine and learner apart, nats a token",
}
COLUMNS = (
    *("reward", "reward_deviation", "score", "kl", "kl_k2", "kl_k3", "beta", "entropy", "length", "cut", "lost"),
    *("policy_loss", "ratio", "first_ratio_error", "gradient_norm", "learning_rate"),
    *("staleness", "mismatch", "importance", "sync_difference"),
    *("rollout_s", "reward_s", "learning_s", "sync_s", "drawn_tokens_per_s", "learnt_tokens_per_s", "peak_memory_mib"),
)
COLUMNS_OF_PPO = ("clip_fraction", "value_loss", "explained_variance")


def train_rl(
    prompts: Source,
    out: Path,
    settings: Method,
    options: RunOptions,
    *,
    validation_data: Source | None = None,
    holdout: float = 0.1,
    start: Start = started_actors,
) -> Path:
    """Trains on the prompts and returns the directory that can be served.

    Evaluated is on the validation data or, without any, on the share `holdout` of the prompts.

    Raises:
        DataError, DataSourceError: prompts that cannot be used, found before anything is started.
        ConfigError: a reward that is misspelt.
        CheckpointError: `out` holds checkpoints that this run cannot go on from.
        TrainingError: the policy cannot be trained like this, or engine and learner are apart; what was kept stays.
    """
    parts = read_prompts(prompts, validation_data, holdout)
    _check(settings, parts)
    server_settings(settings)  # a misspelt reward is told before a model is loaded
    return asyncio.run(train(parts, out, settings, options, start))


async def train(parts: Parts, out: Path, settings: Method, options: RunOptions, start: Start) -> Path:
    """What `train_rl` does with prompts that were read, in a loop that is there."""
    device = torch.device(pick_device("auto"))
    learner = Learner(settings, device, optimiser_steps=optimiser_steps(settings))
    limits = (learner.tokenizer, learner.max_length, settings.max_tokens)
    prompts = in_tokens(parts.trained, parts.trained_source, *limits)
    held_out = in_tokens(parts.held_out, parts.held_out_source, *limits)
    state = RunState(KLController(settings.kl_coef, settings.kl_target, settings.kl_horizon))
    kept = out / "checkpoints"
    method = "ppo" if isinstance(settings, PPOTraining) else "reinforce"
    run = asdict(settings) | {"method": method, "data": parts.digest}
    checkpoint = checkpoints.start(kept, run, resume=options.resume)
    if checkpoint is not None:
        state.restore(checkpoint, learner)
    written = learner.write_for_engine(kept / "engine")
    engine = server_settings(settings, None if settings.full else written, bfloat16=learner.computes_bfloat16)
    async with start(engine, learner.held_trunk) as actors:
        evaluator = Evaluator(actors, learner, held_out, settings, out, after_step=state.step)
        await _Run(actors, learner, prompts, evaluator, out, settings, options, state)()
    result = learner.write_result(out, merge=options.merge)
    shutil.rmtree(kept)
    return result


def _check(settings: Method, parts: Parts) -> None:
    """What the fields must be to one another, and to the prompts.

    Raises:
        TrainingError: they do not go together.
    """
    if settings.batch_size % settings.samples_per_prompt:
        raise TrainingError(
            f"a batch of {settings.batch_size} does not divide into prompts of {settings.samples_per_prompt} "
            "completions; change one of them"
        )
    if not isinstance(settings, PPOTraining):
        compared = settings.samples_per_prompt if settings.baseline == "rloo" else settings.batch_size
        if compared < 2:
            raise TrainingError("a completion alone has nothing to be compared with; draw 2 or more")
    if settings.kl_target is not None and settings.kl_target <= 0:
        raise TrainingError("a target of no KL leaves nothing to learn; raise --kl-target, or leave it out")
    if settings.judge and not parts.held_out:
        raise TrainingError("no prompt is held out for the judge; give --validation, or raise --holdout")
    if settings.temperature <= 0:
        raise TrainingError("at temperature 0 all samples are the same and nothing is learnt; raise --temperature")


class _Run:
    """The steps of a run."""

    def __init__(
        self,
        actors: Actors,
        learner: Learner,
        prompts: list[TokenisedRow],
        evaluator: Evaluator,
        out: Path,
        settings: Method,
        options: RunOptions,
        state: RunState,
    ) -> None:
        self._learner = learner
        self._prompts = prompts
        self._evaluator = evaluator
        self._out = out
        self._settings = settings
        self._options = options
        self._state = state
        self._scorer = TimedScorer(actors.scorer)
        self._worker = RolloutWorker(
            actors.generator,
            self._scorer,
            samples=settings.samples_per_prompt,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            truncation_penalty=settings.truncation_penalty,
        )
        sampling = SamplingParams(
            max_tokens=min(PROBE_TOKENS, settings.max_tokens),
            temperature=settings.temperature,
            seed=settings.seed,
            logprobs=0,
        )
        longest = max(prompts, key=lambda one: len(one.prompt_ids))
        self._sync = WeightSync(
            actors.generator, learner, out / "checkpoints" / "engine", Probe(longest, sampling), settings.sync_tolerance
        )
        columns = (*COLUMNS, *(COLUMNS_OF_PPO if isinstance(settings, PPOTraining) else ()))
        self._table = MetricsTable(out, columns, after_step=state.step)

    async def __call__(self) -> None:
        synced = await self._sync()
        if self._state.scale is None:
            self._state.scale = await self._measured_scale(synced.version)
        with TrainingProgress(self._settings.steps, self._state.step, shown=self._options.progress) as progress:
            if self._state.step == 0:
                await self._evaluator(0, synced.version, progress.warn)
            while self._state.step < self._settings.steps:
                timer, scored_s = _Timer(), self._scorer.busy.seconds
                staleness = int(self._state.ahead is not None)
                rollouts = self._state.ahead or await self._draw(self._state.step, synced.version, "step")
                timer.lap("rollout_s")
                async with self._drawing_ahead(synced.version) as drawing:
                    learnt = await asyncio.to_thread(self._learn, rollouts)
                    timer.lap("learning_s")
                    self._state.ahead = await drawing
                    timer.lap("rollout_s")
                timer.laps_s["reward_s"] = self._scorer.busy.seconds - scored_s
                synced = await self._sync()
                timer.lap("sync_s")
                self._state.step += 1
                measures = learnt | {"staleness": staleness, "sync_difference": synced.difference}
                self._record(rollouts, measures, timer)
                progress.step(self._table.rows[-1])
                await self._evaluator(self._state.step, synced.version, progress.warn)
                if self._state.step % self._options.checkpoint_every == 0:
                    self._state.save(self._out / "checkpoints", self._learner)
        self._evaluator.close()
        self._table.close()
        plot_metrics(self._table.rows, PANELS, self._out / "metrics.png")

    async def _draw(self, number: int, version: str, purpose: str) -> Rollouts:
        """The batch of that number; those of another purpose have other seeds."""
        settings = self._settings
        prompts = of_step(self._prompts, number, settings.prompts_a_step, settings.seed)
        seeds = seeds_of_step(f"{purpose} {number}", len(prompts), settings.seed)
        return await self._worker.draw(prompts, seeds, version, self._state.scale or ScoreScale())

    @asynccontextmanager
    async def _drawing_ahead(self, version: str) -> AsyncIterator[asyncio.Task[Rollouts | None]]:
        """Draws while the block is gone through; what is still under way at its end is given up."""
        drawing = asyncio.create_task(self._drawn_ahead(version))
        try:
            yield drawing
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)

    async def _drawn_ahead(self, version: str) -> Rollouts | None:
        """The batch of the next step, where there is one and drawing overlaps learning."""
        number = self._state.step + 1
        if not self._settings.overlap or number == self._settings.steps:
            return None
        return await self._draw(number, version, "step")

    async def _measured_scale(self, version: str) -> ScoreScale:
        """Of the policy as it is before the first step: the reference."""
        if normalization_of(self._settings) == "none":
            return ScoreScale()
        rewards: list[float] = []
        for number in itertools.count():
            rewards += (await self._draw(number, version, "scale")).rewards
            if len(rewards) >= SCALE_SAMPLES:
                break
        return ScoreScale.measured(rewards)

    def _learn(self, rollouts: Rollouts) -> dict[str, float]:
        step, beta = self._state.step, self._state.kl.beta
        rng = random.Random(f"{self._settings.seed} minibatches {step}")
        learnt = update(self._learner, rollouts.completions, beta, self._settings, rng)
        if not self._learner.is_finite():
            raise TrainingError("training diverged, so the weights are no numbers; train with a lower learning rate")
        self._state.kl.observe(learnt["kl"], len(rollouts.completions))
        return learnt | {"beta": beta}

    def _record(self, rollouts: Rollouts, measures: dict[str, float], timer: "_Timer") -> None:
        completions, tokens = rollouts.completions, rollouts.num_tokens
        self._table.add(
            self._state.step,
            {
                "reward": fmean(rollouts.rewards),
                "reward_deviation": pstdev(rollouts.rewards),
                "score": fmean(one.score for one in completions),
                "length": tokens / len(completions),
                "cut": fmean(one.is_cut for one in completions),
                "lost": rollouts.lost,
                **measures,
                **timer.laps_s,
                "drawn_tokens_per_s": tokens / rollouts.seconds,
                "learnt_tokens_per_s": tokens / timer.laps_s["learning_s"],
                "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            },
        )
        if self._state.step == 1:
            write_memory(self._learner, self._out)
        if self._state.step % PLOT_EVERY_STEPS == 0:
            plot_metrics(self._table.rows, PANELS, self._out / "metrics.png")


class _Timer:
    """Seconds from one lap to the next, by name; laps of one name add up."""

    def __init__(self) -> None:
        self.laps_s: dict[str, float] = {}
        self._begun_s = time.perf_counter()

    def lap(self, name: str) -> None:
        now_s = time.perf_counter()
        self.laps_s[name] = self.laps_s.get(name, 0.0) + now_s - self._begun_s
        self._begun_s = now_s
