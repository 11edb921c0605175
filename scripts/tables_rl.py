"""The tables of docs/training.md: memory and time of a PPO run, learner throughput, and overlap."""

from typing import Any

from reranker.markdown import table
from scripts.markdown import machine, with_extremes

PARAMETERS = {
    "base": "base, shared by policy, reference and reward model",
    "policy": "policy adapter",
    "reward": "reward adapter and head",
    "values": "value head",
}

BASE_7B, HIDDEN, INNER, LAYERS = 6.74e9, 4096, 11008, 32
"""Llama 2 7B: parameters and shapes."""
POLICY_RANK, REWARD_RANK = 16, 8


def memory(result: dict[str, Any]) -> str:
    """Bytes by purpose, and the bytes of separate models for comparison."""
    held = result["held_bytes"]
    base, parameters = held["base"], sum(held[name] for name in PARAMETERS)

    def row(what: str, num_bytes: float, *, bold: bool = False) -> tuple[str, ...]:
        mark = "**" if bold else ""
        return f"{mark}{what}{mark}", f"{num_bytes / 2**20:,.1f}", f"{mark}{num_bytes / base:.3f}{mark}"

    rows = [
        *(row(what, held[name]) for name, what in PARAMETERS.items()),
        row("all parameters", parameters, bold=True),
        row("gradients of the trained parameters", held["gradients"]),
        row("Adam's two moments", held["optimiser"]),
        row("instead: policy, reference and reward model as separate models", 3 * base),
        row("instead: these and a value model", 4 * base),
        row("peak resident memory, with activations and libraries", result["peak_rss_bytes"]),
        row("the engine's processes: its copy of the base, keys and values, libraries", result["engine_rss_bytes"]),
    ]
    return table(("in the learner's process", "MiB", "of one checkpoint"), rows) + f"\n{_provenance(result)}\n"


def memory_7b() -> str:
    """The same for 7 billion parameters, computed."""
    base = 2 * BASE_7B
    policy, reward = (4 * _adapter_parameters(rank) for rank in (POLICY_RANK, REWARD_RANK))
    rows = {
        "base, bfloat16": base,
        f"policy adapter of rank {POLICY_RANK}, float32": policy,
        f"reward adapter of rank {REWARD_RANK} and two heads, float32": reward + 8 * (HIDDEN + 1),
        "gradients of the policy adapter": policy,
        "Adam's two moments": 2 * policy,
    }
    total = sum(rows.values())
    rows |= {
        "**together**": total,
        "instead: three models in bfloat16": 3 * base,
        "instead: four": 4 * base,
        "instead: four, with full training of policy and value model at 16 bytes a parameter": 2 * 16 * BASE_7B
        + 2 * base,
    }
    return table(("7 billion parameters", "GB"), ((what, f"{size / 1e9:,.2f}") for what, size in rows.items()))


def time(result: dict[str, Any]) -> str:
    """Each phase's share of the wall-clock."""
    share = {name: f"{100 * value:.0f} %" for name, value in result["share_of_time"].items()}
    rows = [
        ("rollout", share["rollout"]),
        ("… of which with a scorer at work", share["reward"]),
        ("learning", share["learning"]),
        ("weight sync", share["sync"]),
    ]
    return (
        table(("share of the wall-clock", ""), rows)
        + f"\n{result['steps']} steps of {result['seconds_a_step']:.0f} seconds. {_provenance(result)}\n"
    )


def learner_throughput(result: dict[str, Any]) -> str:
    """The learner's tokens a second relative to a bare loop's."""
    rows = [(part, with_extremes(share)) for part, share in result["share_of_bare"].items()]
    rounds = next(iter(result["share_of_bare"].values()))["rounds"]
    low, high = result["prompt_tokens"]
    return (
        table(("the learner's tokens a second, relative to a bare loop's", "median (extremes)"), rows)
        + f"\n{rounds} alternating rounds, {result['completions']} completions of {result['completion_tokens']} tokens "
        f"after prompts of {low} to {high}, on {result['device']}. {_provenance(result)}\n"
    )


def overlap(result: dict[str, Any]) -> str:
    """Seconds of a step with sampling and learning in turn, and overlapping."""

    def row(way: str, figures: dict[str, Any]) -> tuple[str, ...]:
        step_s = figures["step_s"]
        return (
            way,
            f"{step_s['median']:.1f} ({step_s['low']:.1f} … {step_s['high']:.1f})",
            *(f"{figures[part]:.1f}" for part in ("learning_s", "rollout_s", "sync_s")),
            f"{figures['mismatch']:.4f}",
            f"{figures['importance']:.3f}",
        )

    heading = (
        *("sampling and learning", "seconds a step, median (extremes)", "learning", "waiting for completions"),
        *("weight sync", "`mismatch`", "`importance`"),
    )

    ratio = result["times_as_fast"]
    return (
        table(heading, (row(way, figures) for way, figures in result["ways"].items()))
        + f"\nWith overlap a step is {ratio['median']:.2f} times as fast ({ratio['low']:.2f} … {ratio['high']:.2f}; "
        f"{ratio['rounds']} alternating rounds). {result['completions']} completions of {result['completion_tokens']} "
        f"tokens a step, {result['epochs']} passes, on {result['device']}. {_provenance(result)}\n"
    )


def _adapter_parameters(rank: int) -> int:
    """Parameters of LoRA adapters of all linear layers but the output layer."""
    of_layer = 4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + INNER)
    return LAYERS * rank * of_layer


def _provenance(result: dict[str, Any]) -> str:
    source = result["provenance"]
    return f"Measured {source['date'][:10]} at commit `{source['commit'][:9]}` on {machine(source)}."
