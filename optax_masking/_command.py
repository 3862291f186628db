"""The command `optax-masking`, and its command `losses`."""

import argparse
import inspect
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import optax_masking
from optax_masking._output import CommandError, UsageError
from optax_masking.losses._table import ROWS
from optax_masking.testing import _command as auditing
from optax_masking.upstream import _command as staging


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command, and returns its exit status."""
  parser = _Parser(
    prog="optax-masking",
    description="Losses that padding can't poison, and checks of them.",
  )
  parser.add_argument(
    "--version",
    action="version",
    version=f"optax_masking {optax_masking.__version__}",
  )
  commands = parser.add_subparsers(metavar="COMMAND")
  _add_losses(commands)
  auditing.add_commands(commands)
  staging.add_commands(commands)
  args = parser.parse_args(arguments)
  if not hasattr(args, "run"):
    parser.print_help()
    return 0
  try:
    return args.run(args)
  except CommandError as error:
    print(f"{args.parser.prog}: error: {error}", file=sys.stderr)
    if isinstance(error, UsageError):
      print(f"see {args.parser.prog} --help", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"{args.parser.prog}: interrupted", file=sys.stderr)
    return 130  # As a shell says of a process that Ctrl-C ended.


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    """Without the usage, whose lines would hide the message."""
    self.exit(2, f"{self.prog}: error: {message}\nsee {self.prog} --help\n")


def _add_losses(commands: Any) -> None:
  parser = commands.add_parser(
    "losses",
    help="list the losses, and the elements that a mask removes",
    description=(
      "Lists the losses in a table of Markdown: the default axis, the elements"
      " that a mask removes, and the value where nothing is left. The name has"
      " `losses.` if Optax has the loss in `optax.losses` alone."
    ),
  )
  parser.set_defaults(run=_run_losses, parser=parser)


def _run_losses(args: argparse.Namespace) -> int:
  del args
  print("| Loss | Default `axis` | What a mask removes | Nothing left |")
  print("|---|---|---|---|")
  for row in ROWS.values():
    name = row.name if row.at_top else f"losses.{row.name}"
    loss = getattr(optax_masking.losses, row.name)
    if row.makes_loss:
      loss = row.of(optax_masking.losses)
    axis = inspect.signature(loss).parameters["axis"].default
    print(f"| `{name}` | `{axis}` | {row.removes} | {row.empty} |")
  return 0
