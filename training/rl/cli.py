"""`nbest train ppo` and `nbest train reinforce`."""

from dataclasses import dataclass
from typing import Annotated

import typer

from training.cli_options import Holdout, PolicyOut, echo_serve_command, reported_errors, settings_as_options
from training.rl.config import PPOTraining, ReinforceTraining, RLMethod, RLRunOptions


@dataclass(frozen=True, kw_only=True)
class _Task:
    """The prompts, the output directory, and where completions are sampled."""

    prompts: Annotated[
        str, typer.Option(help="JSONL or Parquet file, or a Hugging Face data set, with a column prompt or messages.")
    ]
    out: PolicyOut
    validation: Annotated[str | None, typer.Option(help="Held-out prompts; default: a share of the prompts.")] = None
    holdout: Holdout = 0.1
    ray: Annotated[
        bool, typer.Option("--ray", help="Sample and score on Ray Serve replicas, started as by nbest serve --ray.")
    ] = False
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join, HOST:PORT or auto for the one of this machine; default: a new one."),
    ] = None


@settings_as_options
def ppo_command(task: _Task, settings: PPOTraining, options: RLRunOptions) -> None:
    """Train a policy on a reward by PPO, with the engine and the scorer that serve.

    The default learning rate is 1e-4, with --full 1e-6.
    """
    _train(task, settings, options)


@settings_as_options
def reinforce_command(task: _Task, settings: ReinforceTraining, options: RLRunOptions) -> None:
    """Train a policy on a reward by REINFORCE, with the engine and the scorer that serve.

    The default learning rate is 1e-4, with --full 1e-6.
    """
    _train(task, settings, options)


def _train(task: _Task, settings: RLMethod, options: RLRunOptions) -> None:
    with reported_errors():
        from training.errors import TrainingError
        from training.rl.backend import local_backend, ray_backend
        from training.rl.train import train_rl

        if task.ray_address is not None and not task.ray:
            raise TrainingError("a Ray cluster is only used with --ray; add that, or leave --ray-address out")
        written = train_rl(
            task.prompts,
            task.out,
            settings,
            options,
            validation_data=task.validation,
            holdout=task.holdout,
            start=ray_backend(task.ray_address) if task.ray else local_backend,
        )
    echo_serve_command(written, settings.base_model)
