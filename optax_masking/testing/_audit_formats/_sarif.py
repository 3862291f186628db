"""An audit as SARIF 2.1.0, for GitHub's code scanning and other viewers."""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from optax_masking.testing._audit_formats._common import (
  Audit,
  identify,
  join_unique,
  notes_of_losses,
  spell_out,
)
from optax_masking.testing._audit_formats._github import relative
from optax_masking.testing._report import CLAUSES, Finding

_SCHEMA = (
  "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/"
  "sarif-schema-2.1.0.json"
)
_FINGERPRINT = "optaxMaskingFinding/v1"


def sarif(audit: Audit) -> str:
  """One JSON object, in which the rules are the clauses.

  A finding is an error, and a note if the baseline knows it. Its fingerprint is
  its name in a baseline. Its place is the line at fault, or else that where the
  loss is defined, if the file lies in the working directory. Other findings
  have a logical location alone. GitHub refuses a file with one of these, so
  upload the audit of losses of the repository, and not that of Optax.
  """
  driver: dict[str, Any] = {
    "name": "optax-masking",
    "rules": [_rule(clause) for clause in CLAUSES],
  }
  version = audit.versions.get("optax_masking")
  if version:
    driver["version"] = spell_out(version)
  run = {
    "tool": {"driver": driver},
    "columnKind": "unicodeCodePoints",
    "invocations": [
      {
        "executionSuccessful": True,
        "toolExecutionNotifications": list(_notifications(audit)),
      }
    ],
    "results": [
      _result(audit, target, name, finding)
      for target, reports in audit.reports.items()
      for name, report in reports.items()
      for finding in report.findings
    ],
    "properties": {
      "quick": audit.quick,
      "versions": {
        spell_out(k): spell_out(v) for k, v in audit.versions.items()
      },
    },
  }
  document = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}
  return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _rule(clause: str) -> dict[str, Any]:
  words = clause.split("_")
  return {
    "id": clause,
    "name": "".join(word.capitalize() for word in words),
    "shortDescription": {"text": CLAUSES[clause]},
    "fullDescription": {"text": CLAUSES[clause]},
    "defaultConfiguration": {"level": "error"},
    "properties": {"tags": ["correctness", "mask"]},
  }


def _result(
  audit: Audit, target: str, name: str, finding: Finding
) -> dict[str, Any]:
  known = audit.new is not None and not audit.is_new(target, name, finding)
  circumstances = join_unique(
    ", ", finding.derivative, finding.transform, finding.dtype
  )
  lines = [
    f"{name}: {finding.message}",
    finding.mask and f"Mask: {finding.mask}.",
    circumstances and f"Tried: {circumstances}.",
  ]
  result: dict[str, Any] = {
    "ruleId": finding.clause,
    "ruleIndex": list(CLAUSES).index(finding.clause),
    "level": "note" if known else "error",
    "message": {"text": spell_out("\n".join(filter(None, lines)))},
    "locations": [_location(audit, target, name, finding)],
    "partialFingerprints": {
      _FINGERPRINT: spell_out(identify(target, name, finding))
    },
  }
  if audit.new is not None:
    result["baselineState"] = "unchanged" if known else "new"
  return result


def _location(
  audit: Audit, target: str, name: str, finding: Finding
) -> dict[str, Any]:
  logical = spell_out(f"{target}/{name}")
  location: dict[str, Any] = {
    "logicalLocations": [
      {
        "name": spell_out(name),
        "fullyQualifiedName": logical,
        "kind": "function",
      }
    ]
  }
  definition = audit.definitions.get(target, {}).get(name)
  for source in (finding.source, definition):
    place = _place_inside(source or "")
    if place is not None:
      return {"physicalLocation": place, **location}
  return location


def _place_inside(source: str) -> Mapping[str, Any] | None:
  """The first place of a source that is in the working directory."""
  for part in source.split(", by way of "):
    match = re.match(r"(.+?):(\d+)(?= in |, |$)", part)
    if match and int(match[2]) > 0:
      path = pathlib.PurePosixPath(relative(match[1]))
      if not path.is_absolute() and pathlib.Path(path).is_file():
        uri = quote(spell_out(str(path)))
        return {
          "artifactLocation": {"uri": uri, "uriBaseId": "%SRCROOT%"},
          "region": {"startLine": int(match[2])},
        }
  return None


def _notifications(audit: Audit) -> Iterator[dict[str, Any]]:
  """The notes of the checks, each once."""
  for target, reports in audit.reports.items():
    for note, names in notes_of_losses(reports).items():
      text = f"{target}, {', '.join(names)}: {note}"
      yield {"level": "note", "message": {"text": spell_out(text)}}
