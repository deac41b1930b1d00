"""What is public: it is documented, it is what documents speak of, and it says so."""

import inspect
import pickle
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import gradtools as gt
import gradtools.testing

ROOT = Path(__file__).parents[2]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (gt, gradtools.testing)
    for name in module.__all__
}
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_has_a_docstring_with_an_example(name):
    text = inspect.getdoc(PUBLIC[name])
    assert text
    assert "\nExample" in text or name == "gradtools.vmap"  # torch's, with its own
    assert ">>> " in text


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_is_in_the_reference(name):
    pages = list((ROOT / "docs" / "api").glob("*.md"))
    if not pages:
        pytest.skip("this tree has no docs/api")
    _, _, short = name.rpartition(".")
    assert any(re.search(rf"\b{short}\b", page.read_text()) for page in pages)


def mentioned(text):
    """Return the dotted names of gradtools in a text, without their package."""
    return set(re.findall(r"\b(?:gt|gradtools)\.([A-Za-z_][\w.]*\w)", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documents_mention_nothing_that_is_not_there(page):
    for dotted in mentioned(page.read_text()):
        try:
            pkgutil.resolve_name(f"gradtools.{dotted}")
        except (AttributeError, ImportError):
            pytest.fail(f"{page.name} mentions gradtools.{dotted}")


def test_the_changelog_names_all_that_is_public():
    text = (ROOT / "CHANGELOG.md").read_text()
    for name in {name.rpartition(".")[2] for name in PUBLIC}:
        stem = "Error" if name.endswith("Error") else name
        assert re.search(rf"\b{stem}", text, re.IGNORECASE), name


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_is_where_it_says(name):
    value = PUBLIC[name]
    module, _, short = name.rpartition(".")
    assert value.__module__ == module
    assert value.__qualname__ == value.__name__ == short
    assert pickle.loads(pickle.dumps(value)) is value
    if inspect.isclass(value):
        assert repr(value) == f"<class '{name}'>"
    elif not inspect.isfunction(value):
        assert repr(value).startswith(f"<CustomVJP {name} (")


@pytest.mark.parametrize("contract", [gt.Exact(1e-3), gt.Surrogate(), gt.Approximate()])
def test_records_survive_a_pickle(contract):
    assert pickle.loads(pickle.dumps(contract)) == contract


def test_what_the_package_returns_survives_a_pickle():
    def f(x):
        return (x**3).sum()

    for value in (
        gt.hessian_trace(f, torch.ones(3), samples=4),
        gt.cg(torch.eye(2), torch.ones(2))[1],
        gradtools.testing.check_grads(torch.sin, (torch.ones(2),)),
    ):
        copy = pickle.loads(pickle.dumps(value))
        assert type(copy) is type(value)
        assert repr(copy) == repr(value)


def test_the_makefile_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", text, re.MULTILINE)[1]
    described = re.findall(r"^([a-z]+):.*## \S", text, re.MULTILINE)
    assert sorted(phony.replace("\\", "").split()) == sorted(described)
