"""The site of docs/: it builds without a warning, its links lead somewhere, and a browser has no complaint."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
# Contrast, alternative texts, names of links and buttons, the size of what is tapped, and the rest of WCAG 2.2 AA.
RULES: dict[str, Any] = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa"],
    "rules": {"target-size": {"enabled": True}},
    "resultTypes": ["violations"],
}
# Sites that pages may lead to, by a click alone.
ELSEWHERE = {"arxiv.org", "keepachangelog.com", "semver.org", "squidfunk.github.io"}
PHONE, DESK = (390, 844), (1280, 900)
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("material") is None,
    reason="needs mkdocs-material: make docs installs docs/requirements.txt",
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("axe_playwright_python") is None,
    reason="needs chromium, and docs/requirements.txt, which make docs installs",
)
pytestmark = needs_mkdocs
# Their colours are those of the other pages; contrast takes a while for each of their thousands of words.
LONG = ("api.html", "performance.html")


class Page(HTMLParser):
    """What a page asks for, where its links lead, and its places."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        fetched = tag == "link" and given.get("rel") != "canonical"
        for name in ("href", "src", "srcset"):
            if name in given:
                (self.loads if fetched or name != "href" else self.links).append(given[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, timeout=300
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


def test_links_lead_somewhere_and_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    assert len(pages) > 15
    wrong = []
    for path, page in pages.items():
        for target in page.loads + page.links:
            url = urlsplit(target)
            if url.scheme in ("http", "https"):
                if target in page.loads or url.hostname not in ELSEWHERE:
                    wrong.append((path.name, target))
                continue
            # The page for what is not there is shown at any depth, so that its links begin at the root.
            place = unquote(url.path)
            file = (site / place[1:] if place.startswith("/") else path.parent / place).resolve() if place else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists() or (url.fragment and url.fragment not in pages[file].places):
                wrong.append((path.name, target))
    assert wrong == []


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def listen(page: Any, address: str) -> list[str]:
    """What the page will complain of, and what it will ask of others than the site."""
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(address) else said.append(f"asks for {asked.url}"))
    return said


def complaints(page: Any, width: int) -> Iterator[str]:
    """Faults of the page as it is shown: wider than the screen, or against axe's rules of accessibility."""
    from axe_playwright_python.sync_playwright import Axe

    found = page.evaluate("document.documentElement.scrollWidth")
    if found > width:
        yield f"{found} pixels wide on {width}"
    rules = RULES["rules"] | {"color-contrast": {"enabled": not page.url.endswith(LONG)}}
    for rule in Axe().run(page, options=RULES | {"rules": rules}).response["violations"]:
        yield f"{rule['id']} at {len(rule['nodes'])} places, such as {rule['nodes'][0]['html'][:150]}"


@needs_browser
@pytest.mark.slow
def test_a_browser_finds_nothing_to_complain_of(site: Path, address: str) -> None:
    from playwright.sync_api import sync_playwright

    names = [str(path.relative_to(site)) for path in sorted(site.rglob("*.html")) if path.name != "404.html"]
    screens: list[tuple[tuple[int, int], Literal["light", "dark"], list[str]]]
    screens = [(PHONE, "light", names), (DESK, "dark", ["index.html", "use.html"])]
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, chromium_sandbox=False)
        for (width, height), colours, shown in screens:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=colours)
            said = listen(page, address)
            for name in shown:
                page.goto(f"{address}/{name}", wait_until="load")
                wrong += [f"{name}, {colours}: {text}" for text in (*complaints(page, width), *said)]
                said.clear()
        browser.close()
    assert wrong == []
