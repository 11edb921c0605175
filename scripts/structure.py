"""Counts the structure from the imports: files a folder, the longest modules, floors of imports, circles.

    python -m scripts.structure [--root CHECKOUT]

A module's floor is the longest chain of imports below it, of modules of the same checkout: a module that imports none
is on floor 1. Imports inside functions count too; those under `if TYPE_CHECKING` do not run and do not count. The last
line is the same as JSON.
"""

import argparse
import ast
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

PACKAGES = ("reranker", "server", "training")
LONGEST = 5

Imports = Mapping[str, frozenset[str]]


def imports_of(root: Path, packages: tuple[str, ...] = PACKAGES) -> Imports:
    """Module -> the modules of these packages that it imports."""
    files = {_name(file.relative_to(root)): file for package in packages for file in (root / package).rglob("*.py")}
    return {
        module: frozenset(
            imported for name in _imported(ast.parse(file.read_text())) if (imported := _module(name, files)) != module
        )
        - {""}
        for module, file in files.items()
    }


def circles(imports: Imports) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    reachable = {module: _reachable(module, imports) for module in imports}
    groups = {
        tuple(sorted(other for other in reachable[module] if module in reachable[other]))
        for module in imports
        if module in reachable[module]
    }
    return [list(group) for group in sorted(groups)]


def floors(imports: Imports) -> dict[str, int]:
    """Module -> its floor; a circle counts as one floor."""
    in_circle = {module: group[0] for group in circles(imports) for module in group}

    @cache
    def floor(module: str) -> int:
        group = [other for other in imports if in_circle.get(other, other) == module]
        below = {in_circle.get(name, name) for other in group for name in imports[other]} - {module}
        return 1 + max((floor(name) for name in below), default=0)

    return {module: floor(in_circle.get(module, module)) for module in imports}


def _name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module(name: str, files: Mapping[str, Path]) -> str:
    """The module that an imported name is of, or nothing; a package without code of its own is not a module."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name if name and files[name].name != "__init__.py" else ""


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from _imported(node)


def _reachable(module: str, imports: Imports) -> set[str]:
    reached: set[str] = set()
    waiting = list(imports[module])
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += imports[name]
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, help="checkout; default: this one")
    root: Path = parser.parse_args().root.resolve()
    imports = imports_of(root)
    modules = {module: root.joinpath(*module.split(".")).with_suffix(".py") for module in imports}
    lines = {module: len(file.read_text().splitlines()) for module, file in modules.items() if file.is_file()}
    folders = Counter(module.rpartition(".")[0] for module in lines)
    longest = sorted(lines.items(), key=lambda item: -item[1])[:LONGEST]
    floor_of = floors({module: imports[module] for module in lines})
    for folder, count in sorted(folders.items()):
        print(f"{count:4} files in {folder.replace('.', '/')}/")
    for module, count in longest:
        print(f"{count:4} lines in {module}")
    for package in PACKAGES:
        print(f"{max(floor_of[module] for module in lines if module.split('.')[0] == package):4} floors in {package}")
    print(f"{len(circles(imports)):4} circles: {circles(imports)}")
    print(
        json.dumps(
            {"files": folders, "longest": longest, "floors": max(floor_of.values()), "circles": circles(imports)}
        )
    )


if __name__ == "__main__":
    main()
