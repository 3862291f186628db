"""The state of a checkout of Optax, and descriptions of pull requests."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import (
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any

import optax_masking
from optax_masking.losses._table import ROWS
from optax_masking.testing import CLAUSES
from optax_masking.upstream import _staging, _wrappers
from optax_masking.upstream._staging import Checkout, StagingError

# Issues of https://github.com/google-deepmind/optax: what a masked loss does
# about each, and the losses that it is about.
_GITHUB_ISSUES: Mapping[int, tuple[str, tuple[str, ...]]] = {
  902: (
    "Part of #{}, which asked for `axis` and `where`.",
    (
      "convex_kl_divergence",
      "cosine_distance",
      "cosine_similarity",
      "kl_divergence",
      "sigmoid_focal_loss",
      "softmax_cross_entropy",
      "softmax_cross_entropy_with_integer_labels",
    ),
  ),
  1335: (
    "Follows #{}, which was about masks of examples: with a mask of classes the"
    " gradient was still not that of one-hot labels.",
    ("softmax_cross_entropy_with_integer_labels",),
  ),
  1762: (
    "Related to #{}, about logits of minus infinity. With `where` a masked"
    " logit may be infinite; an included one is as it was.",
    ("safe_softmax_cross_entropy",),
  ),
  1786: (
    "Related to #{}, about targets of 0. With `where` a masked target may be 0;"
    " an included one is as it was.",
    (
      "generalized_kl_divergence",
      "kl_divergence",
      "kl_divergence_with_log_targets",
    ),
  ),
}

# Audits the Optax of the folder `argv[1]`, which PYTHONPATH names first.
_AUDIT_SCRIPT = """
import pathlib, sys
import optax
if not pathlib.Path(optax.__file__).resolve().is_relative_to(sys.argv[1]):
  sys.exit(f"{optax.__file__} was imported, not the Optax in {sys.argv[1]}")
from optax_masking._command import main
sys.exit(main(sys.argv[2:]))
"""


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the audit finds in one loss.

  Attributes:
    kept: The clauses of the contract that the loss keeps.
    broken: The clauses that the loss breaks.
    nan_gradients: Whether a derivative of the loss is NaN.
    message: The first finding about a NaN gradient, or else the first finding.
  """

  kept: tuple[str, ...]
  broken: tuple[str, ...]
  nan_gradients: bool
  message: str

  @classmethod
  def from_report(cls, report: Mapping[str, Any]) -> "Verdict":
    """Sums up the JSON report of a loss."""
    clauses = report["clauses"]
    findings = report["findings"]
    nan = [
      f
      for f in findings
      if f["derivative"] not in (None, "value") and "nan" in (f["got"] or "")
    ]
    messages = [f["message"] for f in (*nan, *findings)]
    return cls(
      tuple(c for c in CLAUSES if clauses.get(c) == "kept"),
      tuple(c for c in CLAUSES if clauses.get(c) == "broken"),
      bool(nan),
      next(iter(messages), ""),
    )

  @property
  def keeps_contract(self) -> bool:
    return not self.broken

  @property
  def runs_with_where(self) -> bool:
    return "accepts" not in self.broken


def verdicts(root: pathlib.Path, names: Sequence[str]) -> dict[str, Verdict]:
  """Audits losses of the Optax in a folder, in another process.

  Raises:
    StagingError: If this Optax can't be imported or audited.
  """
  if not names:
    return {}
  package = pathlib.Path(__file__).parents[2]
  path = [str(root), str(package), os.environ.get("PYTHONPATH", "")]
  environment = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, path)),
    "PYTHONDONTWRITEBYTECODE": "1",
  }
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "audit.json")
    command = [sys.executable, "-c", _AUDIT_SCRIPT, str(root), "audit"]
    command += ["--quick", "--format", "json", "--output", str(file), "optax"]
    command += [f"--loss={name}" for name in names]
    done = subprocess.run(command, env=environment, cwd=folder, check=False)
    if done.returncode not in (0, 1) or not file.is_file():
      raise StagingError(f"The Optax in {root} can't be audited (see above).")
    reports = json.loads(file.read_text(encoding="utf-8"))["targets"]["optax"]
  return {name: Verdict.from_report(reports[name]) for name in names}


def find_fixed(checkout: Checkout, names: Sequence[str]) -> list[str]:
  """The losses, of some, that keep the mask contract in a checkout."""
  found = verdicts(checkout.root, names)
  return [name for name, verdict in found.items() if verdict.keeps_contract]


# The state of a checkout.


@dataclasses.dataclass(frozen=True)
class _Plan:
  """What a stage would do with each loss of a checkout, in words."""

  to_stage: dict[str, str] = dataclasses.field(default_factory=dict)
  nothing_to_do: dict[str, str] = dataclasses.field(default_factory=dict)
  not_understood: dict[str, str] = dataclasses.field(default_factory=dict)


def status(checkout: Checkout) -> str:
  """Lists what each loss of a checkout has, and the pull requests to make."""
  present = [n for n in _wrappers.LOSSES if checkout.loss(n) is not None]
  found = verdicts(checkout.root, present)
  has = {
    name: checkout.mask_parameters(name)
    | ({"where"} if found[name].runs_with_where else set())
    for name in present
  }
  plan = _plan(checkout, found, has)
  counts = {
    "Losses": len(present),
    "With `axis` and `where`": sum(len(has[n]) == 2 for n in present),
    "Without a finding": sum(found[n].keeps_contract for n in present),
    "Staged": sum(checkout.is_staged(n) for n in present),
  }
  lines = [
    f"Optax {checkout.optax_version} in {checkout.root}",
    " ".join(f"{label}: {count}." for label, count in counts.items()),
    *_pull_requests(plan.to_stage, found, has),
  ]
  for heading, reasons in (
    ("Nothing to make", plan.nothing_to_do),
    ("Not understood", plan.not_understood),
  ):
    lines += ["", f"{heading}: {len(reasons)}"] if reasons else []
    for name, why in reasons.items():
      lines += [f"     {name}", *_indented(" " * 13, why)]
  if plan.to_stage:
    first = min(plan.to_stage, key=lambda name: _urgency(found[name]))
    lines += [
      "",
      f"To make one: optax-masking stage CHECKOUT --loss {first}",
      "To describe it: the same command with --message. The first pull request",
      "brings the module and the tests that later ones add to.",
    ]
  return "\n".join(lines) + "\n"


def _plan(
  checkout: Checkout,
  found: Mapping[str, Verdict],
  has: Mapping[str, Collection[str]],
) -> _Plan:
  """Tries to stage each loss of a checkout.

  Args:
    checkout: The checkout.
    found: The verdicts on its losses.
    has: Which of `axis` and `where` each loss has.
  """
  plan = _Plan()
  for name in _wrappers.LOSSES:
    try:
      staging = _staging.stage(
        checkout,
        [name],
        lambda names: [n for n in names if found[n].keeps_contract],
      )
    except StagingError as error:
      called = _comma_separated(
        f"{n}: {why}" for n, why in error.reasons.items()
      )
      plan.not_understood[name] = (
        error.reasons.get(name) or called or str(error)
      )
      continue
    if name in staging.skipped:
      plan.nothing_to_do[name] = staging.skipped[name]
      continue
    module = f"optax/{_wrappers.module_of(name)}.py"
    (change,) = (c for c in staging.changes if c.file == module)
    added = _comma_separated(sorted({"axis", "where"} - {*has[name]}))
    others = _comma_separated(n for n in staging.losses if n != name)
    plan.to_stage[name] = f"adds {added or 'the contract'}: {change}" + (
      f", and to {others}" if others else ""
    )
  return plan


def _urgency(verdict: Verdict) -> int:
  """The index of the heading of `_pull_requests` for a loss."""
  if verdict.nan_gradients:
    return 0
  return 1 if verdict.runs_with_where else 2


def _pull_requests(
  to_stage: Mapping[str, str],
  found: Mapping[str, Verdict],
  has: Mapping[str, Collection[str]],
) -> Iterator[str]:
  """Lists pull requests, those that fix NaN gradients first.

  Args:
    to_stage: What a stage does with each of the losses to list.
    found: The verdicts on the losses.
    has: Which of `axis` and `where` each loss has.
  """
  number = 0
  headings = ("fix NaN gradients", "fix wrong numbers", "add `where`")
  for urgency, heading in enumerate(headings):
    names = [name for name in to_stage if _urgency(found[name]) == urgency]
    if names:
      yield from ("", f"Pull requests that {heading}: {len(names)}")
    for name in names:
      number += 1
      verdict = found[name]
      broken = verdict.broken if verdict.runs_with_where else ()
      facts = {
        "has": _comma_separated(sorted(has[name])) or "neither axis nor where",
        "keeps": _comma_separated(c for c in verdict.kept if c != "accepts"),
        "breaks": _comma_separated(broken),
        "stage": to_stage[name],
      }
      yield f"{number:3}. {name}"
      for label, text in facts.items():
        yield from _indented(f"     {label:8}", text)


def _comma_separated(texts: Iterable[str]) -> str:
  return ", ".join(texts)


def _indented(label: str, text: str) -> list[str]:
  return textwrap.wrap(
    text, 80, initial_indent=label, subsequent_indent=" " * 13
  )


# The description of a pull request.


def message(checkout: Checkout, names: Sequence[str], base: str) -> str:
  """Describes a pull request, with an audit before it and one after it.

  Args:
    checkout: The checkout. It stays as it is.
    names: The losses. Those that are staged already are described as they are
      in the checkout; the message describes the others as a stage makes them.
    base: The commit without the losses that are staged already.
  """
  names = names or _wrappers.LOSSES
  with contextlib.ExitStack() as stack:
    staging = _staging.stage(
      checkout, names, functools.partial(find_fixed, checkout)
    )
    staged = [
      name
      for name in _wrappers.with_called_losses(names)
      if checkout.is_staged(name) and name not in _wrappers.ALIASES
    ]
    losses = sorted({*staging.losses, *staged})
    if not losses:
      raise StagingError(
        "There is nothing to describe: "
        + "; ".join(f"{n}: {why}" for n, why in staging.skipped.items())
      )
    before = after = checkout
    if staged:
      before = stack.enter_context(_checkout_of_commit(checkout, staged, base))
    if staging.losses:
      root = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
      ignored = shutil.ignore_patterns("__pycache__")
      shutil.copytree(checkout.root / "optax", root / "optax", ignore=ignored)
      staging.write(root)
      after = Checkout.at(root)
    return _description(before, after, losses)


@contextlib.contextmanager
def _checkout_of_commit(
  checkout: Checkout, staged: Sequence[str], base: str
) -> Iterator[Checkout]:
  """Extracts the commit `base`, without the staged losses, to a folder."""
  names = _comma_separated(staged)
  git = ["git", "-C", str(checkout.root), "archive", "--format=zip", base]
  try:
    done = subprocess.run([*git, "optax"], capture_output=True, check=True)
  except (OSError, subprocess.CalledProcessError) as error:
    git_error = getattr(error, "stderr", None) or str(error).encode()
    raise StagingError(
      f"{names}: staged already, and git can't read the commit {base} of"
      f" {checkout.root}: {git_error.decode().strip()}"
    ) from None
  with tempfile.TemporaryDirectory() as folder:
    with zipfile.ZipFile(io.BytesIO(done.stdout)) as archive:
      archive.extractall(folder)
    found = Checkout.at(folder)
    names = _comma_separated(name for name in staged if found.is_staged(name))
    if names:
      raise StagingError(
        f"{names}: staged already in {base} of {checkout.root}. Name a commit"
        " before it with --base."
      )
    yield found


# Changes for losses that had a `where` before.
_LOWER_RANK_CHANGE = (
  "A `where` of lower rank has one entry an example. A mask that NumPy would"
  " broadcast from the last axis, such as one of shape `[C]` for data of shape"
  " `[B, C]`, is an error, which names the index to write."
)
_CHANGED_BEHAVIOR: Mapping[str, str] = {
  "cosine_distance": (
    "A vector with nothing included has distance 0, and not 1."
  ),
  "smooth_labels": (
    "A masked class is 0, and alpha is spread over the included ones."
  ),
  "softmax_cross_entropy_with_integer_labels": (
    "An example whose own class is masked has loss 0, as with one-hot labels."
  ),
}


def _description(
  before: Checkout, after: Checkout, names: Sequence[str]
) -> str:
  """The title and, in Markdown, the text of a pull request."""
  added = {
    name: {"axis", "where"}
    if ROWS[name].makes_loss
    else after.mask_parameters(name) - before.mask_parameters(name)
    for name in names
  }
  had_where = [name for name in names if "where" not in added[name]]
  arguments = sorted(set().union(*added.values()))
  title = (
    f"Add {' and '.join(arguments)} to"
    if arguments
    else "Keep masked elements out of the derivatives of"
  )
  title += f" {' and '.join(names) if len(names) < 4 else 'losses'}"
  subject = "the loss is" if len(names) == 1 else "the losses are"
  paragraphs = [
    title,
    "`where` selects the elements that count. The other elements, be they the"
    " NaN or the garbage of padding, change no value and no derivative. Their"
    " own gradient is exactly 0, and so is the result where nothing is"
    " included. A select from the result of an unmasked loss is not enough: in"
    " the backward pass `0 * nan` is NaN.",
    "`axis` means the same as in `jnp.sum`. `where` is boolean, and has the"
    " rank of the data, or that rank less `axis`: one entry an example. Without"
    f" both {subject} the same program as before: the jaxprs are equal.",
  ]
  if arguments and had_where:
    paragraphs.append(
      "\n".join(
        f"- {_code_list([name])} gets"
        f" {_code_list(sorted(added[name])) or 'no new argument'}."
        for name in names
      )
    )
  paragraphs += _behavior_section(names, had_where)
  paragraphs += _audit_section(
    verdicts(before.root, names), verdicts(after.root, names)
  )
  issues = [
    f"- {text.format(number)}"
    for number, (text, losses) in _GITHUB_ISSUES.items()
    if {*names} & {*losses}
  ]
  if issues:
    paragraphs += ["## Issues", "\n".join(issues)]
  paragraphs += ["## How", *_file_section(before, after, names)]
  return "\n\n".join(paragraphs) + "\n"


def _behavior_section(
  names: Sequence[str], had_where: Sequence[str]
) -> list[str]:
  """The results that change for code that has a mask already.

  Args:
    names: The losses.
    had_where: Those that had a `where` before.
  """
  lines = [
    f"- `{n}`: {_CHANGED_BEHAVIOR[n]}" for n in names if n in _CHANGED_BEHAVIOR
  ]
  refusing = [n for n in had_where if _wrappers.refuses_ambiguous_where(n)]
  if refusing:
    lines.append(f"- {_code_list(refusing)}: {_LOWER_RANK_CHANGE}")
  if not lines:
    return []
  return ["## Behavior that changes, with a mask", "\n".join(lines)]


def _audit_section(
  before: Mapping[str, Verdict], after: Mapping[str, Verdict]
) -> Iterator[str]:
  """The verdicts before and after, with an example of each loss."""
  yield "## Before and after"
  yield (
    "The findings of `optax-masking audit --quick`, of the package"
    f" optax_masking {optax_masking.__version__}. The audit tries many masks,"
    " with NaN, infinities and the largest numbers in the masked elements, in"
    " float32, and checks values and reverse-mode gradients."
  )
  rows = [
    f"| `{name}` | {_verdict_text(verdict)} | {_verdict_text(after[name])} |"
    for name, verdict in before.items()
  ]
  yield "\n".join(["| loss | before | after |", "|---|---|---|", *rows])
  broken = {c for v in (*before.values(), *after.values()) for c in v.broken}
  legend = [
    f"- {c}: {CLAUSES[c]}" for c in CLAUSES if c in broken - {"accepts"}
  ]
  if legend:
    yield "\n".join(legend)
  examples = [
    f"- `{name}`: {verdict.message}"
    for name, verdict in before.items()
    if verdict.runs_with_where
  ]
  if examples:
    yield "For example, before:"
    yield "\n".join(examples)


def _file_section(
  before: Checkout, after: Checkout, names: Sequence[str]
) -> Iterator[str]:
  """How the files change."""
  if before.text("losses/_masking"):
    yield (
      "The decorator is in `optax/losses/_masking.py`, which says why it works."
    )
  else:
    yield (
      "A decorator replaces masked elements by numbers that add nothing to the"
      " loss, before the loss computes anything. It is in a new private module,"
      " `optax/losses/_masking.py`, which says why this works. The module is"
      " larger than one loss needs, since all losses with masks are to share"
      " it. Calls outside of `jit` are compiled: otherwise a mask would cost"
      " some more operations."
    )
  yield (
    "`optax/losses/_masking_test.py` tests each loss: with garbage in masked"
    " elements, against the data without them, with nothing and with everything"
    " included, other axes, other ranks of masks, and second derivatives."
  )
  renamed = [
    name
    for name in names
    if f"def _unmasked_{name}(" in after.text(_wrappers.module_of(name))
  ]
  if renamed:
    yield (
      "The old bodies of these losses become private functions, which the new"
      " bodies call:\n\n"
      + "\n".join(f"- `{name}`: `_unmasked_{name}`" for name in renamed)
    )
  unreached = [
    name for name in renamed if "where" in before.mask_parameters(name)
  ]
  if unreached:
    yield (
      f"The old bodies of {_code_list(unreached)} have code for a mask that is"
      " now unused. It stays here, so that the change is easy to read."
    )


def _code_list(names: Iterable[str]) -> str:
  return _comma_separated(f"`{name}`" for name in names)


def _verdict_text(verdict: Verdict) -> str:
  if not verdict.runs_with_where:
    return "takes no `where`"
  if verdict.keeps_contract:
    return "no finding"
  nan = "NaN gradients; " if verdict.nan_gradients else ""
  return f"{nan}breaks {_comma_separated(verdict.broken)}"
