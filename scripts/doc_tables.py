"""Fills the tables of the pages from benchmarks/results and from the code.

The prose of the pages is written by hand; the text between `<!-- name -->` and `<!-- /name -->` comes from this module.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from reranker.markdown import table
from scripts import model_card, reliability, tables_latency, tables_readme, tables_rl
from scripts.markdown import machine, with_extremes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def filled(page: Path) -> str:
    """The text of a page with every block filled again."""

    def fill(block: re.Match[str]) -> str:
        name = block["name"]
        return f"<!-- {name} -->\n{BLOCKS[name]()}<!-- /{name} -->"

    return re.sub(r"<!-- (?P<name>[a-z-]+) -->\n.*?<!-- /(?P=name) -->", fill, page.read_text(), flags=re.DOTALL)


def read_result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def read_result_if_exists(name: str) -> Any:
    return read_result(name) if (RESULTS / f"{name}.json").exists() else None


NOT_MEASURED = "Not measured yet.\n"


def if_measured(name: str, block: Callable[[Any], str]) -> Callable[[], str]:
    """The block of a result, or NOT_MEASURED where the result does not exist."""

    def fill() -> str:
        result = read_result_if_exists(name)
        return NOT_MEASURED if result is None else block(result)

    return fill


def with_interval(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.2f} ({figure['low']:.2f} … {figure['high']:.2f})"


def quality() -> str:
    """Reward and VADER score of the winner against N."""
    result = read_result("quality")
    rows = [
        (n, with_interval(result["winner_reward"][n]), with_interval(result["winner_vader"][n]))
        for n in result["winner_reward"]
    ]
    return (
        table(("best_of", "mean reward of the winner (95 % interval)", "independent judge: VADER, -1 to 1"), rows)
        + f"\n{result['prompts']} openings of film reviews, {result['max_tokens']} new tokens, "
        f"`{result['policy']}` scored by `{result['reward_model']}`. From 1 to 16 the mean rises by "
        f"{result['gain_of_16_over_1_in_single_sample_sd']:.2f} standard deviations of single-sample rewards "
        f"({result['single_sample_reward']['sd']:.2f}).\n"
    )


def scoring_overhead() -> str:
    """The time of scoring, and the stages of a request."""
    result = read_result("scoring_overhead")
    ratio, stages = result["with_scoring_over_without"], result["with_scoring_s"]
    seconds = [
        ("the same generations alone", f"{result['without_scoring_s']['median']:.2f}"),
        ("whole request", f"{stages['total']:.2f}"),
        ("… until the last candidate ends", f"{stages['queue'] + stages['generate']:.2f}"),
        ("… with a scorer at work (overlaps with generation)", f"{stages['score']:.2f}"),
        ("… after the last candidate", f"{result['after_the_last_candidate_s']:.2f}"),
        ("… selection", f"{stages['select']:.5f}"),
    ]
    return (
        f"`best_of={result['best_of']}` with scoring takes **{ratio['median']:.2f} times** as long as the same "
        f"{result['best_of']} generations without it (median of {ratio['rounds']} alternating rounds, "
        f"{ratio['low']:.2f} … {ratio['high']:.2f}; {result['prompt_tokens']}-token prompt, {result['max_tokens']} new "
        "tokens).\n\n" + table(("seconds, median", ""), seconds)
    )


def prefill() -> str:
    """Seconds of 16 candidates for one prompt, by `vllm serve` and by nbest's engine."""
    result = read_result("prefill")
    rows = [
        (
            arm,
            max_tokens,
            f"{case['vllm_serve_s']:.2f}",
            f"{case['ours_s']:.2f}",
            with_extremes(case["ratio"]),
        )
        for arm, by_tokens in result["by_max_tokens"].items()
        for max_tokens, case in by_tokens.items()
    ]
    return table(("`vllm serve` with", "new tokens", "its seconds", "nbest's", "ratio (extremes)"), rows)


def scoring() -> str:
    """Seconds of nbest and of three other ways to score the same candidates."""
    result = read_result("scoring")
    rows = [
        (
            f"{case['prompt_tokens']} + {result['best_of']} of {case['candidate_tokens']}",
            way,
            f"{case['seconds'][way]['median']:.2f}",
            f"{case['seconds']['ours']['median']:.2f}",
            with_extremes(ratio),
            f"{ratio['bar']:g}",
        )
        for case in result["cases"].values()
        for way, ratio in case["times_longer_than_ours"].items()
    ]
    difference = max(case["largest_difference_of_rewards"] for case in result["cases"].values())
    return (
        table(("tokens", "other way", "its seconds", "nbest's", "ratio (extremes)", "bar, at least"), rows)
        + f"\nMedians of {result['rounds']} alternating rounds; SmolLM2-135M's trunk in float32. The rewards differ by "
        f"{difference:.0e} at most.\n"
    )


def router_overhead() -> str:
    """CPU milliseconds of the server's process for a request, with a scripted generator and scorer."""
    result = read_result("router_overhead")
    names = {
        "n1": "best_of 1",
        "n16": "best_of 16",
        "n16_candidates": "best_of 16, all candidates returned",
        "n1_stream": "best_of 1, streamed word by word",
    }
    rows = [
        (names[case], f"{cpu_ms['mean']:.2f} ± {cpu_ms['stdev']:.2f}", f"{cpu_ms['min']:.2f}")
        for case, cpu_ms in result["cpu_ms_per_request"].items()
    ]
    return table(("request", "CPU ms, mean ± standard deviation", "minimum"), rows)


def card(block: Callable[[Any], str]) -> Callable[[], str]:
    return lambda: block(read_result("reward_movie-sentiment"))


def arithmetic() -> str:
    """Share of correct answers by selection strategy and n."""
    result = read_result("arithmetic")
    sizes = list(next(iter(result["curves"].values())))

    def percent(share: dict[str, float]) -> str:
        return f"{100 * share['mean']:.0f} ({100 * share['low']:.0f} … {100 * share['high']:.0f})"

    rows = [(name, *(percent(share) for share in curve.values())) for name, curve in result["curves"].items()]
    largest = sizes[-1]
    shares = [by_n[largest] for by_n in result["best_of_n_by_training_seed"].values()]
    accuracies = result["held_out_pair_accuracy_by_training_seed"].values()
    problems = result["problems"]
    return (
        table(("n", *sizes), rows)
        + f"\nPercent of {problems['test']} problems answered correctly, with 95 % bootstrap intervals over problems. "
        f"Greedy: {percent(result['greedy'])}. One pool of {result['pool']} candidates for each problem. The reward "
        f"model was trained {len(result['training_seeds'])} times, with different seeds, on {problems['pairs']} pairs "
        f"of answers to other problems: best of {largest} by it is correct in {100 * min(shares):.0f} to "
        f"{100 * max(shares):.0f} %, and its accuracy on held-out pairs is {100 * min(accuracies):.0f} to "
        f"{100 * max(accuracies):.0f} %.\n"
    )


def improve() -> str:
    """Best of n of the base against the trained policies, by every measure."""
    result = read_result("improve")
    rows = {f"base, best of {n}": figures for n, figures in result["best_of_n_of_the_base"].items()}
    rows |= {f"{name}, best of 1": figures for name, figures in result["policies_at_best_of_1"].items()}

    diversity = ", ".join(f"{name} {100 * share:.0f} %" for name, share in result["distinct_first_words"].items())
    samples = ", ".join(f"{count} of {name}" for name, count in result["samples_a_prompt"].items())
    return (
        against_base(rows)
        + f"\n{result['prompts']['held_out']} held-out openings, {result['max_tokens']} new tokens, 95 % bootstrap "
        f"intervals over openings; samples of each opening: {samples}. Trained on {result['prompts']['train']} other "
        f"openings: {' and '.join(map(str, result['demonstrations']))} winners in the rounds, {result['pairs']} pairs "
        f"for DPO. Distinct first four words among the samples of an opening: {diversity}.\n"
    )


def rl() -> str:
    """Policies trained with PPO and REINFORCE, for each seed, against best of n of the base."""
    result = read_result("rl")
    best = result["best_of_n_of_the_base"]
    rows = {f"base, best of {n}": best[n] for n in ("1", "4", "16")}
    notes = []
    for method, runs in result["runs"].items():
        rows |= {f"{method}, seed {seed}, best of 1": run["held_out"] for seed, run in runs.items()}
        minutes = [sum(run["seconds"].values()) / 60 for run in runs.values()]
        shares = {
            name: sum(run["seconds"][name] for run in runs.values()) for name in ("rollout_s", "learning_s", "sync_s")
        }
        phases = ", ".join(f"{name[:-2]} {100 * part / sum(shares.values()):.0f} %" for name, part in shares.items())
        diversity = " / ".join(f"{100 * run['distinct_first_words']:.0f} %" for run in runs.values())
        notes.append(
            f"{method}: {min(minutes):.0f} to {max(minutes):.0f} minutes a run ({phases}), distinct first four words "
            f"among the samples of an opening {diversity}"
        )
    return (
        against_base(rows)
        + f"\n{result['prompts']['held_out']} held-out openings, {result['max_tokens']} new tokens, 95 % bootstrap "
        f"intervals over openings; trained on {result['prompts']['train']} others. {'; '.join(notes)}; the base "
        f"{100 * result['distinct_first_words_of_the_base']:.0f} %.\n"
    )


def rlhf_pipeline(result: Any) -> str:
    """The policies that each method trained from the same start."""
    rows = {f"start, best of {n}": figures for n, figures in result["best_of_n_of_the_base"].items()}
    rows |= {f"{name}, best of 1": figures for name, figures in result["policies_at_best_of_1"].items()}
    test = {name: 100 * result["reward_test"][name] for name in ("accuracy", "low", "high")}
    return (
        against_base(rows, "start")
        + f"\n{result['prompts']['held_out']} held-out openings, {result['max_tokens']} new tokens, one seed, 95 % "
        f"bootstrap intervals over openings. The reward model orders {test['accuracy']:.0f} % ({test['low']:.0f} … "
        f"{test['high']:.0f}) of {result['reward_test']['comparisons']} held-out pairs as people did.\n"
    )


def against_base(rows: dict[str, Any], base: str = "base") -> str:
    """Policies by the measures of `benchmarks.policy_evaluation`; `base` is the policy that training started from."""

    def kl(figure: dict[str, float]) -> str:
        return with_interval(figure) if "low" in figure else f"≤ {figure['mean']:.2f}"

    heading = (
        "",
        "mean reward",
        "VADER, -1 to 1",
        f"perplexity under the {base}",
        f"KL to the {base}, nats a sequence",
    )
    return table(
        heading,
        [
            (
                name,
                with_interval(figures["reward"]),
                with_interval(figures["vader"]),
                with_interval(figures["perplexity_under_base"]),
                kl(figures["kl"]),
            )
            for name, figures in rows.items()
        ],
    )


def offline() -> str:
    """Throughput of the offline mode against the bare engine and a transformers script."""
    result = read_result("offline")
    rounds = result["works"]["openings"]["times_as_fast_as"]["transformers"]["rounds"]
    heading = (
        "work",
        "scorer of the offline mode",
        "other way",
        "offline",
        "other",
        "ratio (extremes)",
        "bar, at least",
    )
    return (
        table(heading, [row for name, work in result["works"].items() for row in _offline_rows(name, work)])
        + f"\n{result['prompts']} prompts, {result['best_of']} candidates each, {rounds} alternating rounds.\n"
    )


def _offline_rows(name: str, work: Any) -> Iterator[tuple[str, ...]]:
    def row(scorer: str, way: str, other: str, speeds: dict[str, float], digits: int, unit: str) -> tuple[str, ...]:
        ratio = work["times_as_fast_as"][other]
        return (
            name,
            scorer,
            way,
            f"{speeds[f'offline, {scorer}']:.{digits}f} {unit}",
            f"{speeds[other]:.{digits}f} {unit}",
            with_extremes(ratio),
            f"{ratio['bar']:g}",
        )

    tokens, pairs = work["tokens_per_s"], work["pairs_per_s"]
    yield row("logprob", "the bare engine, without scoring or files", "bare engine", tokens, 0, "tokens/s")
    yield row("reward model", "transformers: generate all, then score all", "transformers", pairs, 1, "pairs/s")


def batch_memory() -> str:
    runs = read_result("batch_memory")["runs"]
    peaks = ", ".join(f"{run['peak_mib']:.0f} MiB for {run['lines']:,} lines" for run in runs)
    return (
        f"Peak memory of the command, with a generator that answers at once: {peaks} (`benchmarks/batch_memory.py`).\n"
    )


RENAMED = {
    "frugal": "stopping",
    "frugal_live": "stopping_live",
    "many_lines": "batch_memory",
    "overhead": "scoring_overhead",
    "router": "router_overhead",
}
"""Modules of benchmarks/ that recorded commands name -> what they are called now."""


def provenance() -> str:
    """The command, commit, date and machine of every result."""
    rows = [
        (
            f"[{path.stem}](../benchmarks/results/{path.name})",
            f"`{source['command']}`" if "command" in source else "",
            f"`{source['commit'][:9]}`",
            source["date"][:10],
            machine(source),
        )
        for path in sorted(RESULTS.glob("*.json"))
        for source in [json.loads(path.read_text())["provenance"]]
    ]
    renamed = [(f"`benchmarks.{old}`", f"`benchmarks.{new}`") for old, new in RENAMED.items()]
    return (
        table(("result", "command", "commit", "date", "machine"), rows)
        + "\nA command is valid at its commit; these modules have been renamed since:\n\n"
        + table(("in a command", "now"), renamed)
    )


def stopping() -> str:
    """The tokens of every stopping policy at plain best-of-16's reward, with settings chosen on other prompts."""
    result = read_result_if_exists("stopping")
    if result is None:
        return NOT_MEASURED
    rows = []
    for pools, policies in result["policies"].items():
        for name, policy in policies.items():
            for criterion in ("equal", "within"):
                figures = policy[criterion]
                bar = result["bars"].get(name) if pools == "film reviews" else None
                rows.append(
                    (
                        pools,
                        name,
                        criterion,
                        with_interval(figures["token_share"]),
                        f"{bar:.2f}" if bar else "",
                        with_interval(figures["reward_minus_plain"]),
                    )
                )
    prompts = " and ".join(f"{count} {name}" for name, count in result["prompts"].items())
    heading = (
        "pools",
        "policy",
        "criterion",
        f"share of plain best-of-{result['plain_n']}'s tokens",
        "bar, at most",
        "reward minus its reward",
    )
    return (
        table(heading, rows)
        + f"\nPools of {result['pool']} candidates for {prompts} prompts, each in {result['orders']} random orders; "
        "95 % bootstrap intervals over prompts. In arithmetic a candidate counts as one token.\n"
    )


def stopping_waves() -> str:
    """The share of tokens at equal reward by the size of a wave."""
    result = read_result_if_exists("stopping")
    if result is None:
        return NOT_MEASURED
    waves = list(next(iter(result["share_by_wave"].values())))
    rows = [
        (pools, *(with_interval(by_wave[wave]) for wave in waves)) for pools, by_wave in result["share_by_wave"].items()
    ]
    return table(("candidates of a wave", *waves), rows)


def stopping_live() -> str:
    """The tokens and seconds of every stopping policy on the running engine."""
    result = read_result_if_exists("stopping_live")
    if result is None:
        return NOT_MEASURED
    rows = [
        (
            name,
            with_interval(figures["reward"]),
            with_interval(figures["token_share"]),
            f"{figures['completed']:.1f}",
            f"{figures['cancelled']:.1f}",
            f"{figures['scored_tokens']:.0f}",
            f"{figures['total_s']:.2f}",
        )
        for name, figures in result["by_policy"].items()
    ]
    return (
        table(("policy", "reward", "share of tokens", "completed", "cancelled", "scored tokens", "seconds"), rows)
        + f"\n{result['prompts']} openings, {result['max_tokens']} new tokens; means over prompts.\n"
    )


def blockwise(result: Any) -> str:
    """Time to the first token and cost of blockwise best-of-N, relative to plain best-of-N."""
    plain = result["plain"]
    heading = (
        "tokens of a block",
        "first token, relative to plain best-of-N",
        "bar, at most",
        "last token, relative to plain",
        "tokens, relative to plain",
        "reward minus plain's",
    )
    rows = [
        (
            tokens,
            with_extremes(figures["of_plain"]["first_token_s"]),
            f"{result['bar']}",
            with_extremes(figures["of_plain"]["total_s"]),
            with_extremes(figures["of_plain"]["tokens"]),
            with_interval(figures["of_plain"]["reward_difference"]),
        )
        for tokens, figures in result["block_tokens"].items()
    ]
    return (
        table(heading, rows)
        + f"\n{result['prompts']} openings of film reviews, best of {result['best_of']}, {result['max_tokens']} tokens "
        "at most; ratios prompt by prompt, median and extremes, requests alternating. Plain best-of-N begins to answer "
        f"after {plain['first_token_s']['mean']:.1f} s, with reward {plain['reward']['mean']:.2f}.\n"
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "figures": lambda: tables_readme.figures(read_result),
    "quality": quality,
    "scoring-overhead": scoring_overhead,
    "prefill": prefill,
    "scoring": scoring,
    "router-overhead": router_overhead,
    "card-accuracy": card(model_card.accuracy),
    "card-by-gap": card(model_card.by_gap),
    "card-counts": card(model_card.counts),
    "arithmetic": arithmetic,
    "improve": improve,
    "batch-memory": batch_memory,
    "offline": offline,
    "rl": rl,
    "stopping": stopping,
    "stopping-waves": stopping_waves,
    "stopping-live": stopping_live,
    "rlhf-pipeline": if_measured("rlhf_pipeline", rlhf_pipeline),
    "blockwise": if_measured("blockwise", blockwise),
    "side-by-side": if_measured("side_by_side", tables_latency.side_by_side),
    "latency": if_measured(
        "latency", lambda result: tables_latency.against_n(result, read_result_if_exists("latency_ray"))
    ),
    "latency-scaling": if_measured("latency", tables_latency.scaling),
    "goodput": if_measured("latency", tables_latency.goodput),
    "reliability": lambda: reliability.promises(read_result_if_exists),
    "rl-memory": if_measured("rl_breakdown", tables_rl.memory),
    "rl-memory-large": tables_rl.memory_7b,
    "rl-time": if_measured("rl_breakdown", tables_rl.time),
    "rl-learner-throughput": if_measured("rl_learner_throughput", tables_rl.learner_throughput),
    "rl-overlap": if_measured("rl_overlap", tables_rl.overlap),
    "provenance": provenance,
}


PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "benchmarks.md",
    ROOT / "docs" / "offline.md",
    ROOT / "docs" / "reliability.md",
    ROOT / "docs" / "training.md",
    ROOT / "docs" / "selection.md",
    ROOT / "docs" / "stopping.md",
    ROOT / "reranker" / "pretrained" / "movie-sentiment" / "README.md",
)
"""The pages with blocks."""
