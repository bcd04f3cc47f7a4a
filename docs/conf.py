"""Sphinx: the README, docs/, cann_sim's README and the docstrings as one site. `make docs` builds it.

The source folder is the repository itself, so that links between pages are the same here as where files are viewed in
it.
"""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx

import npu_xent

ROOT = Path(__file__).resolve().parent.parent

project = "npu_xent"
author = "the authors of npu_xent"
copyright = author
release = version = npu_xent.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "README"
# In the order of the sidebar; the last are there in some checkouts only.
PAGES = (
    (
        "Guides",
        (
            "docs/install",
            "docs/compatibility",
            "docs/migration",
            "docs/frameworks",
            "docs/rl",
            "docs/padded_labels",
            "docs/atlas",
            "docs/acceptance",
        ),
    ),
    ("When something fails", ("docs/errors", "docs/limits", "docs/environment")),
    (
        "How it works",
        (
            "docs/design",
            "docs/numerics",
            "docs/trust",
            "docs/benchmarks",
            "docs/scaling",
            "docs/vendor",
            "docs/device_kernels",
            "cann_sim/README",
        ),
    ),
    ("Reference", ("docs/api/npu_xent", "docs/api/compat", "docs/api/distributed", "docs/api/integrations")),
    ("Project", ("CHANGELOG", "CONTRIBUTING", "SECURITY", "docs/stability")),
)
include_patterns = ["README.md", *(f"{page}.md" for _, pages in PAGES for page in pages)]
exclude_patterns = ["**/.venv", "**/build", "**/.git"]

myst_heading_anchors = 3
highlight_language = "none"  # of blocks that name none
default_role = "py:obj"  # `cross_entropy` in a docstring is a link
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"npu_xent {release}"
html_extra_path = ["site"]  # index.html leads to README.html
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_copy_source = html_show_sourcelink = False


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """The README is the first page; the list of the others is no part of it where it is viewed as a file."""
    if name == root_doc:
        for caption, pages in PAGES:
            there = [page for page in pages if (ROOT / f"{page}.md").exists()]
            source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *there, "```", ""])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
