"""PPO and REINFORCE with the serving generator and scorer: `nbest train ppo` and `nbest train reinforce`.

    prompts -> RolloutWorker (generator, scorer) -> completions with rewards -> update (learner) -> WeightSync -> ...
    held-out prompts -> Evaluator -> metrics, samples, alarms

A step samples with the weights at the end of the step before, so learning is on-policy. Learning blocks a thread, not
the event loop that receives the engine's outputs. So sampling and learning can overlap, one step off-policy:

    in turn     sample 0 | learn 0  | sync | sample 1 | learn 1  | sync | sample 2 | ...
    overlap     sample 0 | learn 0  | sync | learn 1  | sync | learn 2  | sync | ...
                         | sample 1 |      | sample 2 |      | sample 3 |

The weights in the engine change only while nothing is sampled. With overlap, every batch but the first was sampled by
the policy one step before the one that learns from it; `training.rl.losses` corrects for that. A checkpoint is written
every `checkpoint_every` steps (`training.rl.checkpoint`).
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
from training.policy.config import RunOptions
from training.policy.finetune import DataSplit
from training.policy.tokens import TokenisedRow
from training.rl.backend import Backend, StartBackend, local_backend, normalization_of, server_settings
from training.rl.checkpoint import RunState
from training.rl.config import PPOTraining, RLMethod
from training.rl.evaluation.evaluator import Evaluator
from training.rl.kl import KLController
from training.rl.learner import Learner
from training.rl.memory_report import write_memory
from training.rl.progress import TrainingProgress
from training.rl.prompts import prompts_of_step, read_prompts, seeds_of_step, tokenise_prompts
from training.rl.rewards import ScoreScale
from training.rl.rollout import RolloutBatch, RolloutWorker
from training.rl.update import optimiser_steps, update
from training.rl.weight_sync import Probe, WeightSync

SCALE_SAMPLES = 128
"""The least number of reference completions from which the scale of the rewards is measured."""
PROBE_TOKENS = 16
PLOT_EVERY_STEPS = 10
PANELS = {
    "reward": "reward",
    "kl": "KL to the reference, nats a completion",
    "entropy": "entropy, nats a token",
    "length": "length, tokens",
    "mismatch": "difference of engine and learner, nats a token",
}
COLUMNS = (
    *("reward", "reward_deviation", "score", "kl", "kl_k2", "kl_k3", "beta", "entropy", "length", "cut", "lost"),
    *("policy_loss", "ratio", "first_ratio_error", "gradient_norm", "learning_rate"),
    *("staleness", "mismatch", "importance", "sync_difference"),
    *("rollout_s", "reward_s", "learning_s", "sync_s", "drawn_tokens_per_s", "learnt_tokens_per_s", "peak_memory_mib"),
)
PPO_COLUMNS = ("clip_fraction", "value_loss", "explained_variance")


def train_rl(
    prompts: Source,
    out: Path,
    settings: RLMethod,
    options: RunOptions,
    *,
    validation_data: Source | None = None,
    holdout: float = 0.1,
    start: StartBackend = local_backend,
) -> Path:
    """Trains on the prompts and returns the directory to serve.

    The policy is evaluated on the validation data or, without any, on the share `holdout` of the prompts.

    Raises:
        DataError, DataSourceError: prompts that cannot be used, found before anything is started.
        ConfigError: a misspelt reward.
        CheckpointError: `out` holds checkpoints that this run cannot continue from.
        TrainingError: the policy cannot be trained with these settings, or engine and learner differ; checkpoints are
            kept.
    """
    split = read_prompts(prompts, validation_data, holdout)
    _check(settings, split)
    server_settings(settings)  # reports a misspelt reward before a model is loaded
    return asyncio.run(train(split, out, settings, options, start))


async def train(split: DataSplit, out: Path, settings: RLMethod, options: RunOptions, start: StartBackend) -> Path:
    """As `train_rl`, in a running event loop and with prompts that are already read."""
    device = torch.device(pick_device("auto"))
    learner = Learner(settings, device, optimiser_steps=optimiser_steps(settings))
    limits = (learner.tokenizer, learner.max_length, settings.max_tokens)
    prompts = tokenise_prompts(split.train, split.train_source, *limits)
    held_out = tokenise_prompts(split.held_out, split.held_out_source, *limits)
    state = RunState(KLController(settings.kl_coef, settings.kl_target, settings.kl_horizon))
    checkpoint_directory = out / "checkpoints"
    method = "ppo" if isinstance(settings, PPOTraining) else "reinforce"
    run = asdict(settings) | {"method": method, "data": split.digest}
    checkpoint = checkpoints.start(checkpoint_directory, run, resume=options.resume)
    if checkpoint is not None:
        state.restore(checkpoint, learner)
    weights = learner.write_for_engine(checkpoint_directory / "engine")
    engine = server_settings(settings, None if settings.full else weights, bfloat16=learner.computes_bfloat16)
    async with start(engine, learner.shared_trunk) as backend:
        evaluator = Evaluator(backend, learner, held_out, settings, out, after_step=state.step)
        await _Run(backend, learner, prompts, evaluator, out, settings, options, state).train()
    result = learner.write_result(out, merge=options.merge)
    shutil.rmtree(checkpoint_directory)
    return result


def _check(settings: RLMethod, split: DataSplit) -> None:
    """Checks the settings against one another and against the prompts.

    Raises:
        TrainingError: they contradict each other.
    """
    if settings.batch_size % settings.samples_per_prompt:
        raise TrainingError(
            f"a batch of {settings.batch_size} does not divide into prompts of {settings.samples_per_prompt} "
            "completions; change one of them"
        )
    if not isinstance(settings, PPOTraining):
        compared = settings.samples_per_prompt if settings.baseline == "rloo" else settings.batch_size
        if compared < 2:
            raise TrainingError("a single completion has no other to be compared with; sample 2 or more")
    if settings.kl_target is not None and settings.kl_target <= 0:
        raise TrainingError("a KL target of 0 allows no change of the policy; raise --kl-target, or leave it out")
    if settings.judge and not split.held_out:
        raise TrainingError("no prompt is held out for the judge; give --validation, or raise --holdout")
    if settings.temperature <= 0:
        raise TrainingError("at temperature 0 all samples are equal and nothing is learnt; raise --temperature")


class _Run:
    """The training loop of a run."""

    def __init__(
        self,
        backend: Backend,
        learner: Learner,
        prompts: list[TokenisedRow],
        evaluator: Evaluator,
        out: Path,
        settings: RLMethod,
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
        self._scorer = TimedScorer(backend.scorer)
        self._worker = RolloutWorker(
            backend.generator,
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
        longest = max(prompts, key=lambda prompt: len(prompt.prompt_ids))
        self._sync = WeightSync(
            backend.generator,
            learner,
            out / "checkpoints" / "engine",
            Probe(longest, sampling),
            settings.sync_tolerance,
        )
        columns = (*COLUMNS, *(PPO_COLUMNS if isinstance(settings, PPOTraining) else ()))
        self._table = MetricsTable(out, columns, after_step=state.step)

    async def train(self) -> None:
        sync = await self._sync()
        if self._state.scale is None:
            self._state.scale = await self._measured_scale(sync.version)
        with TrainingProgress(self._settings.steps, self._state.step, shown=self._options.progress) as progress:
            if self._state.step == 0:
                await self._evaluator(0, sync.version, progress.warn)
            while self._state.step < self._settings.steps:
                timer, scored_s = _Timer(), self._scorer.busy.seconds
                staleness = int(self._state.ahead is not None)
                batch = self._state.ahead or await self._sample(self._state.step, sync.version, "step")
                timer.lap("rollout_s")
                async with self._sampling_ahead(sync.version) as next_batch:
                    update_metrics = await asyncio.to_thread(self._learn, batch)
                    timer.lap("learning_s")
                    self._state.ahead = await next_batch
                    timer.lap("rollout_s")
                timer.laps_s["reward_s"] = self._scorer.busy.seconds - scored_s
                sync = await self._sync()
                timer.lap("sync_s")
                self._state.step += 1
                metrics = update_metrics | {"staleness": staleness, "sync_difference": sync.difference}
                self._record(batch, metrics, timer)
                progress.step(self._table.rows[-1])
                await self._evaluator(self._state.step, sync.version, progress.warn)
                if self._state.step % self._options.checkpoint_every == 0:
                    self._state.save(self._out / "checkpoints", self._learner)
        self._evaluator.close()
        self._table.close()
        plot_metrics(self._table.rows, PANELS, self._out / "metrics.png")

    async def _sample(self, number: int, version: str, purpose: str) -> RolloutBatch:
        """The batch with that number; batches for another purpose have other seeds."""
        settings = self._settings
        prompts = prompts_of_step(self._prompts, number, settings.prompts_per_step, settings.seed)
        seeds = seeds_of_step(f"{purpose} {number}", len(prompts), settings.seed)
        return await self._worker.sample(prompts, seeds, version, self._state.scale or ScoreScale())

    @asynccontextmanager
    async def _sampling_ahead(self, version: str) -> AsyncIterator[asyncio.Task[RolloutBatch | None]]:
        """Samples the next batch while the block runs; a task that is unfinished when the block ends is cancelled."""
        task = asyncio.create_task(self._next_batch(version))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _next_batch(self, version: str) -> RolloutBatch | None:
        """The batch of the next step; None without overlap, or after the last step."""
        number = self._state.step + 1
        if not self._settings.overlap or number == self._settings.steps:
            return None
        return await self._sample(number, version, "step")

    async def _measured_scale(self, version: str) -> ScoreScale:
        """The scale of the rewards over samples of the policy before the first step, which is the reference."""
        if normalization_of(self._settings) == "none":
            return ScoreScale()
        rewards: list[float] = []
        for number in itertools.count():
            rewards += (await self._sample(number, version, "scale")).rewards
            if len(rewards) >= SCALE_SAMPLES:
                break
        return ScoreScale.measured(rewards)

    def _learn(self, batch: RolloutBatch) -> dict[str, float]:
        step, beta = self._state.step, self._state.kl.beta
        rng = random.Random(f"{self._settings.seed} minibatches {step}")
        metrics = update(self._learner, batch.completions, beta, self._settings, rng)
        if not self._learner.is_finite():
            raise TrainingError("training diverged: the weights are not finite; train with a lower learning rate")
        self._state.kl.observe(metrics["kl"], len(batch.completions))
        return metrics | {"beta": beta}

    def _record(self, batch: RolloutBatch, metrics: dict[str, float], timer: "_Timer") -> None:
        completions, tokens = batch.completions, batch.num_tokens
        self._table.add(
            self._state.step,
            {
                "reward": fmean(batch.rewards),
                "reward_deviation": pstdev(batch.rewards),
                "score": fmean(completion.score for completion in completions),
                "length": tokens / len(completions),
                "cut": fmean(completion.is_cut for completion in completions),
                "lost": batch.lost,
                **metrics,
                **timer.laps_s,
                "drawn_tokens_per_s": tokens / batch.seconds,
                "learnt_tokens_per_s": tokens / timer.laps_s["learning_s"],
                "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            },
        )
        if self._state.step == 1:
            write_memory(self._learner, self._out)
        if self._state.step % PLOT_EVERY_STEPS == 0:
            plot_metrics(self._table.rows, PANELS, self._out / "metrics.png")


class _Timer:
    """Seconds between laps, by the name of the lap; laps of the same name add up."""

    def __init__(self) -> None:
        self.laps_s: dict[str, float] = {}
        self._started_s = time.perf_counter()

    def lap(self, name: str) -> None:
        now_s = time.perf_counter()
        self.laps_s[name] = self.laps_s.get(name, 0.0) + now_s - self._started_s
        self._started_s = now_s
