"""How Sphinx builds the documentation; offline, with every warning an error."""

import sys
from pathlib import Path

from docutils import nodes

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from inventories import write_inventory  # noqa: E402

import gradtools  # noqa: E402

project = "gradtools"
author = "The gradtools developers"
copyright = "2026, the gradtools developers"
version = release = gradtools.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [("py:class", "'.*'")]  # a string of a Literal is no class
suppress_warnings = ["toc.empty_glob"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Signatures are shown as they are written; what they mean stands in the text.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
maximum_signature_line_length = 76
python_display_short_literal_types = True

# Nothing is fetched: the names that we refer to are listed in docs/inventories.
OTHERS = {
    "python": "https://docs.python.org/3",
    "torch": "https://docs.pytorch.org/docs/stable",
    "numpy": "https://numpy.org/doc/stable",
}
intersphinx_mapping = {
    name: (
        url,
        str(
            write_inventory(
                HERE / f"inventories/{name}.txt",
                HERE / f"_build/inventories/{name}.inv",
            )
        ),
    )
    for name, url in OTHERS.items()
}

# Other hosts cannot be asked by a build without a network. Links within the pages,
# anchors and images are held by tests/docs/test_site.py.
linkcheck_ignore = [r"https?://.*"]

html_theme = "furo"
html_title = "gradtools"
html_static_path = ["_static"]
html_css_files = ["gradtools.css"]
html_show_sphinx = False
html_copy_source = False
html_domain_indices = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"


def setup(app):  # noqa: ANN001, ANN201, D103 (Sphinx's hook)
    app.connect("doctree-read", _without_last_blank_line)


def _without_last_blank_line(app, doctree):  # noqa: ANN001, ANN202
    """Take away the blank line that ends the last output of an example in a fence."""
    for block in doctree.findall(nodes.literal_block):
        text = block.astext().rstrip("\n")
        block.children[:] = [nodes.Text(text)]
        block.rawsource = text
