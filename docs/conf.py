"""Sphinx: `make docs`. Needs the built package (docs/api comes from its docstrings) and no network."""

from unique_attn import __version__

project = "unique_attn"
author = "the authors of unique_attn"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "code"
add_module_names = False
maximum_signature_line_length = 100
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False  # not those of transformers and torch
autodoc_default_options = {"members": True, "show-inheritance": True}

# Names in docstrings must lead somewhere, but for those of other projects (their indexes are on the network) and for
# what signatures mention that has no page.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|np|numpy|npt|transformers|collections|typing|pathlib|contextlib|pybind11_builtins)\..*"),
    ("py:class", r"Tensor|Path|unique_attn\.(hf\.model\.Model|memory\.GrowingTensor|_checked\.CheckedConfig)"),
]
