"""Every script has a page: what comes out, what to copy, what is refused."""

import re

import pytest

from tests.gallery.conftest import EXAMPLES

PAGES = EXAMPLES.parent / "docs" / "gallery"
INCLUDED = re.compile(r"```\{literalinclude\} \.\./\.\./examples/(\w+)\.py")


def included(page):
    return INCLUDED.findall(page.read_text(encoding="utf-8"))


pages = pytest.mark.parametrize(
    "page", sorted(filter(included, PAGES.glob("*.md"))), ids=lambda page: page.stem
)


def test_every_script_is_on_one_page():
    scripts = [script for page in PAGES.glob("*.md") for script in included(page)]
    assert len(scripts) == len(set(scripts))
    assert set(scripts) == {path.stem for path in EXAMPLES.glob("*.py")}


def test_the_index_has_a_row_for_every_page():
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \S.* \| \[\]\((\w+)\.md\) \|$", index, re.MULTILINE)
    tree = index.partition(":hidden:\n\n")[2].partition("\n```")[0].split()
    assert rows == tree  # the table and the sidebar, in one order
    assert sorted(rows) == sorted({p.stem for p in PAGES.glob("*.md")} - {"index"})


@pages
def test_a_page_says_what_comes_out_what_to_copy_and_what_is_refused(page):
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["What to copy", "What cannot go wrong silently"]
    shown, _, rest = text.partition("## What to copy")
    assert "**Outcome:**" in shown
    copied, _, refused = rest.partition("## What cannot go wrong silently")
    assert "```python\n" in copied
    assert ">>> " in refused
