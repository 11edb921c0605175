"""Every query of the dashboard and of the alert rules matches series of a real scrape.

The metrics, labels and label values of each query are looked up in a scrape after some traffic. Where Prometheus is
installed, it scrapes the same traffic and evaluates every query; without it no values are computed.
"""

import asyncio
import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from scripts import dashboard
from server.errors import OverloadedError
from server.observability.metrics import Metrics
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.paths import ROOT
from tests.support.serving import HELLO, address_of, app_over, client_of, pipeline

BOARD = json.loads((ROOT / dashboard.FILE).read_text())
ALERTS_FILE = ROOT / "deploy" / "prometheus" / "alerts.yml"
RULES = [rule for group in yaml.safe_load(ALERTS_FILE.read_text())["groups"] for rule in group["rules"]]
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = {f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]} | {
    rule["alert"]: rule["expr"] for rule in RULES
}
VARIABLES = {"$instance": ".*", "$__rate_interval": "1m"}
PROMETHEUS_TIMEOUT_S = 120


def filled(query: str) -> str:
    """The query with Grafana's variables replaced, as Grafana sends it."""
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query


class Traffic:
    """An app over scripted doubles, and requests with every outcome that the dashboard distinguishes."""

    def __init__(self) -> None:
        self.generator = ScriptedGenerator(["dull", None, "great fun"])
        self.scorer = ScriptedScorer({"dull": -1.0, "great fun": 2.0})
        self.metrics = Metrics()
        self.app: FastAPI = app_over(pipeline(self.generator, self.scorer), self.metrics)

    async def send(self, client: httpx.AsyncClient) -> None:
        statuses = []
        requests: list[tuple[bool, OverloadedError | None, dict[str, Any]]] = [
            (False, None, {}),
            (False, None, {"nbest": {"strategy": "majority"}}),
            (True, None, {}),
            (True, None, {"nbest": {"on_reward_failure": "first"}}),
            (False, None, {"nbest": {"stopping": {"policy": "adaptive", "target_reward": -1.0, "wave": 1}}}),
            (False, OverloadedError("Too much is under way.", retry_after_s=1), {}),
        ]
        for self.scorer.fails, self.generator.refusal, extra in requests:
            reply = await client.post("/v1/chat/completions", json=HELLO | {"best_of": 3} | extra)
            statuses.append(reply.status_code)
        assert statuses == [200, 200, 503, 200, 200, 429]
        self.metrics.observe_batch(2, 40)  # as the reward model's scorer does
        self.metrics.observe_restart(30.0)  # as the supervisor of the engine does


@pytest.fixture(scope="module")
def scrape() -> dict[str, list[dict[str, str]]]:
    """Sample name -> the labels of its series, with the label that Prometheus adds."""

    async def scraped() -> str:
        traffic = Traffic()
        async with client_of(traffic.app) as client:
            await traffic.send(client)
            return (await client.get("/metrics")).text

    series: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(asyncio.run(scraped())):
        for sample in family.samples:
            series.setdefault(sample.name, []).append({**sample.labels, "instance": "nbest:8000"})
    return series


def nodes(query: str) -> list[Any]:
    """The nodes of the query's syntax tree, parents first."""
    visited: list[Any] = []

    def visit(node: Any) -> bool:
        visited.append(node)
        return True

    promql_parser.walk(promql_parser.parse(filled(query)), visit)
    return visited


def selectors(query: str) -> Iterator[Any]:
    for node in nodes(query):
        if isinstance(node, promql_parser.VectorSelector):
            yield node
        elif isinstance(node, promql_parser.MatrixSelector):
            yield node.vector_selector


def matches(labels: dict[str, str], matcher: Any) -> bool:
    value = labels.get(matcher.name, "")
    if matcher.op == promql_parser.MatchOp.Equal:
        return bool(value == matcher.value)
    assert matcher.op == promql_parser.MatchOp.Re, "the test supports = and =~"
    return re.fullmatch(matcher.value, value) is not None


@pytest.mark.parametrize("name", QUERIES)
def test_every_selector_matches_series(name: str, scrape: dict[str, list[dict[str, str]]]) -> None:
    in_query = list(selectors(QUERIES[name]))
    assert in_query
    for selector in in_query:
        assert selector.name in scrape, f"{selector.name} is not a metric of nbest"
        matchers = selector.matchers.matchers
        assert any(all(matches(labels, matcher) for matcher in matchers) for labels in scrape[selector.name]), (
            f"nothing matches {selector}"
        )


@pytest.mark.parametrize("name", QUERIES)
def test_every_label_of_an_aggregation_exists(name: str, scrape: dict[str, list[dict[str, str]]]) -> None:
    for node in nodes(QUERIES[name]):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            for selector in selectors(node.expr.prettify()):
                assert set(node.modifier.labels) <= set(scrape[selector.name][0]), str(selector)


def not_aggregated(node: Any) -> list[str]:
    """Metrics whose series the expression returns without aggregation."""
    match node:
        case promql_parser.VectorSelector():
            return [str(node.name)]
        case promql_parser.ParenExpr():
            return not_aggregated(node.expr)
        case promql_parser.BinaryExpr():
            return not_aggregated(node.lhs) + not_aggregated(node.rhs)
        case promql_parser.Call() if node.func.name != "absent":
            return [name for argument in node.args for name in not_aggregated(argument)]
    return []


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_aggregates_over_the_replicas_of_a_server_on_ray(name: str) -> None:
    """On Ray every replica has its own series; a query without aggregation would return a line for each replica."""
    assert not_aggregated(promql_parser.parse(filled(QUERIES[name]))) == []
    for node in nodes(QUERIES[name]):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            assert "replica" not in node.modifier.labels


def test_every_legend_names_labels_that_its_query_keeps() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            kept = {
                label
                for node in nodes(target["expr"])
                if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None
                for label in node.modifier.labels
            } or {"instance"}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, panel["title"]


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {selector.name for query in QUERIES.values() for selector in selectors(query)}
    for family in Metrics().registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        assert any(family.name + suffix in shown for suffix in suffixes), f"{family.name} is shown nowhere"


def test_ids_and_titles_are_unique_and_panels_do_not_overlap() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for position in (panel["gridPos"] for panel in panels):
        assert position["x"] + position["w"] <= 24
        cells = {(position["x"] + dx, position["y"] + dy) for dx in range(position["w"]) for dy in range(position["h"])}
        assert not cells & taken
        taken |= cells


def test_every_query_uses_the_selected_data_source() -> None:
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["instance"]["datasource"]["uid"] == "${datasource}"
    for panel in PANELS:
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all("$instance" in target["expr"] for target in panel["targets"]), panel["title"]


def test_every_alert_has_a_summary_and_an_action() -> None:
    names = {rule["alert"] for rule in RULES}
    assert len(names) == len(RULES)
    assert names >= {"NbestNotReady", "NbestErrors", "NbestSlow", "NbestShedding", "NbestRewardFailures"}
    for rule in RULES:
        assert rule["annotations"].keys() == {"summary", "action"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert re.fullmatch(r"\d+m", rule["for"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_accepts_the_alert_rules() -> None:
    promtool = await asyncio.create_subprocess_exec(
        "promtool", "check", "rules", str(ALERTS_FILE), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await promtool.communicate()
    assert promtool.returncode == 0, output.decode()


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
async def test_a_real_prometheus_answers_every_query(tmp_path: Path) -> None:
    traffic = Traffic()
    async with address_of(traffic.app) as served, httpx.AsyncClient(base_url=served) as client:
        config = {
            "global": {"scrape_interval": "1s"},
            "rule_files": [str(ALERTS_FILE)],
            "scrape_configs": [
                {"job_name": "nbest", "static_configs": [{"targets": [served.removeprefix("http://")]}]}
            ],
        }
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        running = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={address}",
            "--log.level=error",
        )
        try:
            async with (
                asyncio.timeout(PROMETHEUS_TIMEOUT_S),
                httpx.AsyncClient(base_url=f"http://{address}/api/v1") as prometheus,
            ):
                scrapes = 0
                while scrapes < 5:  # a rate needs two, with traffic between them
                    await traffic.send(client)
                    await asyncio.sleep(1)
                    try:
                        [*counts] = await answers(prometheus, "count_over_time(nbest_ready[1m])")
                    except httpx.ConnectError:
                        continue
                    scrapes = int(counts[0]["value"][1]) if counts else 0
                for name, query in QUERIES.items():
                    series = await answers(prometheus, filled(query))
                    if name not in {rule["alert"] for rule in RULES}:  # alerts are empty while nothing is wrong
                        assert series, name
                        assert all(sample["value"][1] != "NaN" for sample in series), name
        finally:
            running.terminate()
            await running.wait()


async def answers(prometheus: httpx.AsyncClient, query: str) -> list[Any]:
    reply = (await prometheus.get("query", params={"query": query})).json()
    assert reply["status"] == "success", reply
    return list(reply["data"]["result"])
