"""Commands in turn share processes, whichever tests start them."""

from commands import Commands


def test_commands_of_two_tests_share_a_process(tmp_path, cache, processes, monkeypatch):
    environments = []
    for test in ("tests/test_one.py::test_a (call)", "tests/test_two.py::test_b (setup)"):
        monkeypatch.setenv("PYTEST_CURRENT_TEST", test)
        environments.append(Commands(tmp_path / test[6:14], cache, processes).environment)
    assert environments[0] == environments[1]
