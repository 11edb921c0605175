"""Every committed result says where its figures come from, under one key."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import provenance as module
from benchmarks.provenance import RESULTS, provenance
from scripts.doc_tables import RENAMED
from tests.support.paths import ROOT

FORMER_KEYS = {"measured", "evaluated", "machine"}


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object within a value."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(child)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_carries_its_provenance_under_one_key(path: Path) -> None:
    result = json.loads(path.read_text())
    sources = [node["provenance"] for node in objects(result) if "provenance" in node]
    assert result["provenance"] in sources
    assert all({"commit", "date", "versions", "cpu"} <= source.keys() for source in sources)
    assert not any(FORMER_KEYS & node.keys() for node in objects(result))
    assert not any("commit" in node for node in objects(result) if node not in sources)


def test_provenance_records_code_machine_and_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "model name\t: A CPU\nflags\t\t: fpu avx2 avx512f amx_bf16\nmodel name\t: A CPU\nflags\t\t: fpu\n"
    )
    monkeypatch.setattr(module, "CPUINFO", cpuinfo)
    source = provenance({"rounds": 3}, packages=("torch", "no-such-package"))
    assert source["cpu"] == "A CPU"
    assert source["instruction_sets"] == ["avx2", "avx512f", "amx_bf16"]
    assert list(source["versions"]) == ["torch"]
    assert source["flags"] == {"rounds": 3}
    assert len(source["commit"].removesuffix("+")) == 40


def test_a_renamed_module_exists_under_its_new_name_alone() -> None:
    for old, new in RENAMED.items():
        assert not (ROOT / "benchmarks" / f"{old}.py").exists()
        assert (ROOT / "benchmarks" / f"{new}.py").exists()
