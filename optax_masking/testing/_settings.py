"""The options of `audit` that pyproject.toml has in `[tool.optax-masking]`."""

import pathlib
import tomllib
from collections.abc import Sequence
from typing import Any

from optax_masking._output import UsageError

_FILE = "pyproject.toml"
_TABLE = "[tool.optax-masking]"
_KEYS = {  # Each is an option of the command, or TARGET.
  "targets": list,
  "loss": list,
  "quick": bool,
  "jobs": int,
  "format": str,
  "output": str,
  "also": list,
  "baseline": str,
}
_TYPES = {
  list: "a list of strings",
  bool: "true or false",
  int: "an integer",
  str: "a string",
}


def read_settings(formats: Sequence[str]) -> dict[str, Any]:
  """The table in the working directory, empty if there is none.

  Args:
    formats: The names of formats.

  Raises:
    UsageError: If the file is not valid, or has an unknown key or a value of a
      wrong type.
  """
  try:
    text = pathlib.Path(_FILE).read_bytes().decode("utf-8")
    tool = tomllib.loads(text).get("tool", {})
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise UsageError(f"{_FILE} can't be read: {error}") from None
  table = tool.get("optax-masking", {}) if isinstance(tool, dict) else {}
  if not isinstance(table, dict):
    raise UsageError(f"{_FILE}: {_TABLE} is no table")
  for key, value in table.items():
    if key not in _KEYS:
      raise UsageError(
        f"{_FILE}: {_TABLE} has `{key}`; it may have {', '.join(_KEYS)}"
      )
    if not _fits(value, _KEYS[key]):
      raise UsageError(
        f"{_FILE}: `{key}` of {_TABLE} must be {_TYPES[_KEYS[key]]}, but is"
        f" {value!r}"
      )
  if table.get("format", formats[0]) not in formats:
    raise UsageError(
      f"{_FILE}: `format` of {_TABLE} is {table['format']!r}; it may be"
      f" {', '.join(formats)}"
    )
  return table


def _fits(value: Any, type_: type) -> bool:
  if type_ is list:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)
  return type(value) is type_  # True is an int, too.
