"""Sphinx configuration. ``sphinx-build -W --keep-going -b html docs docs/_build/html``; needs no network."""

# ruff: noqa: INP001 - Sphinx runs it by path
from __future__ import annotations

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "imagestore"
author = "the imagestore authors"
project_copyright = "the imagestore authors, Apache-2.0"
version = release = installed("imagestore")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "imagestore_docs"]
exclude_patterns = ["_build", "_ext", "examples", "images"]
# `Name` in a docstring is a Python name.
default_role = "py:obj"
nitpicky = True
# Names of other libraries, which are not looked up because a build needs no network.
nitpick_ignore_regex = [
    ("py:.*", r"(?!imagestore).*"),
    ("py:.*", r"imagestore\.(\w+\.)?_.*"),  # what is private
    ("py:class", r"imagestore\.\w+\.[TPE]"),  # type variables
]

myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "imagestore"
html_static_path = ["_static"]
html_css_files = ["imagestore.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"
