"""Output and errors of the commands."""

import pathlib
import sys


class CommandError(Exception):
  """An error whose message a command prints before it exits with status 2."""


class UsageError(CommandError):
  """Wrong arguments: the command prints its usage, too."""


def check_writable(file: str) -> None:
  """Raises before the work starts if there is no folder for its output."""
  folder = pathlib.Path(file).absolute().parent
  if not folder.is_dir():
    raise UsageError(f"{file} can't be written: there is no folder {folder}")


def write(text: str, file: str | None) -> None:
  """Writes a text to a file, or to the standard output for None."""
  if file is not None:
    try:
      pathlib.Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
      raise UsageError(f"{file} can't be written: {error}") from error
    return
  encoding = sys.stdout.encoding or "utf-8"
  sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
  sys.stdout.flush()
