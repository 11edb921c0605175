"""The tables of docs/training.md: what a run of PPO holds in memory, and where its time goes."""

from typing import Any

from scripts.markdown import machine, with_extremes

PARAMETERS = {
    "base": "base: of the policy, of its reference and of the reward model",
    "policy": "policy adapter",
    "reward": "reward adapter and head",
    "values": "value head",
}

BASE_7B, HIDDEN, INNER, LAYERS = 6.74e9, 4096, 11008, 32
"""Llama 2 7B: parameters and shapes."""
POLICY_RANK, REWARD_RANK = 16, 8


def memory(found: dict[str, Any]) -> str:
    """Bytes by what they are for, and those of the models that are not there."""
    held = found["held_bytes"]
    base, parameters = held["base"], sum(held[name] for name in PARAMETERS)

    def row(what: str, num_bytes: float, *, bold: bool = False) -> str:
        mark = "**" if bold else ""
        return f"| {mark}{what}{mark} | {num_bytes / 2**20:,.1f} | {mark}{num_bytes / base:.3f}{mark} |\n"

    return (
        "| in the learner's process | MiB | of one checkpoint |\n|---|---|---|\n"
        + "".join(row(what, held[name]) for name, what in PARAMETERS.items())
        + row("all parameters", parameters, bold=True)
        + row("gradients of what learns", held["gradients"])
        + row("Adam's two moments", held["optimiser"])
        + row("instead: policy, reference and reward as models of their own", 3 * base)
        + row("instead: and a value model", 4 * base)
        + row("peak of resident memory, with activations and libraries", found["peak_rss_bytes"])
        + row("the engine's processes: its copy of the base, keys and values, libraries", found["engine_rss_bytes"])
        + f"\n{_provenance(found)}\n"
    )


def memory_7b() -> str:
    """The same for 7 billion parameters, by arithmetic."""
    base = 2 * BASE_7B
    policy, reward = (4 * _adapter_parameters(rank) for rank in (POLICY_RANK, REWARD_RANK))
    rows = {
        "base, bfloat16": base,
        f"policy adapter of rank {POLICY_RANK}, float32": policy,
        f"reward adapter of rank {REWARD_RANK} and two heads, float32": reward + 8 * (HIDDEN + 1),
        "gradients of the policy adapter": policy,
        "Adam's two moments": 2 * policy,
    }
    whole = sum(rows.values())
    rows |= {
        "**together**": whole,
        "instead: three models in bfloat16": 3 * base,
        "instead: four": 4 * base,
        "instead: four, of which policy and value model learn whole, at 16 bytes a parameter": 2 * 16 * BASE_7B
        + 2 * base,
    }
    return "| 7 billion parameters | GB |\n|---|---|\n" + "".join(
        f"| {what} | {num_bytes / 1e9:,.2f} |\n" for what, num_bytes in rows.items()
    )


def time(found: dict[str, Any]) -> str:
    """Each phase's share of the wall-clock."""
    share = {name: f"{100 * value:.0f} %" for name, value in found["share_of_time"].items()}
    return (
        "| share of the wall-clock | |\n|---|---|\n"
        f"| rollout | {share['rollout']} |\n| … in which a scorer was at it | {share['reward']} |\n"
        f"| learning | {share['learning']} |\n| weight sync | {share['sync']} |\n"
        f"\n{found['steps']} steps of {found['seconds_a_step']:.0f} seconds. {_provenance(found)}\n"
    )


def learner_throughput(found: dict[str, Any]) -> str:
    """The learner's tokens a second against a bare loop's."""
    rows = [f"| {what} | {with_extremes(one)} |\n" for what, one in found["share_of_bare"].items()]
    rounds = next(iter(found["share_of_bare"].values()))["rounds"]
    low, high = found["prompt_tokens"]
    return (
        "| the learner's tokens a second, of a bare loop's | median (extremes) |\n|---|---|\n"
        + "".join(rows)
        + f"\n{rounds} rounds in turn, {found['completions']} completions of {found['completion_tokens']} tokens after "
        f"prompts of {low} to {high}, on {found['device']}. {_provenance(found)}\n"
    )


def overlap(found: dict[str, Any]) -> str:
    """Seconds a step with drawing and learning in turn and one over the other."""

    def row(way: str, one: dict[str, Any]) -> str:
        whole = one["step_s"]
        return (
            f"| {way} | {whole['median']:.1f} ({whole['low']:.1f} … {whole['high']:.1f}) | {one['learning_s']:.1f} "
            f"| {one['rollout_s']:.1f} | {one['sync_s']:.1f} | {one['mismatch']:.4f} | {one['importance']:.3f} |\n"
        )

    ratio = found["times_as_fast"]
    return (
        "| drawing and learning | seconds a step, median (extremes) | learning | waiting for completions | weight sync "
        "| `mismatch` | `importance` |\n|---|---|---|---|---|---|---|\n"
        + "".join(row(way, one) for way, one in found["ways"].items())
        + f"\nOverlapping, a step is {ratio['median']:.2f} times as fast ({ratio['low']:.2f} … {ratio['high']:.2f}; "
        f"{ratio['rounds']} rounds by turns). {found['completions']} completions of {found['completion_tokens']} "
        f"tokens a step, {found['epochs']} passes, on {found['device']}. {_provenance(found)}\n"
    )


def _adapter_parameters(rank: int) -> int:
    """Of LoRA in all linear layers but the output."""
    of_layer = 4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + INNER)
    return LAYERS * rank * of_layer


def _provenance(found: dict[str, Any]) -> str:
    source = found["provenance"]
    return f"Measured {source['date'][:10]} at commit `{source['commit'][:9]}` on {machine(source)}."
