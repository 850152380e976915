"""What README, docs, flagfiles and modules tell the reader to run, and what they point to."""

import importlib.util
import re

import pages
import pytest
from commands import Commands
from pages import ROOT

COMMANDS = pages.commands()
MODULES = [c for c in COMMANDS if c.words[1:2] == ("-m",)]
NEEDS_TORCH = "benchmarks.compare_pytorch"
HAS_TORCH = importlib.util.find_spec("torch") is not None


def own_words(command):
    """Returns the words after `python -m`, with something for what the reader fills in."""
    words = [word for word in command.words[2:] if word != "..."]
    words = [re.sub(r"=[A-Z]$", "=1", word) for word in words]
    words = [word for word in words if word != "--flagfile=FLAGS"]
    return ["benchmarks.round" if word == "benchmarks.NAME" else word for word in words]


@pytest.fixture
def commands(tmp_path, cache):
    return Commands(tmp_path, cache, quick=True)


@pytest.fixture(scope="module")
def answers():
    told = [own_words(command) for command in MODULES if readable(command)]
    asked = [flag for _, flag in pages.flags_in_sentences()]
    return pages.answers(told, asked)


def readable(command):
    return HAS_TORCH or command.words[2] != NEEDS_TORCH


def test_pages_hold_commands():
    by_page = {page: [c for c in COMMANDS if c.page == page] for page in {c.page for c in COMMANDS}}
    assert len(by_page["README.md"]) >= 12
    assert len(by_page["docs/conditions.md"]) >= 6
    assert len(by_page["benchmarks/README.md"]) >= 20  # loops, taken apart
    flagfiles = {f"experiments/flagfiles/{f.name}" for f in pages.FLAGFILES.glob("*.flags")}
    assert flagfiles <= by_page.keys(), "every flagfile's header tells its command"


def test_flags_of_commands_are_read(answers):
    read = [command for command in MODULES if readable(command)]
    wrong = [f"{c}\n  {a.complaint}" for c, a in zip(read, answers, strict=True) if a.complaint]
    assert not wrong, "\n".join(wrong)


def test_other_commands_can_be_given():
    others = [(command, pages.complaint(command.words)) for command in COMMANDS]
    wrong = [f"{command}\n  {complaint}" for command, complaint in others if complaint]
    assert not wrong, "\n".join(wrong)


def test_flags_in_sentences_exist(answers):
    taken = {flag for answer in answers for flag in answer.taken}
    named = pages.flags_in_sentences()
    assert len(named) > 60
    wrong = [f"{page}: {flag}" for page, flag in named if flag not in taken]
    assert not wrong, "\n".join(wrong)


def test_links_lead_somewhere():
    wrong = []
    for page in [*pages.markdown(), ROOT / "WORKSPACE.md", ROOT / "CHANGELOG.md"]:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, heading = link.partition("#")
            if path.startswith(("http://", "https://")):
                continue
            target = page.parent / path if path else page
            if not target.exists() or (heading and heading not in headings(target)):
                wrong.append(f"{page.relative_to(ROOT)}: {link}")
        for path in re.findall(r"`((?:zofl_jax|experiments|benchmarks|docs|tests)/[^`\s]*)`", text):
            if not list(ROOT.glob(path.rstrip("/"))):
                wrong.append(f"{page.relative_to(ROOT)}: {path}")
    assert not wrong, "\n".join(wrong)


def headings(page):
    """Returns the anchors that a page's headings make."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


def test_a_short_command_runs_as_it_is_written(commands):
    """One more, of privacy, runs on CI's fresh Debian (.ci/fresh_debian)."""
    line = "experiments.train --flagfile=experiments/flagfiles/digits_accuracy.flags"
    (written,) = {c.words[1:] for c in COMMANDS if " ".join(c.words[2:]) == line}
    (commands.folder / "experiments").symlink_to(ROOT / "experiments")
    done = commands.run(*written)
    assert done.code == 0, done.err
    (run,) = (commands.folder / "runs").iterdir()
    assert f"Figures, log and summary are in runs/{run.name}" in done.out


def test_library_examples_run(commands):
    # Their rounds would take longer than LLVM's optimisations do.
    commands.environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    done = commands.run("-c", "\n".join(blocks))
    assert done.code == 0, done.err
    accuracies = [float(line.split()[0]) for line in done.out.splitlines()]
    assert len(accuracies) == len(blocks) == 2 and min(accuracies) > 0.95


def test_lowest_versions_are_those_declared():
    setup = pages.setup_options()
    extras = setup["options.extras_require"]
    declared = setup["options"]["install_requires"] + extras["test"] + extras["language"]
    lowest = {
        name: version for name, version in re.findall(r"^([\w-]+)>=([\d.]+)$", declared, re.M)
    }
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci/lowest.txt").read_text(), re.M))
    del pinned["jaxlib"]  # comes with jax
    assert pinned.keys() == lowest.keys()
    for name, version in lowest.items():
        assert re.fullmatch(rf"{re.escape(version)}(\.0)*", pinned[name]), name
