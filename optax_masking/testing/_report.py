"""What a check of the mask contract found, as data and as text."""

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

CLAUSES: Mapping[str, str] = {
  "accepts": "The loss runs with the mask, in each transformation.",
  "invariance": "What a masked element holds never changes a result.",
  "zero_gradient": "Derivatives with respect to masked elements are 0.",
  "compaction": "The rest is the loss of the data without what is masked.",
  "empty": "A slice with nothing included is 0.",
  "masked_label": "An example whose own class is masked is 0.",
  "identity": "A mask that masks nothing changes no number.",
  "honesty": "NaN and infinity in an included element are not cleaned.",
  "clean_arithmetic": "No NaN or infinity is computed because of a mask.",
  "transforms": "The same results under jit and vmap, of the same dtype.",
}


@dataclasses.dataclass(frozen=True)
class Finding:
  """A way in which a loss breaks a clause, with one example of it.

  Attributes:
    clause: The clause, one of `CLAUSES`.
    message: What was found, in a sentence with the numbers.
    argument: Name of the argument at fault: the one whose masked elements get
      through, or whose derivative is wrong. None if it is the mask itself.
    element: Index of the element of `argument`, None if it is not one alone.
    mask: The mask that was tried, in words.
    where: The same mask, as nested lists of booleans.
    poison: What the masked (for honesty: the included) element held, such as
      `"nan"`. None if the data was clean.
    derivative: `"value"`, `"vjp"`, `"jvp"` or `"hessian"`.
    wrt: With respect to which argument the derivative is. None for a value.
    transform: `"eager"`, `"jit"` or `"vmap"`.
    dtype: The dtype of the floating arguments.
    got: The number that came out, as text, or the error.
    expected: The number that was expected, as text.
    primitive: The operation of JAX in which the wrong number first arose.
    source: The line that called it, as `"file.py:12 in function"`.
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
    """What stays the same while the finding is known but not mended."""
    parts = (self.clause, self.argument, self.derivative, self.wrt, self.dtype)
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
      "fails in": _cases(self.cases),
    }
    for name, text in details.items():
      if text:
        lines.append(_wrapped(name, text))
    return "\n".join(lines)

  def told_briefly(self) -> str:
    """Which derivative is wrong, in a few words."""
    text = f"the {self.derivative or 'result'}"
    if self.wrt is not None:
      text += f" with respect to `{self.wrt}`"
    tried = ", ".join(filter(None, (self.transform, self.dtype)))
    return f"{text} is {self.got} ({tried}, {_cases(self.cases)})"


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
  """Findings in the order of their clauses."""
  order = list(CLAUSES)
  return tuple(sorted(findings, key=lambda f: order.index(f.clause)))


def _cases(number: int) -> str:
  return f"{number:,} case{'' if number == 1 else 's'}"


def _advice(broken: Sequence[str]) -> Iterator[str]:
  """How to go on."""
  if {"invariance", "zero_gradient"} & set(broken):
    yield _wrapped(
      "",
      "To mend it, replace what is masked before anything is computed of it,"
      " `x = jnp.where(where, x, 0)`, and the result once more where nothing is"
      " included; `optax_masking.masked_inputs` does both. A select or a"
      " product at the end alone leaves the gradient NaN.",
    ).strip()
  names = [clause for clause in broken if clause != "accepts"]
  if names:
    yield _wrapped(
      "",
      "A clause that the loss does not mean to keep may be left out:"
      f" skip=({', '.join(map(repr, names))},).",
    ).strip()


def _wrapped(name: str, text: str) -> str:
  return textwrap.fill(
    text,
    78,
    initial_indent=f"  {name:10}" if name else "  ",
    subsequent_indent=" " * 12 if name else "  ",
    break_long_words=False,
    break_on_hyphens=False,
  )


@dataclasses.dataclass(frozen=True)
class Report:
  """What a check of a loss found.

  Attributes:
    name: The name of the loss.
    findings: What breaks the contract, the clauses in their order.
    clauses: For each clause that was asked for, `"kept"`, `"broken"`, or why
      it could not be tried on this loss.
    cases: How many results were compared.
    seconds: How long it took.
    data: The dtypes and shapes that it was called with.
  """

  name: str
  findings: tuple[Finding, ...]
  clauses: Mapping[str, str]
  cases: int
  seconds: float
  data: str = ""

  @property
  def ok(self) -> bool:
    """Whether nothing was found."""
    return not self.findings

  def to_dict(self) -> dict[str, Any]:
    """The attributes, of types that JSON has."""
    return {
      "name": self.name,
      "ok": self.ok,
      "cases": self.cases,
      "seconds": round(self.seconds, 3),
      "data": self.data,
      "clauses": dict(self.clauses),
      "findings": [finding.to_dict() for finding in self.findings],
    }

  def __str__(self) -> str:
    tried = f"{self.cases:,} cases in {self.seconds:.1f} s"
    if self.ok:
      return f"{self.name} keeps the mask contract ({tried})."
    broken = list(dict.fromkeys(f.clause for f in self.findings))
    plural = "clause" if len(broken) == 1 else "clauses"
    head = (
      f"{self.name} breaks {len(broken)} {plural} of the mask contract"
      f" ({tried}): {', '.join(broken)}."
    )
    if self.data:
      head += f"\nIt was called with {self.data}."
    groups: dict[Any, list[Finding]] = {}
    for finding in self.findings:
      groups.setdefault((finding.clause, finding.argument), []).append(finding)
    texts = []
    for first, *others in groups.values():
      lines = [str(first)]
      if others:
        also = "; ".join(other.told_briefly() for other in others)
        lines.append(_wrapped("and", also))
      texts.append("\n".join(lines))
    return "\n\n".join([head, *texts, *_advice(broken)])
