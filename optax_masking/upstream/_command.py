"""The commands `stage` and `status`, on a checkout of Optax."""

import argparse
import contextlib
import difflib
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import optax

from optax_masking._output import UsageError, check_writable, write
from optax_masking.losses._table import ROWS

_CHECKOUT_HELP = (
  "a git checkout of Optax, or a folder with a copy of the folder optax that"
  " pip has installed"
)


def add_commands(commands: Any) -> None:
  parser = commands.add_parser(
    "stage",
    help="put masks into the losses of an Optax, as pull requests to it",
    description=(
      "Edits the losses of CHECKOUT, and their tests, so that the change can be"
      " tested and proposed to Optax. With --patch, --dry-run, --message and"
      " --branches the files of CHECKOUT stay as they are."
    ),
    epilog=(
      "Exit status: 0 if CHECKOUT has the losses, or the requested output is"
      " written; 2 on an error. After an error CHECKOUT stays as it is."
    ),
  )
  add = parser.add_argument
  add("checkout", metavar="CHECKOUT", help=_CHECKOUT_HELP)
  names: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME"}
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument(
    "--loss", help="this loss, and what it calls; may be repeated", **names
  )
  what.add_argument(
    "--all", action="store_true", help="all losses that can be staged"
  )
  what.add_argument(
    "--rank-rule",
    action="store_true",
    help="the meaning of masks of lower rank, where NumPy's rule applies today",
  )
  text = "with --all, without this loss and those that call it; may be repeated"
  add("--except", dest="left_out", help=text, **names)
  output = parser.add_mutually_exclusive_group()
  output.add_argument(
    "--patch", metavar="FILE", help="write a patch for git apply to a new FILE"
  )
  for option, text in {
    "--dry-run": "print the patch",
    "--message": "print the description of the whole pull request",
    "--branches": "with --all, a branch with a commit for each pull request",
  }.items():
    output.add_argument(option, action="store_true", help=text)
  text = "edit files that have uncommitted changes"
  add("--force", action="store_true", help=text)
  parser.set_defaults(run=_run_stage, parser=parser)

  parser = commands.add_parser(
    "status",
    help="list the pull requests that are still to be made to Optax",
    description=(
      "Lists the pull requests in the order in which they should be made, the"
      " smallest and most certain first: the lines, the repair, what a check of"
      " each loss finds before and after, and the command."
    ),
  )
  parser.add_argument(
    "checkout",
    metavar="CHECKOUT",
    nargs="?",
    default=pathlib.Path(optax.__file__).parent,
    help=f"{_CHECKOUT_HELP}; by default the Optax that is installed",
  )
  parser.set_defaults(run=_run_status, parser=parser)


def _open(path: str) -> tuple[Any, Any]:
  """A checkout, and the module of the proposals, which need LibCST."""
  try:
    from optax_masking.upstream import _checkout, _proposals
  except ModuleNotFoundError as error:
    if error.name != "libcst":
      raise
    raise UsageError(
      "this needs LibCST: pip install 'optax_masking[upstream]'"
    ) from None
  return _checkout.Checkout.at(path), _proposals


def _run_status(args: argparse.Namespace) -> int:
  checkout, proposals = _open(args.checkout)
  write(proposals.status(checkout), None)
  return 0


def _run_stage(args: argparse.Namespace) -> int:
  for name in (*args.loss, *args.left_out):
    if name not in ROWS:
      similar = difflib.get_close_matches(name, ROWS, 3, 0.5)
      hint = f" Did you mean {' or '.join(similar)}?" if similar else ""
      raise UsageError(f"There is no loss {name}.{hint}")
  if (args.left_out or args.branches) and not args.all:
    raise UsageError("--except and --branches are for --all")
  checkout, proposals = _open(args.checkout)
  if args.branches:
    _check_committed(checkout, ["optax/losses"])
    _make_branches(checkout, proposals, args.left_out)
    return 0
  after = _staged(checkout, proposals, args)
  patch = after.patch(checkout)
  if not patch:
    print("There is nothing to change.", file=sys.stderr)
  elif args.message:
    write(_message(checkout, proposals, args), None)
  elif args.dry_run:
    write(patch, None)
  elif args.patch:
    if pathlib.Path(args.patch).exists():
      raise UsageError(f"{args.patch} exists")
    check_writable(args.patch)
    write(patch, args.patch)
    path = pathlib.Path(args.patch).resolve()
    print(f"In {checkout.root}: git apply {path}, and back with -R")
  else:
    _write_files(checkout, after.changed(checkout), args.force)
  return 0


def _staged(checkout: Any, proposals: Any, args: argparse.Namespace) -> Any:
  """The checkout with the requested losses."""
  if args.rank_rule:
    return proposals.apply(checkout, proposals.RANK_RULE)
  if args.loss:
    return checkout.staged(args.loss)
  for proposal in proposals.without(args.left_out):
    for name in proposal.losses:
      obstacle = checkout.obstacle(name)
      if obstacle and not checkout.is_staged(name):
        print(f"{name} can't be staged: {obstacle}", file=sys.stderr)
    checkout = proposals.apply(checkout, proposal)
  return checkout


def _message(checkout: Any, proposals: Any, args: Any) -> str:
  from optax_masking.upstream._changes import real_name  # It needs LibCST.

  names = set(map(real_name, args.loss))
  found = [p for p in proposals.PROPOSALS if names & {*p.losses}]
  if args.rank_rule:
    found = [proposals.RANK_RULE]
  if len(found) != 1:
    raise UsageError("--message is for the losses of one pull request")
  after = proposals.apply(checkout, *found)
  texts = [proposals.print_examples(c, found)[0] for c in (checkout, after)]
  return proposals.message(*found, *texts, after.patch(checkout))


def _write_files(checkout: Any, changes: Any, force: bool) -> None:
  if checkout.root.name in ("site-packages", "dist-packages"):
    raise UsageError(
      f"{checkout.root} is where Optax is installed. Stage a copy of it: the"
      " folder optax, in a folder of its own"
    )
  if not force and _is_in_git(checkout):
    _check_committed(checkout, changes, ", or add --force")
  try:
    for file, (_, new) in changes.items():
      (checkout.root / file).write_text(new, "utf-8")
      print(f"Edited {file}")
  except OSError as error:
    for file, (old, _) in changes.items():
      if os.access(checkout.root / file, os.W_OK):
        (checkout.root / file).write_text(old, "utf-8")
    raise UsageError(f"nothing was changed, since {error}") from error
  print(
    f"Test it in {checkout.root}: PYTHONPATH=. python -m pytest optax/losses"
  )


def _check_committed(
  checkout: Any, files: Iterable[str], remedy: str = ""
) -> None:
  status = ("status", "--porcelain", "--untracked-files=no", "--")
  if changed := _git(checkout, *status, *files):
    raise UsageError(
      f"these files have uncommitted changes; commit them{remedy}:\n{changed}"
    )


def _is_in_git(checkout: Any) -> bool:
  with contextlib.suppress(UsageError):
    return bool(_git(checkout, "rev-parse", "--is-inside-work-tree"))
  return False


def _git(checkout: Any, *command: str, text: str = "", **more: str) -> str:
  try:
    return subprocess.run(
      ["git", "-C", str(checkout.root), *command],
      env=os.environ | more,
      input=text,
      capture_output=True,
      check=True,
      text=True,
    ).stdout.rstrip("\n")
  except FileNotFoundError:
    raise UsageError("git is not installed") from None
  except subprocess.CalledProcessError as error:
    raise UsageError(f"git {command[0]} fails: {error.stderr}") from None


def _make_branches(checkout: Any, proposals: Any, left_out: Any) -> None:
  """Makes commits, which changes neither files nor the index."""
  order = [*proposals.without(left_out), proposals.RANK_RULE]
  rows = list(proposals.in_order(checkout, order))
  rows = [row for row in rows if row[3].changed(row[2])]
  names = [proposal for proposal, *_ in rows]
  branches = [f"masks/{proposal.name}" for proposal in names]
  if present := _git(checkout, "branch", "--list", *branches):
    raise UsageError(f"there are branches of these names:\n{present}")
  final = functools.reduce(proposals.apply, names, checkout)
  was = proposals.print_examples(checkout, names)
  becomes = proposals.print_examples(final, names)
  commits: dict[str, str] = {}
  with tempfile.TemporaryDirectory() as folder:
    index = {"GIT_INDEX_FILE": str(pathlib.Path(folder, "index"))}
    for i, (proposal, base, before, after) in enumerate(rows):
      parent = commits[base.name] if base else "HEAD"
      _git(checkout, "read-tree", parent, **index)
      patch = after.patch(before)
      _git(checkout, "apply", "--cached", text=patch, **index)
      tree = _git(checkout, "write-tree", **index)
      text = proposals.message(proposal, was[i], becomes[i], patch)
      command = ("commit-tree", tree, "-p", parent)
      commits[proposal.name] = _git(checkout, *command, text=text)
  created = zip(branches, commits.values(), strict=True)
  lines = [f"create refs/heads/{branch} {commit}" for branch, commit in created]
  _git(checkout, "update-ref", "--stdin", text="\n".join(lines) + "\n")
  for branch, (_, base, *_) in zip(branches, rows, strict=True):
    print(branch + (f" on masks/{base.name}" if base else ""))
