"""What the pages say in figures, made from benchmarks/results and from the code alone.

The prose of those pages is written by hand; each `<!-- name -->` … `<!-- /name -->` in it is filled from here.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts import model_card, reliability, tables_latency, tables_readme, tables_rl
from scripts.markdown import machine, table, with_extremes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def filled(page: Path) -> str:
    """The page with every block filled anew."""

    def fill(block: re.Match[str]) -> str:
        name = block["name"]
        return f"<!-- {name} -->\n{BLOCKS[name]()}<!-- /{name} -->"

    return re.sub(r"<!-- (?P<name>[a-z-]+) -->\n.*?<!-- /(?P=name) -->", fill, page.read_text(), flags=re.DOTALL)


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def result_if_there(name: str) -> Any:
    return result(name) if (RESULTS / f"{name}.json").exists() else None


NOT_MEASURED = "Not measured yet.\n"


def if_measured(name: str, block: Callable[[Any], str]) -> Callable[[], str]:
    def fill() -> str:
        found = result_if_there(name)
        return NOT_MEASURED if found is None else block(found)

    return fill


def with_interval(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.2f} ({figure['low']:.2f} … {figure['high']:.2f})"


def quality() -> str:
    """Winner reward, and the independent judge, versus N."""
    found = result("quality")
    rows = [
        f"| {n} | {with_interval(found['winner_reward'][n])} | {with_interval(found['winner_vader'][n])} |\n"
        for n in found["winner_reward"]
    ]
    return (
        "| best_of | mean reward of the winner (95 % interval) | independent judge: VADER, -1 to 1 |\n|---|---|---|\n"
        + "".join(rows)
        + f"\n{found['prompts']} prompts that open a film review, {found['max_tokens']} new tokens, "
        f"`{found['policy']}` judged by `{found['reward_model']}`. From 1 to 16 the mean rises by "
        f"{found['gain_of_16_over_1_in_single_sample_sd']:.2f} standard deviations of single-sample rewards "
        f"({found['single_sample_reward']['sd']:.2f}).\n"
    )


def scoring_overhead() -> str:
    found = result("scoring_overhead")
    ratio, stages = found["with_scoring_over_without"], found["with_scoring_s"]
    return (
        f"`best_of={found['best_of']}` with scoring takes **{ratio['median']:.2f} times** the seconds of the same "
        f"{found['best_of']} generations without it (median of {ratio['rounds']} rounds in turn, {ratio['low']:.2f} … "
        f"{ratio['high']:.2f}; {found['prompt_tokens']}-token prompt, {found['max_tokens']} new tokens).\n\n"
        "| seconds, median | |\n|---|---|\n"
        f"| the same generations alone | {found['without_scoring_s']['median']:.2f} |\n"
        f"| whole request | {stages['total']:.2f} |\n"
        f"| … until the last candidate has ended | {stages['queue'] + stages['generate']:.2f} |\n"
        f"| … a scorer call out (overlaps with generating) | {stages['score']:.2f} |\n"
        f"| … after the last candidate | {found['after_the_last_candidate_s']:.2f} |\n"
        f"| … selecting | {stages['select']:.5f} |\n"
    )


def prefill() -> str:
    found = result("prefill")
    rows = [
        f"| {arm} | {max_tokens} | {one['vllm_serve_s']:.2f} | {one['ours_s']:.2f} | {with_extremes(one['ratio'])} |\n"
        for arm, by_tokens in found["by_max_tokens"].items()
        for max_tokens, one in by_tokens.items()
    ]
    return (
        "| `vllm serve` with | new tokens | its seconds | ours | ratio (extremes) |\n|---|---|---|---|---|\n"
        + "".join(rows)
    )


def scoring() -> str:
    """Seconds of four ways to score the same candidates, and how ours compares."""
    found = result("scoring")
    rows = []
    for case in found["cases"].values():
        for way, ratio in case["times_longer_than_ours"].items():
            rows.append(
                f"| {case['prompt_tokens']} + {found['best_of']} of {case['candidate_tokens']} | {way} "
                f"| {case['seconds'][way]['median']:.2f} | {case['seconds']['ours']['median']:.2f} "
                f"| {with_extremes(ratio)} | {ratio['bar']:g} |\n"
            )
    return (
        "| tokens | other way | its seconds | ours | ratio (extremes) | to be reached |\n|---|---|---|---|---|---|\n"
        + "".join(rows)
        + f"\nMedians of {found['rounds']} rounds in turn; SmolLM2-135M's trunk in float32. The rewards differ by "
        f"{max(case['largest_difference_of_rewards'] for case in found['cases'].values()):.0e} at most.\n"
    )


def router_overhead() -> str:
    """CPU milliseconds of the server's process a request, scripted generator and scorer."""
    found = result("router_overhead")
    names = {
        "n1": "best_of 1",
        "n16": "best_of 16",
        "n16_candidates": "best_of 16, all candidates returned",
        "n1_stream": "best_of 1, streamed word by word",
    }
    rows = [
        f"| {names[case]} | {one['mean']:.2f} ± {one['stdev']:.2f} | {one['min']:.2f} |\n"
        for case, one in found["cpu_ms_per_request"].items()
    ]
    return "| request | CPU ms, mean ± standard deviation | least |\n|---|---|---|\n" + "".join(rows)


def card(block: Callable[[Any], str]) -> Callable[[], str]:
    return lambda: block(result("reward_movie-sentiment"))


def arithmetic() -> str:
    """Right answers by way of choosing and n."""
    found = result("arithmetic")
    n = list(next(iter(found["curves"].values())))

    def percent(one: dict[str, float]) -> str:
        return f"{100 * one['mean']:.0f} ({100 * one['low']:.0f} … {100 * one['high']:.0f})"

    rows = [
        f"| {name} | {' | '.join(percent(one) for one in curve.values())} |\n"
        for name, curve in found["curves"].items()
    ]
    last = [by_n[n[-1]] for by_n in found["best_of_n_by_training_seed"].values()]
    pairs = found["held_out_pair_accuracy_by_training_seed"].values()
    problems = found["problems"]
    return (
        f"| n | {' | '.join(n)} |\n|---|{'---|' * len(n)}\n"
        + "".join(rows)
        + f"\nPercent of {problems['test']} problems answered rightly, with 95 % bootstrap intervals over problems. "
        f"Greedy: {percent(found['greedy'])}. One pool of {found['pool']} candidates a problem; the reward was trained "
        f"on {problems['pairs']} pairs of answers to other problems, {len(found['training_seeds'])} times with seeds "
        f"of their own: best of {n[-1]} by it is right in {100 * min(last):.0f} to {100 * max(last):.0f} %, and "
        f"its order of held-out pairs in {100 * min(pairs):.0f} to {100 * max(pairs):.0f} %.\n"
    )


def improve() -> str:
    """Best of n against what the policy was taught, by every measure."""
    found = result("improve")
    rows = {f"base, best of {n}": one for n, one in found["best_of_n_of_the_base"].items()}
    rows |= {f"{name}, best of 1": one for name, one in found["policies_at_best_of_1"].items()}

    variety = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["distinct_first_words"].items())
    drawn = ", ".join(f"{count} of {name}" for name, count in found["samples_a_prompt"].items())
    return (
        against_base(rows)
        + f"\n{found['prompts']['held_out']} held-out openings, {found['max_tokens']} new tokens, 95 % bootstrap "
        f"intervals over openings; samples an opening: {drawn}. Trained on {found['prompts']['train']} other openings: "
        f"{' and '.join(map(str, found['demonstrations']))} winners in the rounds, {found['pairs']} pairs for DPO. "
        f"Different first four words among the samples of an opening: {variety}.\n"
    )


def rl() -> str:
    """What PPO and REINFORCE made of the policy, seed by seed, against best of n of what they started from."""
    found = result("rl")
    best = found["best_of_n_of_the_base"]
    rows = {f"base, best of {n}": best[n] for n in ("1", "4", "16")}
    told = []
    for method, runs in found["runs"].items():
        rows |= {f"{method}, seed {seed}, best of 1": run["held_out"] for seed, run in runs.items()}
        minutes = [sum(run["seconds"].values()) / 60 for run in runs.values()]
        shares = {
            name: sum(run["seconds"][name] for run in runs.values()) for name in ("rollout_s", "learning_s", "sync_s")
        }
        of_all = ", ".join(f"{name[:-2]} {100 * part / sum(shares.values()):.0f} %" for name, part in shares.items())
        variety = " / ".join(f"{100 * run['distinct_first_words']:.0f} %" for run in runs.values())
        told.append(
            f"{method}: {min(minutes):.0f} to {max(minutes):.0f} minutes a run ({of_all}), different first four words "
            f"among the samples of an opening {variety}"
        )
    return (
        against_base(rows)
        + f"\n{found['prompts']['held_out']} held-out openings, {found['max_tokens']} new tokens, 95 % bootstrap "
        f"intervals over openings; trained on {found['prompts']['train']} others. {'; '.join(told)}; the base "
        f"{100 * found['distinct_first_words_of_the_base']:.0f} %.\n"
    )


def rlhf_pipeline(found: Any) -> str:
    """What each method made of one start."""
    rows = {f"start, best of {n}": one for n, one in found["best_of_n_of_the_base"].items()}
    rows |= {f"{name}, best of 1": one for name, one in found["policies_at_best_of_1"].items()}
    test = {name: 100 * found["reward_test"][name] for name in ("accuracy", "low", "high")}
    return (
        against_base(rows, "start")
        + f"\n{found['prompts']['held_out']} held-out openings, {found['max_tokens']} new tokens, one seed, 95 % "
        f"bootstrap intervals over openings. The reward model orders {test['accuracy']:.0f} % ({test['low']:.0f} … "
        f"{test['high']:.0f}) of {found['reward_test']['comparisons']} held-out pairs as people did.\n"
    )


def against_base(rows: dict[str, Any], base: str = "base") -> str:
    """Policies by all that is measured of them (`benchmarks.policy_evaluation`); `base` is where they began."""

    def kl(figure: dict[str, float]) -> str:
        return with_interval(figure) if "low" in figure else f"≤ {figure['mean']:.2f}"

    return (
        f"| | mean reward | VADER, -1 to 1 | perplexity under the {base} | KL to the {base}, nats a sequence |\n"
        "|---|---|---|---|---|\n"
    ) + "".join(
        f"| {name} | {with_interval(one['reward'])} | {with_interval(one['vader'])} "
        f"| {with_interval(one['perplexity_under_base'])} | {kl(one['kl'])} |\n"
        for name, one in rows.items()
    )


def offline() -> str:
    """What the offline mode makes of the engine, and against the simplest way."""
    found = result("offline")
    head = (
        "| work | scorer of the offline mode | other way | offline | other | ratio (extremes) | to be reached |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    rounds = found["works"]["openings"]["times_as_fast_as"]["transformers"]["rounds"]
    return (
        head
        + "".join(_offline_rows(name, work) for name, work in found["works"].items())
        + f"\n{found['prompts']} prompts, {found['best_of']} candidates each, {rounds} rounds in turn.\n"
    )


def _offline_rows(name: str, work: Any) -> str:
    tokens, pairs, ratios = work["tokens_per_s"], work["pairs_per_s"], work["times_as_fast_as"]

    def row(scorer: str, way: str, other: str, speeds: dict[str, float], digits: int, unit: str) -> str:
        ratio = ratios[other]
        return (
            f"| {name} | {scorer} | {way} | {speeds[f'offline, {scorer}']:.{digits}f} {unit} "
            f"| {speeds[other]:.{digits}f} {unit} "
            f"| {with_extremes(ratio)} | {ratio['bar']:g} |\n"
        )

    return row("logprob", "the bare engine, nothing scored or written", "bare engine", tokens, 0, "tokens/s") + row(
        "reward model", "transformers: generate all, then score all", "transformers", pairs, 1, "pairs/s"
    )


def batch_memory() -> str:
    runs = ", ".join(f"{one['peak_mib']:.0f} MiB for {one['lines']:,} lines" for one in result("batch_memory")["runs"])
    peaks = f"The peak of the command's memory, with a generator that takes no time: {runs}"
    return f"{peaks} (`benchmarks/batch_memory.py`).\n"


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
    """What each stopping policy draws at plain best-of-16's reward, by the settings chosen on other prompts."""
    found = result_if_there("stopping")
    if found is None:
        return NOT_MEASURED
    rows = []
    for pools, policies in found["policies"].items():
        for name, measured in policies.items():
            for criterion in ("equal", "within"):
                one = measured[criterion]
                bar = found["bars"].get(name) if pools == "film reviews" else None
                rows.append(
                    f"| {pools} | {name} | {criterion} | {with_interval(one['token_share'])} | "
                    f"{f'{bar:.2f}' if bar else ''} | {with_interval(one['reward_minus_plain'])} |\n"
                )
    prompts = " and ".join(f"{count} {name}" for name, count in found["prompts"].items())
    return (
        f"| pools | policy | good enough | share of plain best-of-{found['plain_n']}'s tokens | bar | reward minus its "
        "reward |\n|---|---|---|---|---|---|\n"
        + "".join(rows)
        + f"\nPools of {found['pool']} candidates for {prompts} prompts, each in {found['orders']} random orders; "
        "95 % bootstrap intervals over prompts. In arithmetic a candidate counts as one token.\n"
    )


def stopping_waves() -> str:
    """The share of tokens at equal reward by the size of a wave."""
    found = result_if_there("stopping")
    if found is None:
        return NOT_MEASURED
    waves = list(next(iter(found["share_by_wave"].values())))
    rows = [
        f"| {pools} | {' | '.join(with_interval(by_wave[wave]) for wave in waves)} |\n"
        for pools, by_wave in found["share_by_wave"].items()
    ]
    return f"| candidates of a wave | {' | '.join(waves)} |\n|---|{'---|' * len(waves)}\n" + "".join(rows)


def stopping_live() -> str:
    """The same on the running engine."""
    found = result_if_there("stopping_live")
    if found is None:
        return NOT_MEASURED
    rows = [
        f"| {name} | {with_interval(one['reward'])} | {with_interval(one['token_share'])} | "
        f"{one['completed']:.1f} | {one['cancelled']:.1f} | {one['scored_tokens']:.0f} | {one['total_s']:.2f} |\n"
        for name, one in found["by_policy"].items()
    ]
    return (
        "| policy | reward | share of tokens | completed | cancelled | scored tokens | seconds |\n"
        "|---|---|---|---|---|---|---|\n"
        + "".join(rows)
        + f"\n{found['prompts']} openings, {found['max_tokens']} new tokens; means a prompt.\n"
    )


def blockwise(found: Any) -> str:
    """When the first words of an answer in blocks come, and what it costs, beside plain best-of-N."""
    whole = found["plain"]
    return (
        "| tokens of a block | first token, of plain best-of-N's | bar | last token, of plain's | tokens, of plain's "
        "| reward minus its reward |\n|---|---|---|---|---|---|\n"
        + "".join(
            f"| {tokens} | {with_extremes(one['of_plain']['first_token_s'])} | {found['bar']} "
            f"| {with_extremes(one['of_plain']['total_s'])} | {with_extremes(one['of_plain']['tokens'])} "
            f"| {with_interval(one['of_plain']['reward_difference'])} |\n"
            for tokens, one in found["block_tokens"].items()
        )
        + f"\n{found['prompts']} openings of film reviews, best of {found['best_of']}, {found['max_tokens']} tokens at "
        "most; ratios prompt by prompt, median and extremes, of requests in turn. Plain best-of-N begins to answer "
        f"after {whole['first_token_s']['mean']:.1f} s with reward {whole['reward']['mean']:.2f}.\n"
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "figures": lambda: tables_readme.figures(result),
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
    "latency": if_measured("latency", lambda found: tables_latency.against_n(found, result_if_there("latency_ray"))),
    "latency-scaling": if_measured("latency", tables_latency.scaling),
    "goodput": if_measured("latency", tables_latency.goodput),
    "reliability": lambda: reliability.table(result_if_there),
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
"""The pages that have blocks."""
