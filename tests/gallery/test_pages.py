"""Every script has a page, and a page shows what to copy and what is refused."""

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
    of_kernels = {"c_kernel", "numpy_kernel", "triton_kernel", "simulator"}
    have = {path.stem for path in EXAMPLES.glob("*.py")}
    assert have - of_kernels <= set(scripts) <= have


@pages
def test_a_page_shows_what_to_copy_and_what_is_refused(page):
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["What to copy", "What cannot go wrong"]
    refused = text.partition("## What cannot go wrong")[2]
    assert ">>> " in refused
