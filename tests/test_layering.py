"""The import fences: reading down the folders follows a request, and each heavy library is behind one file."""

import ast
import itertools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = ("reranker", "server", "training", "benchmarks", "scripts", "examples")

LAYERS: tuple[tuple[str, ...], ...] = (
    ("reranker",),
    ("server.errors", "server.config", "server.request_record", "server.logs"),
    ("server.generation",),
    ("server.scoring", "server.selecting", "server.drawing", "server.pipeline", "server.blockwise"),
    ("server.metrics",),
    ("server.wire", "server.schema_parts", "server.schemas", "server.reply_schemas", "server.replies"),
    ("server.offline",),
    ("server.admission", "server.budgets", "server.auth"),
    (
        "server.connection",
        "server.page",
        "server.gate",
        "server.lifecycle",
        "server.openapi",
        "server.streaming",
        "server.app",
    ),
    ("server.tracing",),
    (
        "server.assembly",
        "server.http_protocol",
        "server.draining",
        "server.weights_record",
        "server.handles",
        "server.failover",
        "server.launch",
        "server.batch",
        "server.batch_workers",
        "server.deployments",
        "server.cluster",
        "server.doctor",
    ),
    ("server.cli",),
)
"""A module imports from its own layer and those above it in this list."""

TRAINING_IMPORTS = (
    *("reranker", "training", "server.errors", "server.generation", "server.config"),
    *("server.pipeline", "server.assembly", "server.cluster"),
)
"""The actors come from `server.assembly`, or on Ray from `server.cluster`, as a pipeline."""
ONLY_FOR_THE_COMMAND = ("training", "benchmarks")
"""Packages that nothing else imports; the command does, when one of their subcommands is called.

Examples may import everything, as whoever reads them may, and nothing imports examples.
"""

FENCES: dict[str, tuple[str, ...]] = {
    "vllm": ("server.generation.vllm_engine",),
    "ray.serve": ("server.deployments", "server.handles"),
    "fastapi": ("server.app",),
    "starlette": ("server.app",),
    "prometheus_client": ("server.metrics",),
    "opentelemetry": ("server.tracing",),
}
"""Library -> the modules that may import it."""

OF_PEERS = ("benchmarks.peers.its_hub_worker", "benchmarks.peers.optillm_worker")
"""Modules that run in environments of other projects, with libraries that are never ours."""

LIBRARIES_A_SCORER_NEVER_NEEDS = ("fastapi", "starlette", "uvicorn", "vllm", "ray")


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), ast.parse(file.read_text())


def imports(module: str, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Everything imported anywhere in the file, inside functions too; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively; write the package's name"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def layer_of(module: str) -> int:
    for number, prefixes in enumerate(LAYERS):
        if any(within(module, prefix) for prefix in prefixes):
            return number
    raise AssertionError(f"{module} stands in no layer; give it a place in LAYERS of tests/test_layering.py")


def order_violation(module: str, imported: str) -> str | None:
    if within(module, "examples"):
        return None
    if within(imported, "examples"):
        return "nothing imports examples"
    if any(within(imported, package) and not within(module, package) for package in ONLY_FOR_THE_COMMAND):
        is_command = within(module, "server.cli")
        return None if is_command else "nothing but the command imports training or benchmarks"
    if within(module, "training"):
        internal = any(within(imported, package) for package in PACKAGES)
        allowed = any(within(imported, prefix) for prefix in TRAINING_IMPORTS)
        return f"training imports only {', '.join(TRAINING_IMPORTS)}" if internal and not allowed else None
    if within(module, "reranker") or (within(module, "server") and module != "server"):
        if within(imported, "reranker") or within(imported, "server"):
            if layer_of(imported) > layer_of(module):
                return "that stands after it in the import order"
        elif within(imported, "scripts"):
            return "scripts are for developers"
    return None


def fence_violation(module: str, imported: str) -> str | None:
    for library, gates in FENCES.items():
        if within(imported, library) and module not in gates:
            return f"only {', '.join(gates)} may import {library}"
    if within(module, "reranker") and any(within(imported, library) for library in LIBRARIES_A_SCORER_NEVER_NEEDS):
        return "reranker knows no HTTP server, no vLLM and no Ray"
    return None


def violations(root: Path) -> list[str]:
    return [
        f"{module} (line {line}) imports {imported}: {reason}"
        for module, tree in modules(root)
        for imported, line in imports(module, tree)
        for reason in (order_violation(module, imported), fence_violation(module, imported))
        if reason
    ]


def test_every_import_respects_the_order_and_the_fences() -> None:
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("reranker/a.py", "import server.errors", "stands after it"),
        ("server/generation/a.py", "from server import pipeline", "stands after it"),
        ("server/pipeline.py", "from server.app import create_app", "stands after it"),
        ("server/app.py", "def f():\n    import training.cli", "nothing but the command"),
        ("training/a.py", "import server.app", "training imports only"),
        ("training/a.py", "import benchmarks.quality", "nothing but the command"),
        ("server/pipeline.py", "from vllm import LLM", "only server.generation.vllm_engine may import vllm"),
        ("benchmarks/a.py", "import vllm", "only server.generation.vllm_engine may import vllm"),
        ("server/app.py", "from ray import serve", "only server.deployments, server.handles may import ray.serve"),
        ("server/cli.py", "import starlette.responses", "only server.app may import starlette"),
        ("server/app.py", "import opentelemetry.trace", "only server.tracing may import opentelemetry"),
        ("server/app.py", "import prometheus_client", "only server.metrics may import prometheus_client"),
        ("reranker/a.py", "import ray", "reranker knows no HTTP server"),
        ("server/pipeline.py", "import scripts.docs", "scripts are for developers"),
        ("server/cli.py", "def f():\n    import examples.a", "nothing imports examples"),
        ("benchmarks/a.py", "import examples.a", "nothing imports examples"),
        ("examples/a.py", "import vllm", "only server.generation.vllm_engine may import vllm"),
    ],
)
def test_a_forbidden_import_is_found(file: str, line: str, told: str, tmp_path: Path) -> None:
    """The checker itself is tried on trees that break one rule each."""
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    assert [told in violation for violation in violations(tmp_path)] == [True]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("server/cli.py", "def f():\n    import training.cli"),
        ("server/app.py", "from server.pipeline import BestOfN\nimport fastapi"),
        ("training/a.py", "from server.generation.base import Generator\nimport training.b"),
        ("server/generation/vllm_engine.py", "import vllm"),
        ("examples/a.py", "import benchmarks.judged\nimport scripts.figures\nimport training.commands"),
    ],
)
def test_an_allowed_import_is_let_through(file: str, line: str, tmp_path: Path) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    assert violations(tmp_path) == []


def test_a_server_module_must_have_a_place_in_the_order(tmp_path: Path) -> None:
    planted = tmp_path / "server" / "newcomer.py"
    planted.parent.mkdir()
    planted.write_text("import server.errors")
    with pytest.raises(AssertionError, match=r"server\.newcomer stands in no layer"):
        violations(tmp_path)


def test_every_imported_library_is_declared() -> None:
    """The wheel installs what it imports; extras count, since vllm and the training libraries are optional."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    distributions = metadata.packages_distributions()
    undeclared = {
        f"{top} ({module}) comes from {' or '.join(sorted(providers))}"
        for module, tree in modules(ROOT)
        if module not in OF_PEERS
        for top in {imported.split(".")[0] for imported, _ in imports(module, tree)}
        if top not in sys.stdlib_module_names and top not in (*PACKAGES, "tests")
        for providers in [{canonicalize_name(name) for name in distributions.get(top, ["no installed package"])}]
        if not providers & declared
    }
    assert not undeclared, "not in pyproject.toml:\n" + "\n".join(sorted(undeclared))


@pytest.mark.parametrize("module", ["reranker.selection", "server.cli", "server.config", "server.app"])
def test_a_light_import_stays_light(module: str) -> None:
    """Selecting needs no tensors, and `nbest --help` must not wait for an engine."""
    heavy = "{'torch', 'vllm', 'ray', 'transformers', 'opentelemetry'}"
    program = f"import sys, {module}; print(*sorted({heavy} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [], f"import {module} pulls in {result.stdout}"
