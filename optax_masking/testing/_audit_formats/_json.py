"""An audit as JSON, for programs."""

import json
import math
from collections.abc import Mapping
from typing import Any

from optax_masking.testing._audit_formats._common import Audit


def json_text(audit: Audit) -> str:
  """One JSON object, for programs.

  Numbers that JSON does not have, such as NaN, are strings in it. Its keys:

    schema: 1, the version of this format. It grows if a key changes or goes; a
      program must ignore keys that it does not know.
    versions: The versions of the packages involved, by name.
    quick: Whether only part of the masks, dtypes and derivatives was tried.
    seconds: How long the audit took, null if that is not known.
    targets: For each target, its losses by name. Of each loss:
      name: The name of the loss.
      ok: Whether nothing was found.
      cases: How many results were compared.
      seconds: How long it took, in a process of its own.
      data: The dtypes and shapes that the loss was called with.
      clauses: For each clause that was asked for, "kept", "broken", or why it
        could not be tried on this loss. If it begins with "does not apply",
        nothing was to be tried.
      untried: The clauses that could not be tried, each with the reason.
      notes: Remarks on what is no fault of the mask, a list.
      strict: Whether a clause that was not tried, or a serious note, fails.
      serious: Whether a note is serious.
      findings: What breaks the contract, a list. Of each finding, null where
        it does not apply:
        key: The clause, `argument`, `derivative`, `wrt` and `dtype`, with a
          slash between them and "-" for null. It stays the same while the
          finding is known but not mended.
        clause: The clause, a key of `clauses`.
        message: What was found, in a sentence with the numbers.
        argument: Name of the argument at fault.
        element: Index of the element of `argument`, a list.
        mask: The mask that was tried, in words.
        where: The same mask, as nested lists of booleans.
        poison: What the masked element held.
        derivative: "value", "vjp", "jvp" or "hessian".
        wrt: With respect to which argument the derivative is.
        transform: "eager", "jit" or "vmap".
        dtype: The dtype of the floating arguments.
        got: The number that came out, or the error: a string.
        expected: The number that was expected, a string.
        primitive: The operation of JAX in which the wrong number arose.
        source: The line that called it, as "file.py:12 in function".
        code: The text of that line.
        cases: How many of the tried cases fail in this way.
    new: The findings that the baseline does not have, a sorted list of
      "TARGET/LOSS/KEY". null without a baseline.
    gone: The findings of the baseline that were not made, a list of the same.
    summary: The numbers of each target, by its name:
      losses: How many losses it has.
      clean: About how many of them nothing was found.
      without_where: How many take no mask. Each has one finding, "accepts".
      new_without_where: How many of these findings are new.
      findings: How many findings were made.
      new: How many of them are new, null without a baseline.
      cases: How many results were compared.
      seconds: The sum of the seconds of its losses, of which several may be
        checked at a time.
  """
  document = _to_json(_document(audit))
  return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _document(audit: Audit) -> dict[str, Any]:
  summaries = {}
  for target in audit.reports:
    numbers = audit.summary(target)._asdict()
    summaries[target] = {**numbers, "seconds": round(numbers["seconds"], 3)}
  return {
    "schema": 1,
    "versions": audit.versions,
    "quick": audit.quick,
    "seconds": audit.seconds and round(audit.seconds, 3),
    "targets": {
      target: {
        name: {**report.to_dict(), "untried": report.untried}
        for name, report in reports.items()
      }
      for target, reports in audit.reports.items()
    },
    "new": None if audit.new is None else sorted(audit.new),
    "gone": audit.gone,
    "summary": summaries,
  }


def _to_json(x: Any) -> Any:
  """The same in types that JSON has, a number that it has not as a string."""
  if isinstance(x, Mapping):
    return {str(key): _to_json(value) for key, value in x.items()}
  if isinstance(x, list | tuple):
    return [_to_json(value) for value in x]
  if hasattr(x, "tolist"):
    return _to_json(x.tolist())
  if isinstance(x, float) and not math.isfinite(x):
    return str(x)
  return x if x is None or isinstance(x, bool | int | float | str) else str(x)
