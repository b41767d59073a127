"""How the documentation site is built: ``make docs``; a warning is an error."""

from __future__ import annotations

from importlib.metadata import version as version_of
from typing import Any

from docutils.nodes import Element
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.nodes import make_refnode

project = "msft-store"
author = "the msft-store authors"
copyright = author
release = version_of("msft-store")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
nitpicky = True
# Types in signatures that are not ours or have no page; modules that are named and have none.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|transformers|accelerate|collections|contextlib|concurrent|pathlib|os)\..*"),
    ("py:.*", r"(io|typing)\..*"),
    ("py:class", r"(msft_store|trainer)(\.\w+){2,}"),
    ("py:class", "trainer.algorithms.base.AnyDecision"),
    ("py:mod", ".*"),
    # Sphinx cuts a signature with the default of a factory at its commas.
    ("py:class", r"tuple\[str"),
]
# Fields that have the name of a type.
suppress_warnings = ["ref.python"]

html_extra_path = ["groups-light.svg", "groups-dark.svg"]
html_theme = "furo"
html_title = f"msft-store {release}"
html_copy_source = False
html_show_sourcelink = False


def find_by_last_name(
    app: Sphinx, env: BuildEnvironment, node: Any, content: Element
) -> Element | None:
    """Find what a docstring calls by its last name, as its module imports it."""
    if node.get("refdomain") != "py":
        return None
    wanted = f".{node['reftarget']}"
    objects = env.domains.python_domain.objects
    found = [name for name in objects if name.endswith(wanted) and not objects[name].aliased]
    if len(found) != 1:
        return None
    entry = objects[found[0]]
    source = node.get("refdoc", env.docname)
    return make_refnode(app.builder, source, entry.docname, entry.node_id, content, found[0])


def render_sections(app: Sphinx, what: str, *arguments: Any) -> None:
    """Convert the sections of Google-style docstrings, such as Args, to reStructuredText.

    Docstrings of attributes are left out: the napoleon extension would take the words before their
    first colon for a type.
    """
    if what != "attribute":
        name, value, options, lines = arguments
        config = Config(napoleon_use_ivar=True)
        lines[:] = GoogleDocstring(lines, config, app, what, name, value, options).lines()


def setup(app: Sphinx) -> None:
    """Register the functions above."""
    app.connect("autodoc-process-docstring", render_sections)
    app.connect("missing-reference", find_by_last_name)
