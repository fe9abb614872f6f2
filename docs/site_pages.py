"""MkDocs' hook: the pages outside docs/ that the site has too, and links that lead to them.

README.md is the site's first page, and CONTRIBUTING.md, CHANGELOG.md and SECURITY.md are pages; a file outside docs/
that a page links to (an example, a picture) comes along. Links stand as the repository needs them and hold in both.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", **{name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")}}
LINK = re.compile(r'(\]\(|(?:src|srcset)=")([^)"#:]+)(?=[)"#])')


def sources() -> dict[str, Path]:
    """Every page's place in the site, and its file."""
    inside = {path.name: path for path in (ROOT / "docs").glob("*.md")}
    return {**inside, **{place: ROOT / name for name, place in PAGES.items()}}


def place_of(target: str, source: Path) -> str:
    """Where the site has a file that a page links to: a path from the site's root, where all pages lie."""
    name = posixpath.relpath((source.parent / target).resolve(), ROOT)
    if name.startswith(".."):
        raise ValueError(f"{source.name}: the link to {target} leaves the repository")
    place = PAGES.get(name, name.removeprefix("docs/"))
    return f"{place}.md" if place.endswith(".py") else place


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    pages = sources()
    for place, path in pages.items():
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, content=path.read_text(encoding="utf-8")))
    for path in pages.values():
        for _, target in LINK.findall(path.read_text(encoding="utf-8")):
            file = (path.parent / target).resolve()
            place = place_of(target, path)
            if file.is_file() and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, content=_content(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    path = sources().get(page.file.src_uri)
    return markdown if path is None else LINK.sub(lambda found: found[1] + place_of(found[2], path), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Tables that are wider than the page are scrolled by the keyboard too."""
    return html.replace("<table>", '<table tabindex="0">')


def _content(file: Path) -> str | bytes:
    if file.suffix != ".py":
        return file.read_bytes()
    code = file.read_text(encoding="utf-8")
    return f"# {file.relative_to(ROOT)}\n\n```python\n{code}```\n"
