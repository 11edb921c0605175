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

from scripts.structure import circles, imports_of
from tests.support.paths import ROOT

PACKAGES = ("reranker", "server", "training", "benchmarks", "scripts", "examples")

LAYERS: tuple[tuple[str, ...], ...] = (
    ("reranker",),
    ("server.errors", "server.config"),
    ("server.generation",),
    ("server.pipeline",),
    ("server.schemas", "server.observability", "server.factory"),
    ("server.http",),
    ("server.app",),
    ("server.launch",),
    ("server.doctor",),
    ("server.distributed",),
    ("server.cli_options", "server.offline"),
    ("server.cli",),
)
"""A module imports from its own layer and those above it in this list."""

TRAINING_IMPORTS = (
    *("reranker", "training", "server.errors", "server.config", "server.generation", "server.pipeline"),
    *("server.factory", "server.distributed"),
)
"""The actors come from `server.factory`, or on Ray from `server.distributed`, as a pipeline."""
ONLY_FOR_THE_COMMAND = ("training", "benchmarks")
"""Packages that nothing else imports; the command does, when one of their subcommands is called.

Benchmarks measure training too. Examples may import everything, and nothing imports examples.
"""

FENCES: dict[str, tuple[str, ...]] = {
    "vllm": ("server.generation.vllm_engine",),
    "ray": ("server.distributed", "benchmarks"),
    "fastapi": ("server.http", "server.app", "server.launch"),
    "starlette": ("server.http", "server.app", "server.launch"),
    "uvicorn": ("server.http", "server.app", "server.launch", "benchmarks"),
    "prometheus_client": ("server.observability",),
    "opentelemetry": ("server.observability", "server.http.tracing"),
}
"""Library -> the modules and folders that may import it."""

OF_PEERS = ("benchmarks.baselines.its_hub_worker", "benchmarks.baselines.optillm_worker")
"""Modules that run in environments of other projects, with libraries that are never ours."""


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
        is_command = within(module, "server.cli") or (within(module, "benchmarks") and within(imported, "training"))
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
        if within(imported, library) and not any(within(module, gate) for gate in gates):
            return f"only {', '.join(gates)} may import {library}"
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
    violated = violations(ROOT)
    assert not violated, "\n" + "\n".join(violated)


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        ("reranker/a.py", "import server.errors", "stands after it"),
        ("server/generation/a.py", "from server import pipeline", "stands after it"),
        ("server/pipeline/a.py", "from server.app import create_app", "stands after it"),
        ("server/pipeline/a.py", "from server.http import sse", "stands after it"),
        ("server/schemas/a.py", "import server.http.body", "stands after it"),
        ("server/http/a.py", "import server.app", "stands after it"),
        ("server/distributed/a.py", "import server.offline.batch", "stands after it"),
        ("server/app.py", "def f():\n    import training.cli", "nothing but the command"),
        ("training/a.py", "import server.app", "training imports only"),
        ("training/a.py", "import server.http.sse", "training imports only"),
        ("training/a.py", "import benchmarks.quality", "nothing but the command"),
        ("server/pipeline/a.py", "from vllm import LLM", "only server.generation.vllm_engine may import vllm"),
        ("server/generation/a.py", "import vllm", "only server.generation.vllm_engine may import vllm"),
        ("benchmarks/a.py", "import vllm", "only server.generation.vllm_engine may import vllm"),
        ("server/app.py", "from ray import serve", "only server.distributed, benchmarks may import ray"),
        ("server/offline/a.py", "import ray.exceptions", "only server.distributed, benchmarks may import ray"),
        (
            "server/cli.py",
            "import starlette.responses",
            "only server.http, server.app, server.launch may import starlette",
        ),
        ("server/distributed/a.py", "import fastapi", "only server.http, server.app, server.launch may import fastapi"),
        ("server/pipeline/a.py", "import uvicorn", "may import uvicorn"),
        ("server/http/a.py", "import opentelemetry", "only server.observability, server.http.tracing may import"),
        ("server/app.py", "import prometheus_client", "only server.observability may import prometheus_client"),
        ("reranker/a.py", "import fastapi", "only server.http, server.app, server.launch may import fastapi"),
        ("server/pipeline/a.py", "import scripts.docs", "scripts are for developers"),
        ("server/cli.py", "def f():\n    import examples.a", "nothing imports examples"),
        ("benchmarks/a.py", "import examples.a", "nothing imports examples"),
        ("examples/a.py", "import vllm", "only server.generation.vllm_engine may import vllm"),
    ],
)
def test_a_forbidden_import_is_found(file: str, line: str, reason: str, tmp_path: Path) -> None:
    """The checker itself is tried on trees that break one rule each."""
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    assert [reason in violation for violation in violations(tmp_path)] == [True]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("server/cli.py", "def f():\n    import training.cli"),
        ("server/app.py", "from server.pipeline.best_of_n import BestOfN\nimport fastapi"),
        ("server/http/tracing.py", "import opentelemetry.trace"),
        ("server/distributed/a.py", "from ray import serve"),
        ("benchmarks/a.py", "import training.cli\nimport ray"),
        ("training/a.py", "from server.generation.base import Generator\nimport training.b"),
        ("server/generation/vllm_engine.py", "import vllm"),
        (
            "examples/a.py",
            "import benchmarks.policy_evaluation\nimport scripts.doc_tables\nimport training.policy.subcommands",
        ),
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


def test_no_modules_import_each_other() -> None:
    assert circles(imports_of(ROOT, PACKAGES)) == []


def test_a_circle_is_found_through_other_modules_and_inside_functions(tmp_path: Path) -> None:
    files = {
        "a": "from server import b",
        "b": "def f():\n    import server.c",
        "c": "import server.a",
        "d": "import server.a",
    }
    (tmp_path / "server").mkdir()
    for name, line in files.items():
        (tmp_path / "server" / f"{name}.py").write_text(line)
    assert circles(imports_of(tmp_path)) == [["server.a", "server.b", "server.c"]]


def test_no_class_name_is_defined_twice() -> None:
    """A name that stands for two things has to be looked up before it is understood."""
    places: dict[str, list[str]] = {}
    for module, tree in modules(ROOT):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    twice = {name: defined for name, defined in places.items() if len(defined) > 1}
    assert not twice, twice
