"""The site builds without a warning, and nothing in it leads nowhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import gradtools as gt
import gradtools.testing
from tests.docs.links import broken

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-E", "-b", "html"]
    built = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), str(SOURCE), str(folder / "html")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert built.returncode == 0, built.stderr
    return folder / "html"


def pages(site):
    return {
        path.relative_to(site).as_posix(): path.read_text(encoding="utf-8")
        for path in site.rglob("*.html")
    }


def test_every_link_and_image_leads_somewhere(site):
    assert list(broken(site)) == []


def test_every_page_is_built_and_can_be_reached(site):
    built = pages(site)
    sources = {
        path.relative_to(SOURCE).with_suffix(".html").as_posix()
        for path in SOURCE.rglob("*.md")
        if "_build" not in path.parts
    }
    assert sources <= built.keys()
    tree = set(re.findall(r'class="toctree-l\d.*?href="([^"#]*)', built["index.html"]))
    assert sources - tree - {"index.html"} == set()


def test_every_page_has_a_title_and_text(site):
    for name, html in pages(site).items():
        title = re.search(r"<title>(.*?)</title>", html, re.DOTALL)
        assert title, name
        assert title[1].strip() not in ("", "&lt;no title&gt; - gradtools"), name


def test_every_public_name_is_in_the_reference(site):
    anchors = set()
    for name, html in pages(site).items():
        if name.startswith("api/"):
            anchors |= set(re.findall(r'id="([\w.]+)"', html))
    public = {f"gradtools.{name}" for name in gt.__all__}
    public |= {f"gradtools.testing.{name}" for name in gradtools.testing.__all__}
    assert public <= anchors


def test_the_front_page_leads_a_reader_to_each_part(site):
    html = (site / "index.html").read_text(encoding="utf-8")
    body = html[html.index("<article") : html.index("</article>")]
    parts = ("quickstart", "why", "capabilities", "second-order", "how-it-works")
    parts += ("gradcheck", "performance", "errors", "guides/compile")
    for part in parts:
        assert f'href="{part}.html' in body, part


class _Tables(HTMLParser):
    """Tables that nothing lets scroll."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.bare = 0

    def handle_starttag(self, tag, attrs):
        if tag in ("div", "table"):
            classes = dict(attrs).get("class") or ""
            if tag == "table" and "docutils" in classes:
                self.bare += not any("table-wrapper" in c for c in self.open)
            self.open.append(classes)

    def handle_endtag(self, tag):
        if tag in ("div", "table"):
            self.open.pop()


def test_wide_tables_scroll_by_themselves(site):
    for name, html in pages(site).items():
        tables = _Tables()
        tables.feed(html)
        assert tables.bare == 0, name


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="here"></h1><a href="#here">1</a><a href="#there">2</a>'
        '<a href="b.html">3</a><img src="c.png"><a href="https://example.org">4</a>'
    )
    assert list(broken(tmp_path)) == [
        "a.html: #there",
        "a.html: b.html",
        "a.html: c.png",
    ]
