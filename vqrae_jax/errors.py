"""The one error that a user can fix, and helpers for its messages.

Every message is a single line: what was wrong, where, what would be right.
Commands print it and exit with 2 (`cli.py`). Any other exception is a fault of
this package and keeps its traceback.
"""

import difflib
import json
import pathlib
from collections.abc import Iterable

_MAX_JSON = 1 << 26  # bytes


class UserError(ValueError):
  """Input that the package cannot use; the message says what would be right."""


def did_you_mean(word: object, options: Iterable[object]) -> str:
  """' (did you mean "x"? …)', or the list of options if none is near."""
  names = sorted(str(o) for o in options)
  near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
  if near:
    return f'; did you mean "{near[0]}"?'
  return f'; there are: {", ".join(names)}' if names else ''


def choose(table, word: str, what: str):
  """`table[word]`, or a `UserError` that names the nearest key."""
  try:
    return table[word]
  except (KeyError, TypeError):
    raise UserError(
      f'unknown {what} "{word}"{did_you_mean(word, table)}'
    ) from None


# What reading a value out of damaged JSON, or JSON of another form, raises.
BAD_JSON = ValueError, KeyError, TypeError, AttributeError, RecursionError


def read_json(path: pathlib.Path) -> dict:
  """The object in a JSON file of the user's.

  Raises:
    UserError: unreadable, too long, not JSON, or not an object of keys.
  """
  try:
    with path.open('rb') as file:
      text = file.read(_MAX_JSON + 1)
    if len(text) > _MAX_JSON:
      raise ValueError(f'longer than {_MAX_JSON} bytes')
    value = json.loads(text)
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f'{path} is damaged: {e}') from None
  if not isinstance(value, dict):
    raise UserError(f'{path} is damaged: it must be a JSON object')
  return value


class Stopped(Exception):
  """A run that was asked to stop, and has saved where it is."""
