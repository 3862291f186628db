"""What an Optax has by itself, and what is still to be given to it."""

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
import tarfile
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from optax_masking import _staging
from optax_masking._staging import Checkout, StagingError
from optax_masking.testing import CLAUSES

# Threads of https://github.com/google-deepmind/optax, with what a masked loss
# does about them, and for which losses.
_THREADS: Mapping[int, tuple[str, tuple[str, ...]]] = {
  902: (
    "Part of #{}, which asks for `axis` and `where`.",
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

# Runs the audit with the Optax of a folder, which is first in the path.
_AUDIT = """
import pathlib, sys
import optax
if not pathlib.Path(optax.__file__).is_relative_to(sys.argv[1]):
  sys.exit(f"{optax.__file__} was imported, and not what is in {sys.argv[1]}")
from optax_masking._command import main
sys.exit(main(sys.argv[2:]))
"""


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the audit says about one loss.

  Attributes:
    kept: The clauses of the contract that it keeps.
    broken: Those that it breaks.
    nan_gradients: Whether a derivative of it is NaN.
    message: The first finding about a NaN gradient, or else the first.
  """

  kept: tuple[str, ...]
  broken: tuple[str, ...]
  nan_gradients: bool
  message: str

  @classmethod
  def of(cls, report: Mapping[str, Any]) -> "Verdict":
    """Reads the report of a loss."""
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
  def takes_where(self) -> bool:
    return "accepts" not in self.broken


def verdicts(root: pathlib.Path, names: Sequence[str]) -> dict[str, Verdict]:
  """Audits losses of the Optax in a folder, in another process.

  Raises:
    StagingError: If it can't be imported or audited.
  """
  if not names:
    return {}
  package = pathlib.Path(__file__).parent.parent
  path = [str(root), str(package), os.environ.get("PYTHONPATH", "")]
  environment = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, path)),
    "PYTHONDONTWRITEBYTECODE": "1",
  }
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "audit.json")
    command = [sys.executable, "-c", _AUDIT, str(root), "audit", "--quick"]
    command += ["--format", "json", "--output", str(file), "optax"]
    command += [f"--loss={name}" for name in names]
    done = subprocess.run(command, env=environment, cwd=folder, check=False)
    if done.returncode not in (0, 1) or not file.is_file():
      raise StagingError(f"The Optax in {root} can't be audited (see above).")
    reports = json.loads(file.read_text(encoding="utf-8"))["targets"]["optax"]
  return {name: Verdict.of(reports[name]) for name in names}


def is_fixed(checkout: Checkout, names: Sequence[str]) -> dict[str, bool]:
  """Which losses keep the mask contract as they are in a checkout."""
  found = verdicts(checkout.root, names)
  return {name: not verdict.broken for name, verdict in found.items()}


# The state of a checkout.


def status(checkout: Checkout) -> str:
  """What each loss of a checkout has, and the pull requests still to make."""
  present = [n for n in _staging.LOSSES if checkout.loss(n) is not None]
  found = verdicts(checkout.root, present)

  def fixed(names: Sequence[str]) -> dict[str, bool]:
    return {name: not found[name].broken for name in names}

  to_make: dict[str, str] = {}
  done: dict[str, str] = {}
  unknown: dict[str, str] = {}
  for name in _staging.LOSSES:
    try:
      staging = _staging.stage(checkout, [name], fixed)
    except StagingError as error:
      others = (f"{n}: {why}" for n, why in error.reasons.items())
      unknown[name] = error.reasons.get(name) or _list(others) or str(error)
      continue
    if name in staging.skipped:
      done[name] = staging.skipped[name]
    else:
      to_make[name] = _addition(staging, name)

  def urgency(name: str) -> int:
    verdict = found[name]
    return 0 if verdict.nan_gradients else 1 if verdict.takes_where else 2

  headings = (
    "Pull requests that fix NaN gradients",
    "Pull requests that fix wrong numbers",
    "Pull requests that add `where`",
  )
  masked = sum({"axis", "where"} <= _takes(checkout, name) for name in present)
  clean = sum(not verdict.broken for verdict in found.values())
  staged = sum(checkout.is_staged(name) for name in present)
  lines = [
    f"Optax of {checkout.root}",
    f"Losses: {len(present)}. With `axis` and `where`: {masked}."
    f" Without a finding: {clean}. Staged: {staged}.",
  ]
  number = 0
  for rank, heading in enumerate(headings):
    names = [name for name in to_make if urgency(name) == rank]
    lines += ["", f"{heading}: {len(names)}"] if names else []
    for name in names:
      number += 1
      lines += [f"{number:3}. {name}"]
      lines += _facts("has", _has(checkout, name, found[name]))
      if found[name].takes_where:
        lines += _facts("breaks", _list(found[name].broken))
      lines += _facts("stage", to_make[name])
  for heading, reasons in (
    ("Nothing to make", done),
    ("Not understood", unknown),
  ):
    lines += ["", f"{heading}: {len(reasons)}"] if reasons else []
    for name, reason in reasons.items():
      lines += [f"     {name}", *_facts("", reason)]
  return "\n".join(lines) + "\n"


def _takes(checkout: Checkout, name: str) -> set[str]:
  """Which of `axis` and `where` a loss takes, or the one that it returns."""
  loss = checkout.loss(name)
  return set(_staging.parameters(loss)) & {"axis", "where"} if loss else set()


def _has(checkout: Checkout, name: str, verdict: Verdict) -> str:
  takes = _list(sorted(_takes(checkout, name))) or "neither axis nor where"
  kept = _list(c for c in verdict.kept if c != "accepts")
  return f"{takes}; keeps {kept}" if kept else takes


def _addition(staging: _staging.Staging, name: str) -> str:
  """What a stage of one loss adds."""
  lacks = {"axis", "where"} - _takes(staging.checkout, name)
  what = _list(sorted(lacks))
  file = f"optax/{_staging.wrappers()[name]}.py"
  (change,) = (change for change in staging.changes if change.file == file)
  text = f"adds {what + ' and ' if what else ''}the contract, with {change}"
  others = [n for n in staging.losses if n != name]
  return f"{text}, and {_list(others)}" if others else text


def _list(names: Iterable[str]) -> str:
  return ", ".join(names)


def _facts(label: str, text: str) -> list[str]:
  if not text:
    return []
  indent = " " * 13
  return textwrap.wrap(
    text, 80, initial_indent=f"     {label:8}", subsequent_indent=indent
  )


# The description of a pull request.


def message(checkout: Checkout, names: Sequence[str]) -> str:
  """The description of a pull request, with the audit before and after it.

  Of losses that are staged in the checkout it is the commit that they were
  staged on that is compared.
  """
  names = names or _staging.LOSSES
  with contextlib.ExitStack() as stack:
    staged = [n for n in _staging.with_called(names) if checkout.is_staged(n)]
    if staged:
      checkout = stack.enter_context(_committed(checkout, staged))
    fixed = functools.partial(is_fixed, checkout)
    staging = _staging.stage(checkout, names, fixed)
    if not staging.losses:
      raise StagingError(
        "There is nothing to describe: "
        + "; ".join(f"{n}: {why}" for n, why in staging.skipped.items())
      )
    before = verdicts(checkout.root, staging.losses)
    root = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    shutil.copytree(
      checkout.root / "optax",
      root / "optax",
      ignore=shutil.ignore_patterns("__pycache__"),
    )
    staging.write(root)
    after = verdicts(root, staging.losses)
    return _description(staging, before, after)


@contextlib.contextmanager
def _committed(checkout: Checkout, staged: Sequence[str]) -> Iterator[Checkout]:
  """The last commit of a checkout, in a folder of its own."""
  command = ["git", "-C", str(checkout.root), "archive", "HEAD", "optax"]
  try:
    done = subprocess.run(command, capture_output=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    raise StagingError(
      f"{_list(staged)}: staged already, and {checkout.root} is no git"
      " repository that has it as it was. Print the message before you stage."
    ) from None
  with tempfile.TemporaryDirectory() as folder:
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
      archive.extractall(folder, filter="data")
    found = Checkout.at(folder)
    still = [name for name in staged if found.is_staged(name)]
    if still:
      raise StagingError(
        f"{_list(still)}: staged already in the last commit of"
        f" {checkout.root}. Print the message before you commit."
      )
    yield found


def _description(
  staging: _staging.Staging,
  before: Mapping[str, Verdict],
  after: Mapping[str, Verdict],
) -> str:
  """A title, and a text in Markdown."""
  names = staging.losses
  new = [n for n in names if "where" not in _takes(staging.checkout, n)]
  what = (
    "Add axis and where arguments to"
    if new
    else "Keep what is masked out of the derivatives of"
  )
  title = f"{what} {names[0] if len(names) == 1 else f'{len(names)} losses'}"
  of_old = [n for n in names if _is_renamed(staging, n)]
  with_dead_branch = [n for n in of_old if n not in new]
  paragraphs = [
    "`where` tells which elements count. What the others hold, be it the NaN or"
    " the garbage of padding, changes no value and no derivative; their own"
    " gradient is exactly 0, and where nothing is included the result is 0, as"
    " is its gradient. A mean with `where=` of an unmasked loss does not do"
    " that: in its backward pass `0 * nan` is NaN.",
    "`axis` and `where` mean what they do in `jnp.sum`; a mask with one entry"
    " an example, so without `axis`, is accepted too. Without them the losses"
    " are the same programs as before, with the same jaxprs.",
    "## Before and after",
    "The contract is stated at the top of `optax/losses/_masking.py`. Each loss"
    " was checked against it in float32, in values and reverse mode, with many"
    " masks, and with NaN, infinities and the largest numbers in what they"
    " mask.",
    _table(before, after),
  ]
  examples = [
    f"- `{n}`: {before[n].message}" for n in names if before[n].takes_where
  ]
  if examples:
    paragraphs += ["What was found first, before:", "\n".join(examples)]
  threads = [
    f"- {text.format(number)}"
    for number, (text, losses) in _THREADS.items()
    if {*names} & {*losses}
  ]
  if threads:
    paragraphs += ["## Issues", "\n".join(threads)]
  changes = [f"- `{change.file}`: {change}" for change in staging.changes]
  paragraphs += ["## Changes", "\n".join(changes)]
  if of_old:
    paragraphs.append(
      f"Unchanged but for its name is the old body of {_quoted(of_old)}: the"
      f" new one calls it as `_unmasked_{of_old[0]}`."
    )
  if with_dead_branch:
    paragraphs.append(
      f"The code for a mask in the old body of {_quoted(with_dead_branch)} is"
      " not reached any more. It is left, for the change to be easy to read,"
      " and can go."
    )
  return "\n\n".join([title, *paragraphs]) + "\n"


def _is_renamed(staging: _staging.Staging, name: str) -> bool:
  mark = f"def _unmasked_{name}("
  return any(mark in change.new for change in staging.changes)


def _quoted(names: Iterable[str]) -> str:
  return _list(f"`{name}`" for name in names)


def _table(before: Mapping[str, Verdict], after: Mapping[str, Verdict]) -> str:
  rows = [
    f"| `{name}` | {_in_words(before[name])} | {_in_words(after[name])} |"
    for name in before
  ]
  return "\n".join(["| loss | before | after |", "|---|---|---|", *rows])


def _in_words(verdict: Verdict) -> str:
  if not verdict.takes_where:
    return "takes no `where`"
  if not verdict.broken:
    return "nothing is found"
  nan = "NaN gradients; " if verdict.nan_gradients else ""
  return f"{nan}breaks {_list(verdict.broken)}"
