"""The findings of a check of the mask contract, as data and as text."""

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

CLAUSES: Mapping[str, str] = {
  "accepts": "The loss runs with the mask, in each transformation.",
  "invariance": "The content of a masked element never changes a result.",
  "zero_gradient": "Derivatives with respect to masked elements are 0.",
  "compaction": "The result is the loss of the data without masked elements.",
  "empty": "A slice with nothing included is 0.",
  "masked_label": "An example whose own class is masked is 0.",
  "identity": "A mask that masks nothing changes no number.",
  "honesty": "NaN and infinity in an included element are not cleaned.",
  "clean_arithmetic": "No NaN or infinity is computed because of a mask.",
  "transforms": "The same results under jit and vmap, of the same dtype.",
}

NOT_APPLICABLE = "does not apply"


@dataclasses.dataclass(frozen=True)
class Finding:
  """A way in which a loss breaks a clause, with one example of it.

  Attributes:
    clause: The clause, one of `CLAUSES`.
    message: The fault in a sentence, with the numbers.
    argument: Name of the argument at fault: the one whose masked elements get
      through, or whose derivative is wrong. None if the mask itself is at
      fault.
    element: Index of the element of `argument`, None for several elements.
    mask: The mask that was tried, in words.
    where: The same mask, as nested lists of booleans; None if it is large.
    poison: The content of the masked (for honesty: the included) element, such
      as `"nan"`. None if the data were clean.
    derivative: `"value"`, `"vjp"`, `"jvp"` or `"hessian"`.
    wrt: The argument that the derivative is with respect to. None for a value.
    transform: `"eager"`, `"jit"` or `"vmap"`.
    dtype: The dtype of the floating arguments.
    got: The number that came out, as text, or the error.
    expected: The number that was expected, as text.
    primitive: The operation of JAX in which the wrong number first arose.
    source: The line that called it, as `"file.py:12 in function"`, and the line
      of a library by way of which it did.
    code: The text of that line.
    cases: How many of the tried cases fail in this way.
  """

  clause: str
  message: str
  argument: str | None = None
  element: tuple[int, ...] | None = None
  mask: str | None = None
  where: Any = None
  poison: str | None = None
  derivative: str | None = None
  wrt: str | None = None
  transform: str | None = None
  dtype: str | None = None
  got: str | None = None
  expected: str | None = None
  primitive: str | None = None
  source: str | None = None
  code: str | None = None
  cases: int = 1

  @property
  def key(self) -> str:
    """The identifier in baselines, of which data and numbers are no part."""
    parts = [self.clause, self.argument, self.derivative, self.wrt, self.dtype]
    if self.clause == "transforms":
      parts.append(self.transform)
    return "/".join(part or "-" for part in parts)

  def to_dict(self) -> dict[str, Any]:
    """The attributes and the key, of types that JSON has."""
    return {"key": self.key, **dataclasses.asdict(self)}

  def __str__(self) -> str:
    lines = [f"{self.clause}: {CLAUSES[self.clause]}"]
    details = {
      "": self.message,
      "mask": self.mask,
      "tried": ", ".join(
        filter(None, (self.derivative, self.transform, self.dtype))
      ),
      "arose in": self.primitive
      and f"`{self.primitive}`" + (f" at {self.source}" if self.source else ""),
      "code": self.code,
      "fails in": _count_cases(self.cases),
    }
    for name, text in details.items():
      if text:
        lines.append(_wrapped(name, text))
    return "\n".join(lines)

  def summary(self) -> str:
    """The wrong derivative and its number, in a few words."""
    text = f"the {self.derivative or 'result'}"
    if self.wrt is not None:
      text += f" with respect to `{self.wrt}`"
    elif self.derivative not in (None, "value"):
      text = f"the value that comes with the {self.derivative}"
    tried = ", ".join(filter(None, (self.transform, self.dtype)))
    return f"{text} is {self.got} ({tried}, {_count_cases(self.cases)})"


def sort_by_clause(findings: Iterable[Finding]) -> tuple[Finding, ...]:
  """Findings in the order of their clauses."""
  order = list(CLAUSES)
  return tuple(sorted(findings, key=lambda f: order.index(f.clause)))


def _count_cases(number: int) -> str:
  return f"{number:,} case{'' if number == 1 else 's'}"


def _how_to_fix(
  broken: Sequence[str], arguments: Sequence[str]
) -> Iterator[str]:
  """Says how to fix a loss, or how to leave out the broken clauses."""
  if {"invariance", "zero_gradient"} & set(broken):
    yield _wrapped(
      "",
      "To fix the loss, replace masked elements before it computes anything,"
      " `x = jnp.where(where, x, 0)`, and once more replace the result where"
      " nothing is included; `optax_masking.masked_inputs` does both. A select"
      " or a product at the end alone leaves the gradient NaN.",
    ).strip()
    if arguments:
      listed = ", ".join(f"`{name}`" for name in arguments)
      entries = ", ".join(f"{name!r}: None" for name in arguments)
      yield _wrapped(
        "",
        f"If the mask is not about {listed}, as it is not about the parameters"
        " or the inputs of a model that reads them all, say so, of each:"
        f" axes={{{entries}}}.",
      ).strip()
  names = [clause for clause in broken if clause != "accepts"]
  if names:
    yield _wrapped(
      "",
      "To leave out a clause that the loss does not mean to keep:"
      f" skip=({', '.join(map(repr, names))},).",
    ).strip()


def _wrapped(name: str, text: str, width: int = 10) -> str:
  return textwrap.fill(
    text,
    78,
    initial_indent=f"  {name:{width}}" if name else "  ",
    subsequent_indent=" " * (width + 2) if name else "  ",
    break_long_words=False,
    break_on_hyphens=False,
  )


@dataclasses.dataclass(frozen=True)
class Report:
  """The result of a check of a loss.

  Attributes:
    name: The name of the loss.
    findings: The ways in which it breaks the contract, in the order of the
      clauses.
    clauses: For each clause that was asked for, `"kept"`, `"broken"`, or the
      reason why it could not be tried on this loss or does not apply to it.
    cases: How many results were compared.
    seconds: How long it took.
    data: The dtypes and shapes that the loss was called with.
    notes: Remarks on things that are no fault of the mask, such as a gradient
      that is NaN without one.
    strict: Whether a clause that could not be tried, or a serious note, is a
      failure.
    serious: Whether a note is serious, such as one on a gradient that is NaN.
  """

  name: str
  findings: tuple[Finding, ...]
  clauses: Mapping[str, str]
  cases: int
  seconds: float
  data: str = ""
  notes: tuple[str, ...] = ()
  strict: bool = False
  serious: bool = False

  @property
  def untried(self) -> dict[str, str]:
    """The clauses that could not be tried, and why."""
    return {
      clause: state
      for clause, state in self.clauses.items()
      if not state.startswith(("kept", "broken", NOT_APPLICABLE))
    }

  @property
  def ok(self) -> bool:
    """Whether nothing was found, and, if strict, all was tried."""
    if self.strict and (self.untried or self.serious):
      return False
    return not self.findings

  def to_dict(self) -> dict[str, Any]:
    """The attributes and `ok`, of types that JSON has."""
    return {
      "name": self.name,
      "ok": self.ok,
      "cases": self.cases,
      "seconds": round(self.seconds, 3),
      "data": self.data,
      "clauses": dict(self.clauses),
      "notes": list(self.notes),
      "strict": self.strict,
      "serious": self.serious,
      "findings": [finding.to_dict() for finding in self.findings],
    }

  def __str__(self) -> str:
    parts = [self._headline()]
    groups: dict[Any, list[Finding]] = {}
    for finding in self.findings:
      # A loss of other data is wrong as a whole, with all of its gradients.
      whole = finding.clause in ("compaction", "identity")
      argument = None if whole else finding.argument
      groups.setdefault((finding.clause, argument), []).append(finding)
    for first, *others in groups.values():
      lines = [str(first)]
      if others:
        also = "; ".join(other.summary() for other in others)
        lines.append(_wrapped("and", also))
      parts.append("\n".join(lines))
    if self.untried and self.clauses.get("accepts") != "broken":
      lines = [_wrapped(f"{c}:", why, 18) for c, why in self.untried.items()]
      parts.append("\n".join(["Could not be tried:", *lines]))
    parts += [_wrapped("", f"Note: {note}").strip() for note in self.notes]
    broken = list(dict.fromkeys(f.clause for f in self.findings))
    leaks = ("invariance", "zero_gradient")
    arguments = list(
      dict.fromkeys(
        f.argument
        for f in self.findings
        if f.clause in leaks and f.poison and f.argument
      )
    )
    return "\n\n".join([*parts, *_how_to_fix(broken, arguments)])

  def _headline(self) -> str:
    tried = f"{_count_cases(self.cases)} in {self.seconds:.1f} s"
    broken = list(dict.fromkeys(f.clause for f in self.findings))
    if broken:
      head = (
        f"{self.name} breaks {_count_clauses(len(broken))} of the mask contract"
        f" ({tried}): {', '.join(broken)}."
      )
    elif self.untried:
      kept = list(self.clauses.values()).count("kept")
      head = (
        f"{self.name} keeps {_count_clauses(kept)} of the mask contract"
        f" ({tried}); {len(self.untried)} could not be tried."
      )
    else:
      head = f"{self.name} keeps the mask contract ({tried})"
      head += "; see the notes." if self.serious else "."
    if self.data and not self.ok:
      head += f"\nThe check called it with {self.data}."
    return head


def _count_clauses(number: int) -> str:
  return f"{number} clause{'' if number == 1 else 's'}"
