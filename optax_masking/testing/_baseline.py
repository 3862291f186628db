"""The baseline of an audit: a file of known findings."""

import json
import os
import pathlib
from collections.abc import Mapping, Set
from typing import Any

from optax_masking._output import UsageError


def read_baseline(file: str, quick: bool) -> frozenset[str]:
  """The findings in a baseline, as `identify` names them.

  Raises:
    UsageError: If the file is no baseline, or is that of another kind of audit.
  """
  try:
    content = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
    wrong = _wrong(content)
  except FileNotFoundError:
    raise UsageError(
      f"there is no {file}; write it with --baseline {file} --update-baseline"
    ) from None
  except (OSError, ValueError) as error:
    wrong = f"{type(error).__name__}: {error}"
    if os.path.isdir(file):
      wrong = "it is a folder"
  if wrong:
    raise UsageError(
      f"{file} is no baseline ({wrong}); write one with --baseline FILE"
      " --update-baseline"
    )
  if content["quick"] != quick:
    audit, use = ("quick", "with") if content["quick"] else ("full", "without")
    raise UsageError(
      f"{file} is the baseline of a {audit} audit; use it {use} --quick"
    )
  return frozenset(content["findings"])


def _wrong(content: Any) -> str | None:
  """Why the content of a file is no baseline; None if it is one."""
  if not isinstance(content, dict):
    return f"it is a JSON {type(content).__name__}, not an object"
  if content.get("schema") != 1:
    return "its `schema` is not 1"
  if not isinstance(content.get("quick"), bool):
    return "its `quick` is neither true nor false"
  findings = content.get("findings")
  if not isinstance(findings, list):
    return "its `findings` is no list"
  for finding in findings:
    if not isinstance(finding, str):
      return f"its `findings` has {json.dumps(finding)}, which is no string"
  return None


def write_baseline(file: str, found: Set[str], quick: bool) -> None:
  """Writes a baseline of all findings of an audit.

  Raises:
    UsageError: If the file can't be written.
  """
  content: Mapping[str, object] = {
    "schema": 1,
    "quick": quick,
    "findings": sorted(found),
  }
  text = json.dumps(content, indent=2) + "\n"
  try:
    pathlib.Path(file).write_text(text, encoding="utf-8")
  except OSError as error:
    raise UsageError(f"{file} can't be written: {error}") from error
