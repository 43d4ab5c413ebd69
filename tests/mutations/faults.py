"""The deliberate faults of `faults.txt`, which says how they are written."""

import pathlib
from typing import NamedTuple


class Fault(NamedTuple):
  """One replacement in the code, and the test that fails then."""

  name: str
  file: str
  old: str
  new: str
  test: str


def _fault(paragraph: str) -> Fault:
  name, file, old, *new, test = paragraph.splitlines()
  marks = {line[:2] for line in new}
  assert (old[:2], marks) == ('- ', {'+ '}), paragraph
  return Fault(name, file, old[2:], '\n'.join(line[2:] for line in new), test)


_TEXT = pathlib.Path(__file__).with_name('faults.txt').read_text()
FAULTS = tuple(
  _fault(paragraph)
  for paragraph in _TEXT.strip().split('\n\n')[2:]
  if not paragraph.startswith('#')
)
