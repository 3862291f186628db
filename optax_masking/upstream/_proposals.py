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
import tempfile
import textwrap
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import optax_masking
from optax_masking.losses._table import ROWS
from optax_masking.testing import CLAUSES
from optax_masking.upstream import _staging, _wrappers
from optax_masking.upstream._staging import Checkout, StagingError

# Threads of https://github.com/google-deepmind/optax, with what a masked loss
# does about them, and for which losses.
_THREADS: Mapping[int, tuple[str, tuple[str, ...]]] = {
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

# Runs the audit with the Optax of a folder, which is first in the path.
_AUDIT = """
import pathlib, sys
import optax
if not pathlib.Path(optax.__file__).resolve().is_relative_to(sys.argv[1]):
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
  def clean(self) -> bool:
    """Whether nothing was found."""
    return not self.broken

  @property
  def takes(self) -> set[str]:
    """`where`, if it ran with one."""
    return set() if "accepts" in self.broken else {"where"}


def verdicts(root: pathlib.Path, names: Sequence[str]) -> dict[str, Verdict]:
  """Audits losses of the Optax in a folder, in another process.

  Raises:
    StagingError: If it can't be imported or audited.
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
  return {name: verdict.clean for name, verdict in found.items()}


# The state of a checkout.


def status(checkout: Checkout) -> str:
  """What each loss of a checkout has, and the pull requests still to make."""
  present = [n for n in _wrappers.LOSSES if checkout.loss(n) is not None]
  found = verdicts(checkout.root, present)

  def has(name: str) -> set[str]:
    return checkout.takes(name) | found[name].takes

  to_make: dict[str, str] = {}
  done: dict[str, str] = {}
  unknown: dict[str, str] = {}
  for name in _wrappers.LOSSES:
    try:
      staging = _staging.stage(
        checkout, [name], lambda names: {n: found[n].clean for n in names}
      )
    except StagingError as error:
      of_called = _list(f"{n}: {why}" for n, why in error.reasons.items())
      why = error.reasons.get(name) or of_called or str(error)
      unknown[name] = why
      continue
    if name in staging.skipped:
      done[name] = staging.skipped[name]
      continue
    module = f"optax/{_wrappers.module_of(name)}.py"
    (change,) = (c for c in staging.changes if c.file == module)
    lacks = _list(sorted({"axis", "where"} - has(name)))
    with_it = _list(n for n in staging.losses if n != name)
    to_make[name] = f"adds {lacks or 'the contract'}: {change}" + (
      f", and to {with_it}" if with_it else ""
    )

  def urgency(name: str) -> int:
    if found[name].nan_gradients:
      return 0
    return 1 if found[name].takes else 2

  both = {"axis", "where"}
  counts = {
    "Losses": len(present),
    "With `axis` and `where`": sum(both <= has(n) for n in present),
    "Without a finding": sum(found[n].clean for n in present),
    "Staged": sum(checkout.is_staged(n) for n in present),
  }
  lines = [
    f"Optax {checkout.version_as_written} in {checkout.root}",
    " ".join(f"{what}: {number}." for what, number in counts.items()),
  ]
  number = 0
  headings = ("fix NaN gradients", "fix wrong numbers", "add `where`")
  for rank, heading in enumerate(headings):
    names = [name for name in to_make if urgency(name) == rank]
    if names:
      lines += ["", f"Pull requests that {heading}: {len(names)}"]
    for name in names:
      number += 1
      kept = _list(c for c in found[name].kept if c != "accepts")
      facts = {
        "has": _list(sorted(has(name))) or "neither axis nor where",
        "keeps": kept,
        "breaks": _list(found[name].broken) if found[name].takes else "",
        "stage": to_make[name],
      }
      lines += [f"{number:3}. {name}"]
      for label, text in facts.items():
        lines += _indented(f"     {label:8}", text)
  for heading, reasons in (
    ("Nothing to make", done),
    ("Not understood", unknown),
  ):
    lines += ["", f"{heading}: {len(reasons)}"] if reasons else []
    for name, why in reasons.items():
      lines += [f"     {name}", *_indented(" " * 13, why)]
  if to_make:
    lines += [
      "",
      "To make one: optax-masking stage CHECKOUT --loss"
      f" {min(to_make, key=urgency)}",
      "To describe it: the same, with --message. The first one that is merged",
      "brings the module and the tests that the others add to.",
    ]
  return "\n".join(lines) + "\n"


def _list(names: Iterable[str]) -> str:
  return ", ".join(names)


def _indented(label: str, text: str) -> list[str]:
  return textwrap.wrap(
    text, 80, initial_indent=label, subsequent_indent=" " * 13
  )


# The description of a pull request.


def message(checkout: Checkout, names: Sequence[str], base: str) -> str:
  """The description of a pull request, with the audit before and after it.

  Losses that are staged in the checkout are described as they are there, and
  compared with a commit, the base.
  """
  names = names or _wrappers.LOSSES
  with contextlib.ExitStack() as stack:
    staging = _staging.stage(
      checkout, names, functools.partial(is_fixed, checkout)
    )
    staged = [
      name
      for name in _wrappers.with_called(names)
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
      before = stack.enter_context(_committed(checkout, staged, base))
    if staging.losses:
      root = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
      ignored = shutil.ignore_patterns("__pycache__")
      shutil.copytree(checkout.root / "optax", root / "optax", ignore=ignored)
      staging.write(root)
      after = Checkout.at(root)
    return _description(before, after, losses)


@contextlib.contextmanager
def _committed(
  checkout: Checkout, staged: Sequence[str], base: str
) -> Iterator[Checkout]:
  """A commit of a checkout, in a folder of its own."""
  git = ["git", "-C", str(checkout.root), "archive", "--format=zip", base]
  try:
    done = subprocess.run([*git, "optax"], capture_output=True, check=True)
  except (OSError, subprocess.CalledProcessError) as error:
    told = getattr(error, "stderr", None) or str(error).encode()
    raise StagingError(
      f"{_list(staged)}: staged already, and what was before can't be had from"
      f" git in {checkout.root}: {told.decode().strip()}"
    ) from None
  with tempfile.TemporaryDirectory() as folder:
    with zipfile.ZipFile(io.BytesIO(done.stdout)) as archive:
      archive.extractall(folder)
    found = Checkout.at(folder)
    still = [name for name in staged if found.is_staged(name)]
    if still:
      raise StagingError(
        f"{_list(still)}: staged already in {base} of {checkout.root}. Name a"
        " commit before it with --base."
      )
    yield found


# What a mask means otherwise than before, for those that had one.
_LOWER_RANK = (
  "A `where` of lower rank has one entry an example. A mask that NumPy would"
  " broadcast from the last axis, such as one of shape `[C]` for data of shape"
  " `[B, C]`, is an error, which names the index to write."
)
_MEANINGS: Mapping[str, str] = {
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
  """A title, and a text in Markdown."""
  were, are = verdicts(before.root, names), verdicts(after.root, names)
  added = {name: after.takes(name) - before.takes(name) for name in names}
  for name in names:
    if ROWS[name].makes_loss:
      added[name] = {"axis", "where"}
  old = [name for name in names if "where" not in added[name]]
  new_arguments = sorted(set().union(*added.values()))
  arguments = " and ".join(f"`{argument}`" for argument in new_arguments)
  what = (
    f"Add {arguments.replace('`', '')} to"
    if arguments
    else "Keep what is masked out of the derivatives of"
  )
  title = f"{what} {' and '.join(names) if len(names) < 4 else 'losses'}"
  each = "the loss is" if len(names) == 1 else "the losses are"
  paragraphs = [
    "`where` tells which elements count. What the others hold, be it the NaN"
    " or the garbage of padding, changes no value and no derivative. Their own"
    " gradient is exactly 0, and where nothing is included so is the result. To"
    " select from the result of an unmasked loss is not enough: in the backward"
    " pass `0 * nan` is NaN.",
    "`axis` means what it does in `jnp.sum`. `where` is boolean, and has the"
    " rank of the data, or that rank less `axis`: one entry an example. Without"
    f" them {each} the same program as before: the jaxprs are equal.",
  ]
  if arguments and old:
    paragraphs.append(
      "\n".join(
        f"- {_quoted([name])} gets"
        f" {_quoted(sorted(added[name])) or 'no new argument'}."
        for name in names
      )
    )
  meanings = [f"- `{n}`: {_MEANINGS[n]}" for n in names if n in _MEANINGS]
  refusing = [name for name in old if _wrappers.refuses_ambiguous_where(name)]
  if refusing:
    meanings.append(f"- {_quoted(refusing)}: {_LOWER_RANK}")
  if meanings:
    paragraphs += ["## Behavior that changes, with a mask", "\n".join(meanings)]
  paragraphs += [
    "## Before and after",
    "What `optax-masking audit --quick` finds, of the package optax_masking"
    f" {optax_masking.__version__}: it tries many masks, with NaN, infinities"
    " and the largest numbers in what they mask, in float32, of values and"
    " reverse-mode gradients.",
    _table(were, are),
  ]
  broken = {c for v in (*were.values(), *are.values()) for c in v.broken}
  key = [f"- {c}: {CLAUSES[c]}" for c in CLAUSES if c in broken - {"accepts"}]
  if key:
    paragraphs.append("\n".join(key))
  examples = [f"- `{n}`: {were[n].message}" for n in names if were[n].takes]
  if examples:
    paragraphs += ["For example, before:", "\n".join(examples)]
  threads = [
    f"- {text.format(number)}"
    for number, (text, losses) in _THREADS.items()
    if {*names} & {*losses}
  ]
  if threads:
    paragraphs += ["## Issues", "\n".join(threads)]
  paragraphs += ["## How", *_how(before, after, names)]
  return "\n\n".join([title, *paragraphs]) + "\n"


def _how(
  before: Checkout, after: Checkout, names: Sequence[str]
) -> Iterator[str]:
  """What was done to the files."""
  if before.text("losses/_masking"):
    yield "`optax/losses/_masking.py` has the decorator, and why it works."
  else:
    yield (
      "A decorator replaces masked elements by numbers that add nothing to the"
      " loss, before anything is computed. It is in a new private module,"
      " `optax/losses/_masking.py`, which says why this works. It is larger"
      " than one loss needs: it is what other losses with masks are to share."
      " Calls outside of `jit` are compiled, or a mask would cost them some"
      " more operations."
    )
  yield (
    "`optax/losses/_masking_test.py` tests each loss: with garbage in what is"
    " masked, against the data without it, with nothing and with everything"
    " included, other axes, other ranks of masks, and second derivatives."
  )
  renamed = [n for n in names if f"def _unmasked_{n}(" in after.source_of(n)]
  if renamed:
    yield (
      "The bodies of these go on as private functions of another name, which"
      " the new bodies call:\n\n"
      + "\n".join(f"- `{name}`: `_unmasked_{name}`" for name in renamed)
    )
  unreached = [name for name in renamed if "where" in before.takes(name)]
  if unreached:
    yield (
      f"Their code for a mask is not reached any more: in {_quoted(unreached)}."
      " It is left here, for the change to be easy to read."
    )


def _quoted(names: Iterable[str]) -> str:
  return _list(f"`{name}`" for name in names)


def _table(before: Mapping[str, Verdict], after: Mapping[str, Verdict]) -> str:
  rows = [
    f"| `{name}` | {_in_words(before[name])} | {_in_words(after[name])} |"
    for name in before
  ]
  return "\n".join(["| loss | before | after |", "|---|---|---|", *rows])


def _in_words(verdict: Verdict) -> str:
  if not verdict.takes:
    return "takes no `where`"
  if verdict.clean:
    return "no finding"
  nan = "NaN gradients; " if verdict.nan_gradients else ""
  return f"{nan}breaks {_list(verdict.broken)}"
