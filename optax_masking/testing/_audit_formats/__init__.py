"""An audit as text, Markdown, JSON, SARIF, annotations or a page.

Each format is a function of an `Audit`. The text that it returns ends with a
newline, or is empty. Names, messages and sources are data: each format escapes
them, so that no character of theirs ends a line, a cell or an element early.
"""

from optax_masking.testing._audit_formats._common import (
  Audit as Audit,
  identify as identify,
)
from optax_masking.testing._audit_formats._github import github as github
from optax_masking.testing._audit_formats._json import json_text as json_text
from optax_masking.testing._audit_formats._markdown import markdown as markdown
from optax_masking.testing._audit_formats._sarif import sarif as sarif
from optax_masking.testing._audit_formats._text import text as text


def html(audit: Audit) -> str:
  """A page in one file; see `_page.py`. Only this format needs Jinja2."""
  from optax_masking.testing._audit_formats import _page

  return _page.html(audit)
