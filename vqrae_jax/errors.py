"""The one error that a user can mend, and the words that help.

Every message is a single line: what was wrong, where, what would be right.
Command lines print it and exit with 2 (`command.py`). Whatever else is raised
is a fault of this package, and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


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


class Stopped(Exception):
  """A run that was asked to stop, and has saved where it is."""
