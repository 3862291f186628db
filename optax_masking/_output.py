"""What the commands write, and how they refuse."""

import pathlib
import sys


class CommandError(Exception):
  """Something that a command refuses, as it tells its user."""


class UsageError(CommandError):
  """Arguments that a command refuses: it shows its usage, too."""


def check_writable(file: str) -> None:
  """Raises before the work starts, if its output could not be written."""
  folder = pathlib.Path(file).absolute().parent
  if not folder.is_dir():
    raise UsageError(f"{file} can't be written: there is no folder {folder}")


def write(text: str, file: str | None) -> None:
  if file is not None:
    try:
      pathlib.Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
      raise UsageError(f"{file} can't be written: {error}") from error
    return
  encoding = sys.stdout.encoding or "utf-8"
  sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
  sys.stdout.flush()
