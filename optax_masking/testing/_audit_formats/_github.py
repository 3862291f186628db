"""An audit as annotations of the lines at fault, in a workflow of GitHub."""

import os
import pathlib
import re

from optax_masking.testing._audit_formats._common import (
  Audit,
  FindingGroup,
  join_unique,
  spell_out,
)
from optax_masking.testing._report import CLAUSES


def github(audit: Audit) -> str:
  """Workflow commands that annotate the lines at fault.

  Findings are errors; those that a baseline knows, and those of it that are
  gone, are notices. Errors come first, since GitHub shows only the first ten.
  """
  errors: list[str] = []
  notices: list[str] = []
  for target in audit.reports:
    for name in audit.reports[target]:
      for group in audit.finding_groups(target, name, by_source=True):
        title = f"{target} {name}: {group.first.clause}"
        if audit.new is None or group.new:
          errors.append(_command("error", title, group))
        else:
          notices.append(_command("notice", title, group))
  if audit.gone:
    title = _escape_property("No longer found, of the baseline")
    message = _escape("\n".join(audit.gone))
    notices.append(f"::notice title={title}::{message}")
  return "".join(f"{line}\n" for line in errors + notices)


def _command(kind: str, title: str, group: FindingGroup) -> str:
  """The command that annotates the line of a finding, if that is known."""
  first = group.first
  properties = {"title": title}
  place = re.match(r"(.+?):(\d+)(?= in |, |$)", first.source or "")
  if place:
    file, number = place.groups()
    properties = {"file": relative(file), "line": number, **properties}
  escaped = (f"{k}={_escape_property(v)}" for k, v in properties.items())
  lines = [
    first.message,
    join_unique(" · ", group.circumstances, group.others),
    f"{first.clause}: {CLAUSES[first.clause]}",
  ]
  message = "\n".join(filter(None, lines))
  return f"::{kind} {','.join(escaped)}::{_escape(message)}"


def relative(file: str) -> str:
  """The path from the working directory, if it is below."""
  path = pathlib.Path(os.path.abspath(file))
  here = pathlib.Path.cwd()
  if path.is_relative_to(here):
    return path.relative_to(here).as_posix()
  return pathlib.Path(file).as_posix()


def _escape(text: str) -> str:
  text = spell_out(text, keep="\n\r\t").replace("%", "%25")
  return text.replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
  return _escape(text).replace(":", "%3A").replace(",", "%2C")
