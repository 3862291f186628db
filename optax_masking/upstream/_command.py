"""The half of the command that stages losses in a checkout of Optax."""

import argparse
import functools
import pathlib
import sys
from typing import Any

import optax

from optax_masking._output import UsageError, check_writable, write
from optax_masking.testing import CLAUSES
from optax_masking.upstream import _proposals, _staging, _wrappers

_CHECKOUT = (
  "a git checkout of Optax, or a folder with a copy of the folder optax that"
  " pip has installed"
)


def add_to(commands: Any) -> None:
  _add_stage(commands)
  _add_status(commands)


def _add_stage(commands: Any) -> None:
  parser = commands.add_parser(
    "stage",
    help="put masked losses into the source of an Optax",
    description=(
      "Masks losses of Optax in its own source: edits the files of CHECKOUT and"
      " nothing else, so that it can be tested and proposed to Optax. With"
      " --patch, --dry-run or --message CHECKOUT stays as it is."
    ),
    epilog=(
      "Exit status: 0 if CHECKOUT has the losses, or what was asked for is"
      " written; 2 if it is not understood, with the reason. It is not changed"
      " then."
    ),
  )
  parser.add_argument("checkout", metavar="CHECKOUT", help=_CHECKOUT)
  losses = parser.add_mutually_exclusive_group()
  losses.add_argument(
    "--loss",
    action="append",
    default=[],
    metavar="NAME",
    help=(
      "mask this loss, and those that it calls; may be repeated. By default all"
    ),
  )
  losses.add_argument(
    "--except",
    action="append",
    default=[],
    metavar="NAME",
    dest="left_out",
    help="mask all losses but this one; may be repeated",
  )
  output = parser.add_mutually_exclusive_group()
  output.add_argument(
    "--patch", metavar="FILE", help="write a patch for git apply to FILE"
  )
  output.add_argument("--dry-run", action="store_true", help="print the patch")
  output.add_argument(
    "--message",
    action="store_true",
    help=(
      "print the description of a pull request: a title, and what an audit"
      " finds before and after"
    ),
  )
  parser.add_argument(
    "--base",
    metavar="COMMIT",
    default="HEAD",
    help=(
      "the commit that a message compares losses with which are staged already"
    ),
  )
  parser.set_defaults(run=_run_stage, parser=parser)


def _run_stage(given: argparse.Namespace) -> int:
  checkout = _staging.Checkout.at(given.checkout)
  names = given.loss
  if given.left_out:
    names = [n for n in _wrappers.LOSSES if n not in given.left_out]
  if given.message:
    write(_proposals.message(checkout, names, given.base), None)
    return 0
  in_place = not given.patch and not given.dry_run
  if in_place and checkout.root.name in ("site-packages", "dist-packages"):
    raise UsageError(
      f"{checkout.root} is where Optax is installed. Stage a copy of it: the"
      " folder optax, in a folder of its own"
    )
  fixed = functools.partial(_proposals.is_fixed, checkout)
  staging = _staging.stage(checkout, names, fixed)
  by_reason: dict[str, list[str]] = {}
  for name, why in staging.skipped.items():
    by_reason.setdefault(why, []).append(name)
  for why, skipped in by_reason.items():
    print(f"{', '.join(skipped)}: {why}", file=sys.stderr)
  for remark in staging.remarks:
    print(remark, file=sys.stderr)
  if not staging.changes:
    print("There is nothing to change.", file=sys.stderr)
    return 0
  if given.dry_run:
    write(staging.patch(), None)
    return 0
  if given.patch:
    check_writable(given.patch)
    if pathlib.Path(given.patch).resolve() in staging.paths:
      raise UsageError(f"{given.patch} is a file that the patch is to change")
    write(staging.patch(), given.patch)
    print(f"{given.patch}, for git apply in {checkout.root}:")
  else:
    staging.write()
  for change in staging.changes:
    print(f"{change.file}: {change}")
  if in_place:
    print(
      f"Test it in {checkout.root}: PYTHONPATH=. python -m pytest optax/losses"
    )
  return 0


def _add_status(commands: Any) -> None:
  parser = commands.add_parser(
    "status",
    help="list the pull requests that are still to be made to Optax",
    description=(
      "Tells of each loss of CHECKOUT what it has by itself (`axis`, `where`,"
      " the clauses of the mask contract that a quick audit finds kept) and"
      " what a stage would add: first those that fix NaN gradients. It takes"
      " about a minute. The clauses: "
      + " ".join(f"{name}: {text}" for name, text in CLAUSES.items())
    ),
  )
  parser.add_argument(
    "checkout",
    metavar="CHECKOUT",
    nargs="?",
    help=f"{_CHECKOUT}; by default the Optax that is installed",
  )
  parser.set_defaults(run=_run_status, parser=parser)


def _run_status(given: argparse.Namespace) -> int:
  folder = given.checkout or pathlib.Path(optax.__file__).parent
  write(_proposals.status(_staging.Checkout.at(folder)), None)
  return 0
