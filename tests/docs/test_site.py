"""The documentation site: it builds without a warning, its links lead somewhere, and it needs no network."""

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from helpers import CHROMIUM, browse

pytest.importorskip("sphinx", reason="no sphinx")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
RESOURCES = {"script": "src", "img": "src", "source": "src", "iframe": "src", "link": "href"}
"""Attributes with files that a browser loads by itself."""

LOOK = """<script>
  addEventListener("load", () => setTimeout(() => {
    const box = (element) => element.getBoundingClientRect();
    document.body.dataset.found = JSON.stringify({
      title: document.title,
      formulas: [...document.querySelectorAll("math")].map((math) => [box(math).width, box(math).height]),
      results: [...document.querySelectorAll("#search-results li a")].map((link) => link.getAttribute("href")),
      broken: [...document.images].filter((image) => !image.naturalWidth && image.offsetWidth).length,
      remote: performance.getEntriesByType("resource").map((entry) => entry.name)
        .filter((name) => !name.startsWith("file:") && !name.startsWith("data:")),
    });
  }, 3000));
</script>"""


class Page(HTMLParser):
    """The anchors, links and resources of an HTML page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values["id"]} if "id" in values else set()
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if values.get(RESOURCES.get(tag, "")):
            self.resources.append(values[RESOURCES[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built from a copy of its sources; a warning is an error."""
    source, built = (tmp_path_factory.mktemp(name) for name in ("source", "html"))
    generated = shutil.ignore_patterns("_build", "commands", "options", "__pycache__")
    shutil.copytree(ROOT / "docs", source, ignore=generated, dirs_exist_ok=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", str(source), str(built)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {file: Page(file) for file in site.rglob("*.html")}


def test_every_link_and_anchor_exists(site, pages):
    lost = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if parts.scheme or target.name == "search.html":
                continue
            anchors = pages[target].ids if target in pages else {""}
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in anchors):
                lost.append(f"{file.relative_to(site)}: {link}")
    assert lost == []


def test_no_page_loads_anything_from_elsewhere(site, pages):
    loaded = {link for page in pages.values() for link in page.resources}
    assert [
        link for link in loaded if urlsplit(link).netloc or urlsplit(link).scheme not in ("", "data")
    ] == []
    for style in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", style.read_text()) == [], style


def test_every_command_and_option_has_its_page(site):
    from diffusion_cli.config import COMMANDS, defaults, options

    for command in COMMANDS:
        assert (site / "reference" / "commands" / f"{command}.html").is_file()
        for group in defaults(command):
            page = (site / "reference" / "options" / f"{group}.html").read_text()
            assert [
                name for name in options(group) if f'id="{name}"' not in page and f">{name}<" not in page
            ] == []


def look(site: Path, page: str, tmp_path: Path, query: str = "") -> dict:
    """What a browser shows of a page, which is opened as a file."""
    seen = site / page.replace(".html", ".seen.html")
    seen.write_text((site / page).read_text().replace("</body>", f"{LOOK}</body>", 1))
    flags = ["--virtual-time-budget=10000", "--host-resolver-rules=MAP * ~NOTFOUND"]
    dom, _ = browse(f"{seen.as_uri()}{query}", tmp_path / "profile", *flags)
    seen.unlink()
    match = re.search(r'data-found="([^"]*)"', dom)
    assert match, dom[-2000:]
    return json.loads(html.unescape(match[1]))


@in_browser
@pytest.mark.parametrize("page", ["index.html", "reference/commands/train.html", "howto/editing.html"])
def test_a_page_shows_all_its_pictures_and_asks_for_nothing_else(site, tmp_path, page):
    found = look(site, page, tmp_path)
    assert found["title"]
    assert (found["broken"], found["remote"]) == (0, [])


@in_browser
def test_formulas_are_drawn(site, tmp_path):
    found = look(site, "explanation/conventions.html", tmp_path)
    assert len(found["formulas"]) > 5
    assert all(width > 5 and height > 5 for width, height in found["formulas"])


@in_browser
def test_the_search_finds_a_word_without_a_server(site, tmp_path):
    found = look(site, "search.html", tmp_path, "?q=autoguidance")
    assert any("guidance.html" in link for link in found["results"])
    assert found["remote"] == []
