"""Output and errors of the commands."""

import codecs
import os
import pathlib
import sys

# What stands for a symbol where the encoding of a terminal lacks it.
_SIMILAR = {
  "✓": "+",
  "✗": "x",
  "·": "-",
  "✅": "+",
  "❌": "x",
  "│": "|",
  "…": "~",
}


class CommandError(Exception):
  """An error whose message a command prints before it exits with status 2."""


class UsageError(CommandError):
  """Wrong arguments: the command also says where they are described."""


def check_writable(file: str) -> None:
  """Raises before the work starts if its output can't be written."""
  path = pathlib.Path(file).absolute()
  if path.is_dir():
    raise UsageError(f"{file} can't be written: it is a folder")
  if not path.parent.is_dir():
    raise UsageError(
      f"{file} can't be written: there is no folder {path.parent}"
    )
  if not os.access(path if path.exists() else path.parent, os.W_OK):
    raise UsageError(f"{file} can't be written: permission denied")


def write(text: str, file: str | None) -> None:
  """Writes a text to a file, or to the standard output for None."""
  if file is not None:
    try:
      pathlib.Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
      raise UsageError(f"{file} can't be written: {error}") from error
    return
  encoding = sys.stdout.encoding or "utf-8"
  sys.stdout.write(text.encode(encoding, _ERRORS).decode(encoding))
  sys.stdout.flush()


def _similar(error: UnicodeError) -> tuple[str, int]:
  """Replaces what an encoding lacks, symbols by similar ones."""
  if not isinstance(error, UnicodeEncodeError):
    raise error
  lacking = error.object[error.start : error.end]
  return "".join(_SIMILAR.get(c, "?") for c in lacking), error.end


_ERRORS = "optax_masking.similar"
codecs.register_error(_ERRORS, _similar)
