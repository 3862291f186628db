"""Sphinx: `python -m sphinx -W -b html docs docs/_build/html`."""

import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generated  # noqa: E402

import optax_masking  # noqa: E402

project = "optax_masking"
author = "optax_masking contributors"
copyright = "optax_masking contributors, Apache License 2.0"
version = release = optax_masking.__version__

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.mathjax",
  "sphinx_copybutton",
]
exclude_patterns = ["_build", "_generated"]
nitpicky = True
# Names in the signatures, of which neither Python nor this site has a page.
nitpick_ignore_regex = [("py:.*", r"(?!optax_masking\.[a-z]).*|.*\._.*")]

myst_enable_extensions = ["attrs_block", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # The changelog begins with its own title.

default_role = "code"  # As docstrings of the guard write it.
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Names instead of the unions that they stand for.
autodoc_type_aliases = {
  name: name.rpartition(".")[2]
  for name in (
    "Array",
    "Axes",
    "Axis",
    "AxisName",
    "Fill",
    "Shape",
    "Where",
    "jax.typing.ArrayLike",
    "jax.typing.DTypeLike",
  )
}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 70
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# They lead somewhere when the repository has an owner.
linkcheck_ignore = [r"https://github\.com/OWNER/.*"]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "optax_masking"
html_static_path = ["_static", "_generated/static"]
html_css_files = ["tables.css"]
mathjax_path = "mathjax/tex-chtml.js"  # A copy: formulas need no network.
html_extra_path = ["_generated/extra"]
html_show_sphinx = False


def short_names(app, what, name, obj, options, signature, returns):
  """Writes a name in a union, or a function, by its name alone."""
  del app, what, name, obj, options
  long = r"TypeAliasForwardRef\('([\w.]+)'\)|<function (\w+)>"
  return tuple(
    text and re.sub(long, lambda match: match[1] or match[2], text)
    for text in (signature, returns)
  )


def setup(app):
  app.connect("config-inited", lambda app, config: generated.write_all())
  app.connect("autodoc-process-signature", short_names)
