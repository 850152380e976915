"""What MkDocs is told beside `mkdocs.yml`: the reference's pages, and files outside of `docs/`.

The reference has a page for each module, made of the names of the files, so a module that is moved
or renamed needs no edit here. A page of `docs/` may link to any file of the repository, as it does
where the repository is read without the site: the file is copied to `repository/`, a page of
Markdown becomes a page of the site. A link to a file that isn't there stays as it is, for
`--strict` to complain of.
"""

import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCS = "docs"
COPIES = "repository"
REFERENCE = "reference"
PACKAGES = ("zofl_jax", "experiments")

LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the reference to the navigation, and says where pages of the repository are."""
    nav = _placed(config.nav)
    nav.append({"Reference": [{package: _nav_of(ROOT / package)} for package in PACKAGES]})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the reference, and what pages link to outside of `docs/`."""
    for package in PACKAGES:
        for path in _modules(ROOT / package):
            files.append(File.generated(config, _page_of(path), content=_reference(path)))
    linked = [path for path in _paths_in(config.nav) if path.startswith(f"{COPIES}/")]
    linked = [path.removeprefix(f"{COPIES}/") for path in linked]
    for file in files.documentation_pages():
        if not file.src_uri.startswith(f"{REFERENCE}/"):
            text = Path(file.abs_src_path or "").read_text()
            linked += _outside(text, posixpath.join(DOCS, posixpath.dirname(file.src_uri)))
    added = set()
    while linked:
        path = linked.pop()
        if path in added:
            continue
        added.add(path)
        text = (ROOT / path).read_bytes()
        files.append(File.generated(config, f"{COPIES}/{path}", content=text))
        if path.endswith(".md"):
            linked += _outside(text.decode(), posixpath.dirname(path))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links between `docs/` and the rest of the repository."""
    uri = page.file.src_uri
    if uri.startswith(f"{REFERENCE}/"):
        return markdown
    copied = uri.startswith(f"{COPIES}/")
    place = uri.removeprefix(f"{COPIES}/") if copied else posixpath.join(DOCS, uri)
    folder = posixpath.dirname(place)

    def rewritten(match: re.Match[str]) -> str:
        path, mark, heading = match[2].partition("#")
        target = _target(path, folder)
        if target is None:
            return match[0]
        inside = target.removeprefix(f"{DOCS}/")
        to = inside if inside != target else f"{COPIES}/{target}"
        link = posixpath.relpath(to, posixpath.dirname(uri) or ".")
        return f"{match[1]}{link}{mark}{heading}{match[3]}"

    return _outside_of_fences(markdown, lambda text: LINK.sub(rewritten, text))


def _placed(nav: Any) -> Any:
    """Returns a navigation with pages outside of `docs/` where they are copied to."""
    if isinstance(nav, list):
        return [_placed(entry) for entry in nav]
    if isinstance(nav, dict):
        return {title: _placed(entry) for title, entry in nav.items()}
    return f"{COPIES}/{nav.removeprefix('../')}" if nav.startswith("../") else nav


def _paths_in(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [path for entry in entries for path in _paths_in(entry)]


def _modules(package: Path) -> list[Path]:
    """Returns the public modules of a package, itself first."""
    found = sorted(package.rglob("*.py"), key=lambda path: (path.parent, path.name))
    return [p for p in found if not p.stem.startswith("_") or p.stem == "__init__"]


def _name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _page_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = (*parts[:-1], "index") if parts[-1] == "__init__" else parts
    return posixpath.join(REFERENCE, *parts) + ".md"


def _nav_of(package: Path) -> list[Any]:
    """Returns the navigation of a package: its own page, its modules, its packages."""
    nav: list[Any] = [_page_of(package / "__init__.py")]
    for path in sorted(package.iterdir()):
        if (path / "__init__.py").exists():
            nav.append({path.name: _nav_of(path)})
        elif path.suffix == ".py" and not path.stem.startswith("_"):
            nav.append({path.stem: _page_of(path)})
    return nav


def _reference(path: Path) -> str:
    """Returns the page of a module; that of a package lists what is in it."""
    name = _name_of(path)
    lines = [f"# {name}", "", f"::: {name}", ""]
    if path.stem == "__init__":
        lines += ["    options:", "      members: false", ""]
        for other in sorted(path.parent.iterdir()):
            inner = other / "__init__.py" if other.is_dir() else other
            if not inner.exists() or inner.suffix != ".py" or other.stem.startswith("_"):
                continue
            link = os.path.relpath(_page_of(inner), posixpath.dirname(_page_of(path)))
            lines.append(f"- [{_name_of(inner)}]({link})")
    return "\n".join(lines) + "\n"


def _outside(markdown: str, folder: str) -> list[str]:
    """Returns the files outside of `docs/` that a page in `folder` links to."""
    links: list[str] = []

    def noted(text: str) -> str:
        links.extend(match[2] for match in LINK.finditer(text))
        return text

    _outside_of_fences(markdown, noted)
    targets = [_target(link.partition("#")[0], folder) for link in links]
    return [path for path in targets if path and not path.startswith(f"{DOCS}/")]


def _target(link: str, folder: str) -> str | None:
    """Returns the file of the repository that a link in `folder` leads to, if there is one."""
    if not link or re.match(r"\w+:", link) or link.startswith("/"):
        return None
    path = posixpath.normpath(posixpath.join(folder, link))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _outside_of_fences(markdown: str, change: Callable[[str], str]) -> str:
    """Returns Markdown with all changed but blocks of code."""
    parts, at = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, change(markdown[at:])])
