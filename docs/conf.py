"""Sphinx configuration; build with `nox -s docs`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sphinx.util.inspect import stringify_signature

import alm_torchrl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipes are not installed
from recipes.option_help import markdown_table

project = "alm_torchrl"
author = "alm_torchrl contributors"
copyright = f"2026, {author}"
release = version = alm_torchrl.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
# Links to the documentation of torch and Python need the network, so they are optional.
if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "torchrl": ("https://docs.pytorch.org/rl/stable", None),
        "tensordict": ("https://docs.pytorch.org/tensordict/stable", None),
    }

exclude_patterns = ["_build"]
myst_enable_extensions = [
    "amsmath",
    "colon_fence",
    "deflist",
    "dollarmath",
    "fieldlist",
    "substitution",
]
myst_substitutions = {"options": markdown_table()}
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# The API pages are generated from docstrings, and types from signatures.
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# References to public names of this package must resolve; names of other packages need not.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!alm_torchrl).*|.*\._.*|.*\.StackedNoise")]

html_theme = "furo"
html_title = "alm_torchrl"
# MathJax is part of the site, so that the pages render without the network.
_mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
html_static_path = ["_static", str(_mathjax / "tex-svg.js")]
mathjax_path = "tex-svg.js"
html_css_files = ["custom.css"]
html_show_sphinx = False


def _public_name(target: str) -> str | None:
    """Returns the documented name of an object that is referenced by its defining module."""
    package, _, name = target.rpartition(".")
    while package.count("."):
        package = package.rpartition(".")[0]
        if name in getattr(importlib.import_module(package), "__all__", ()):
            return f"{package}.{name}"
    return None


def _resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Resolves `alm_torchrl.modules.latent.X` to the documented `alm_torchrl.modules.X`."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("alm_torchrl."):
        return None
    public = _public_name(target)
    if public is None:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], public, node, contnode
    )


def _signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Shows the constructor of a class whose metaclass takes `(*args, **kwargs)`."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
    return stringify_signature(inspect.Signature(parameters), show_annotation=False), returns


def _public_bases(base: Any) -> list[Any]:
    """Returns a base class, or the public bases of an internal one."""
    module = getattr(base, "__module__", "")
    internal = module.startswith("alm_torchrl.") and (
        _public_name(f"{module}.{base.__name__}") is None
    )
    if not internal:
        return [] if base is object else [base]
    return [public for parent in base.__bases__ for public in _public_bases(parent)]


def _documented_bases(app: Any, name: str, obj: Any, options: Any, bases: list[Any]) -> None:
    """Replaces internal base classes, such as `AfterUpdate`, by their public bases."""
    public = dict.fromkeys(found for base in bases for found in _public_bases(base))
    bases[:] = public or [object]


def _no_inline_type(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Stops napoleon from reading the words before a colon in a summary as a type."""
    if what in ("property", "attribute"):
        lines[:0] = ["..", ""]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _no_inline_type, priority=400)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-bases", _documented_bases)
    app.connect("missing-reference", _resolve)
