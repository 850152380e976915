"""What setup.cfg declares is what the code imports, and the other way round."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("zofl_jax", "experiments", "benchmarks")

MODULES = {  # where a distribution's module has another name than the distribution
    "absl-py": "absl",
    "dp-accounting": "dp_accounting",
    "griffelib": "griffe",
    "pytest-xdist": "xdist",
    "rouge-score": "rouge_score",
    "scikit-learn": "sklearn",
    "tensorflow-datasets": "tensorflow_datasets",
}

TOLD_TO_INSTALL = ("pip",)
"""Run as a program where it is there, and asked for in a sentence where it isn't."""

FOR = {  # what an extra is for: folders whose imports it serves
    "language": ("zofl_jax",),
    "tfds": ("zofl_jax",),
    "privacy": ("zofl_jax",),
    "tensorboard": ("zofl_jax",),
    "plan": ("zofl_jax",),
    "test": ("tests", "zofl_jax", "experiments"),
    "check": ("tests",),
    "docs": ("docs",),
    "torch": ("benchmarks",),
    "parity": ("tests",),
}

NEVER_IMPORTED = {  # files that say what it is for instead
    "ipykernel": ("tests/test_notebook.py", "kernel_name"),
    "mkdocs-material": ("mkdocs.yml", "name: material"),
    "mkdocstrings": ("mkdocs.yml", "mkdocstrings:"),
    "mkdocstrings-python": ("mkdocs.yml", "handlers:"),
    "mypy": ("Makefile", "bin/mypy"),
    "ruff": ("Makefile", "bin/ruff"),
}


def setup() -> configparser.ConfigParser:
    read = configparser.ConfigParser()
    read.read(ROOT / "setup.cfg")
    return read


def declared(text: str) -> set[str]:
    """Returns the distributions that a list of requirements names."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return {re.match(r"[\w-]+", line)[0] for line in lines if line}


CORE = declared(setup()["options"]["install_requires"])
EXTRAS = {name: declared(text) for name, text in setup()["options.extras_require"].items()}


def module_of(distribution: str) -> str:
    return MODULES.get(distribution, distribution)


def imports(*folders: str, everywhere: bool = True) -> dict[str, str]:
    """Returns the modules of others that folders import, each with a file that does.

    Names that are given to `importorskip`, `import_module` and `find_spec` count; without
    `everywhere` only imports at the top of a module do.
    """
    found = {}
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree) if everywhere else tree.body:
            for name in names(node):
                found.setdefault(name.split(".")[0], str(path.relative_to(ROOT)))
    own = {path.stem for path in (ROOT / "tests").glob("*.py")}
    others = found.keys() - sys.stdlib_module_names - own - set(OURS)
    return {name: found[name] for name in others}


def names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [] if node.level else [node.module or ""]
    if isinstance(node, ast.Call) and node.args:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        first = node.args[0]
        by_name = called in ("importorskip", "import_module", "find_spec")
        if by_name and isinstance(first, ast.Constant) and isinstance(first.value, str):
            return [first.value]
    return []


def test_what_is_declared_is_imported():
    core = imports("zofl_jax", "experiments")
    assert {d for d in CORE if module_of(d) not in core} == set()


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_what_an_extra_declares_is_imported_by_what_it_is_for(extra):
    found = imports(*FOR[extra])
    for distribution in sorted(EXTRAS[extra]):
        if distribution in NEVER_IMPORTED:
            file, word = NEVER_IMPORTED[distribution]
            assert word in (ROOT / file).read_text(), distribution
        else:
            assert module_of(distribution) in found, distribution


def test_what_is_imported_is_declared():
    of_users = [name for name in EXTRAS if name not in ("test", "check", "docs")]
    known = {module_of(d) for d in CORE.union(*(EXTRAS[name] for name in of_users))}
    known.update(TOLD_TO_INSTALL)
    found = imports("zofl_jax", "experiments")
    assert {name: file for name, file in found.items() if name not in known} == {}


def test_extras_are_imported_where_they_are_needed():
    """A module that is imported at the top of another is needed by everybody."""
    core = {module_of(d) for d in CORE}
    found = imports("zofl_jax", "experiments", everywhere=False)
    assert {name: file for name, file in found.items() if name not in core} == {}


def test_tests_have_what_their_extra_promises():
    """All that users' extras hold, but for TensorFlow, is there when the tests run."""
    assert EXTRAS["privacy"] | EXTRAS["tensorboard"] <= EXTRAS["test"]
    assert EXTRAS["tfds"] - {"tensorflow"} <= EXTRAS["test"]


def test_type_checkers_read_the_annotations():
    assert (ROOT / "zofl_jax" / "py.typed").exists()
    assert "py.typed" in setup()["options.package_data"]["zofl_jax"].split()


def test_a_wheel_holds_every_package_and_the_commands_under_one_name():
    listed = set(setup()["options"]["packages"].split())
    rooms = {path.parent for path in (ROOT / "zofl_jax").rglob("__init__.py")}
    named = {".".join(path.relative_to(ROOT).parts) for path in rooms}
    assert listed == named | {"zofl_jax.experiments"}
    assert setup()["options"]["package_dir"].split() == ["zofl_jax.experiments", "=", "experiments"]
    kept = setup()["options.package_data"]["zofl_jax.experiments"].split()
    assert kept == ["flagfiles/*.flags"]
    # Installed, the folder has another name: what imports its neighbours says so relatively.
    for path in (ROOT / "experiments").glob("*.py"):
        assert "experiments" not in {
            node.module.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and not node.level and node.module
        }, path


def test_every_folder_of_modules_is_a_package():
    """What has no `__init__.py`, or is kept from being committed, isn't in a wheel."""
    for path in (ROOT / "zofl_jax").rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), path.parent
    ignored = (ROOT / ".gitignore").read_text().split()
    folders = {path.name for path in (ROOT / "zofl_jax").rglob("*") if path.is_dir()}
    assert {line for line in ignored if line.strip("/") in folders and line[0] != "/"} <= {
        "__pycache__/"
    }
