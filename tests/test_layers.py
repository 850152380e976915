"""Modules import in the order of WORKSPACE.md's table, and what is public is documented."""

import ast
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "zofl_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: pathlib.Path) -> str:
    """Returns "data.batches" for zofl_jax/data/batches.py, "data" for its __init__.py."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rows() -> list[list[str]]:
    """Returns the modules and packages that each row of the table names, from top to bottom."""
    text = (ROOT / "WORKSPACE.md").read_text()
    table = text[text.index("| zofl_jax/ |") :].split("\n\n")[0].splitlines()[2:]
    first_cells = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table]
    return [[name.removesuffix(".py").rstrip("/") for name in cell] for cell in first_cells]


def row_of(module: str) -> int:
    """Returns the row that names a module, or the package it lies in."""
    package = module.split(".")[0]
    found = [i for i, names in enumerate(rows()) if module in names or package in names]
    assert len(found) == 1, f"WORKSPACE.md names {module} in {len(found)} rows, not in one"
    return found[0]


def imports(path: pathlib.Path) -> set[str]:
    """Returns the modules of the library that a module imports, anywhere in it."""
    known = {module_name(other) for other in MODULES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    inner = {name.removeprefix("zofl_jax.") for name in found if name.startswith("zofl_jax.")}
    return (inner & known) - {module_name(path)}


def test_the_table_is_found():
    names = [name for row in rows() for name in row]
    assert names[:2] == ["core", "keys"]
    assert {"directions", "algorithms", "data", "engine", "runs", "training"} <= set(names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: module_name(path) or "zofl_jax")
def test_modules_import_from_rows_above_or_their_own(path):
    name = module_name(path)
    if not name:  # the front door, which offers names of all rows and imports them lazily
        return
    below = {other for other in imports(path) if row_of(other) > row_of(name)}
    assert not below, f"{name} imports {sorted(below)}, which WORKSPACE.md lists below it"


def test_no_module_goes_through_the_front_door():
    """Its names hide which module is meant, and with that the order and the circles."""
    known = {module_name(path).split(".")[0] for path in MODULES}
    for path in MODULES:
        if path != PACKAGE / "__init__.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module == "zofl_jax":
                    assert {alias.name for alias in node.names} <= known, path.name


def test_imports_go_in_no_circle():
    graph = {module_name(path): imports(path) for path in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: module_name(path) or "zofl_jax")
def test_everything_public_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module"
    public = [
        node
        for scope in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        if not getattr(scope, "name", "").startswith("_")
        for node in scope.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_the_library_prints_nothing():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path.name}:{node.lineno}"


def test_only_platforms_and_placement_ask_for_the_backend():
    """A program may be traced for another machine, see `platforms.py`."""
    asking = {path.name for path in MODULES if "default_backend" in path.read_text()}
    assert asking == {"platforms.py", "placement.py"}


def strings(path: pathlib.Path) -> set[str]:
    """Returns the string constants of a module, docstrings aside."""
    tree = ast.parse(path.read_text())
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone
    }


def test_nobody_knows_a_method_by_its_name():
    """Facts about methods stand in their own modules; what asks for a name would miss new ones."""
    from zofl_jax.algorithms import METHODS

    about_some = {"theory.py", "robustness.py"}  # which are experiments with certain methods
    others = [path for path in MODULES if path.parent.name != "algorithms"]
    others += [p for p in (ROOT / "experiments").glob("*.py") if p.name not in about_some]
    told = {str(path.relative_to(ROOT)): strings(path) & set(METHODS) for path in others}
    assert {name: names for name, names in told.items() if names} == {}
