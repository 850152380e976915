"""Which tests run in one process of `pytest -n`: those of a file, which share what it compiles.

The tests of test_contract.py are too many for that; there those of a method share one. The groups
of pytest-xdist (`--dist loadgroup`) have no effect since pytest 9.2: without a word, the tests of a
file then alternate between the processes, and each compiles everything.
"""

from typing import Any

BY_PARAMETER = ("test_contract.py",)
LONG = (
    *("test_placement", "test_distributed", "test_low_rank", "test_language", "test_train"),
    "test_contract",
)
"""Files that take long: they come first, so that no process works on one when all others are done.
What begins with one of these names counts."""


def group(node_id: str) -> str:
    """Returns the group of a test.

    >>> group("tests/test_keys.py::test_a_key[0-threefry2x32]")
    'tests/test_keys.py'
    >>> group("tests/test_contract.py::test_it_learns[fedavg, QSGD]")
    'tests/test_contract.py[fedavg, QSGD]'
    """
    file, _, name = node_id.partition("::")
    parameters = name[name.find("[") :] if "[" in name and file.endswith(BY_PARAMETER) else ""
    return file + parameters


def long_first(items: list[Any]) -> None:
    """Puts the tests of long files before the others, in place."""
    items.sort(key=lambda item: not item.path.stem.startswith(LONG))


def make_scheduler(config: Any, log: Any) -> Any:
    """Returns a scheduler of pytest-xdist that keeps a group in one process and the given order."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False

    class LoadGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:  # what xdist says to override
            return group(nodeid)

    return LoadGroup(config, log)
