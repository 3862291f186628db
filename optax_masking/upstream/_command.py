"""The commands `stage` and `status`, on a checkout of Optax."""

import argparse
import functools
import pathlib
import sys
from typing import Any

import optax

from optax_masking._output import UsageError, check_writable, write
from optax_masking.testing import CLAUSES
from optax_masking.upstream import _proposals, _staging, _wrappers

_CHECKOUT_HELP = (
  "a git checkout of Optax, or a folder with a copy of the folder optax that"
  " pip has installed"
)


def add_commands(commands: Any) -> None:
  _add_stage(commands)
  _add_status(commands)


def _add_stage(commands: Any) -> None:
  parser = commands.add_parser(
    "stage",
    help="put masked losses into the source of an Optax",
    description=(
      "Masks losses of Optax in its own source: edits the files of CHECKOUT and"
      " nothing else, so that the change can be tested and proposed to Optax."
      " With --patch, --dry-run or --message CHECKOUT stays as it is."
    ),
    epilog=(
      "Exit status: 0 if CHECKOUT has the losses, or the requested output is"
      " written; 2 on an error, such as a loss that has changed since its"
      " wrapper was tested. After an error CHECKOUT stays as it is."
    ),
  )
  parser.add_argument("checkout", metavar="CHECKOUT", help=_CHECKOUT_HELP)
  losses = parser.add_mutually_exclusive_group()
  losses.add_argument(
    "--loss",
    action="append",
    default=[],
    metavar="NAME",
    help=(
      "mask this loss, and the losses that it calls; may be repeated (default:"
      " all losses)"
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
      "print the description of a pull request: a title, and the findings of an"
      " audit before and after"
    ),
  )
  parser.add_argument(
    "--base",
    metavar="COMMIT",
    default="HEAD",
    help=(
      "for --message, a commit without the losses that are staged already: the"
      " state before"
    ),
  )
  parser.set_defaults(run=_run_stage, parser=parser)


def _run_stage(args: argparse.Namespace) -> int:
  checkout = _staging.Checkout.at(args.checkout)
  names = args.loss
  if args.left_out:
    names = [n for n in _wrappers.LOSSES if n not in args.left_out]
  if args.message:
    write(_proposals.message(checkout, names, args.base), None)
    return 0
  in_place = not args.patch and not args.dry_run
  if in_place and checkout.root.name in ("site-packages", "dist-packages"):
    raise UsageError(
      f"{checkout.root} is where Optax is installed. Stage a copy of it: the"
      " folder optax, in a folder of its own"
    )
  find_fixed = functools.partial(_proposals.find_fixed, checkout)
  staging = _staging.stage(checkout, names, find_fixed)
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
  if args.dry_run:
    write(staging.patch(), None)
    return 0
  if args.patch:
    check_writable(args.patch)
    if pathlib.Path(args.patch).resolve() in staging.paths:
      raise UsageError(f"{args.patch} is a file that the patch changes")
    write(staging.patch(), args.patch)
    print(f"{args.patch}, for git apply in {checkout.root}:")
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
      "Lists what each loss of CHECKOUT has by itself (`axis`, `where`, the"
      " clauses of the mask contract that it keeps in a quick audit) and what a"
      " stage would add. Losses with NaN gradients come first. The audit takes"
      " about a minute. The clauses: "
      + " ".join(f"{name}: {text}" for name, text in CLAUSES.items())
    ),
  )
  parser.add_argument(
    "checkout",
    metavar="CHECKOUT",
    nargs="?",
    help=f"{_CHECKOUT_HELP}; by default the Optax that is installed",
  )
  parser.set_defaults(run=_run_status, parser=parser)


def _run_status(args: argparse.Namespace) -> int:
  folder = args.checkout or pathlib.Path(optax.__file__).parent
  write(_proposals.status(_staging.Checkout.at(folder)), None)
  return 0
