"""The word that says where weights come from, one parser for every door.

  hf:ORG/NAME[@REV]   a repository of the Hugging Face hub
  rae:FILE            a published RAE decoder
  vqrae_torch:FILE    a model of the PyTorch project
  a/path  ./name      a file or directory
  name                a row of a table

It reads a word; it opens nothing.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable

from vqrae_jax.errors import UserError, did_you_mean

SCHEMES = ('hf', 'rae', 'vqrae_torch')

_SCHEME = re.compile(r'([A-Za-z][A-Za-z0-9_+.-]*):(.*)', re.DOTALL)
_HUB = re.compile(r'([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?')


@dataclasses.dataclass(frozen=True)
class SourceWord:
  """A parsed source: its kind and what the kind needs.

  `kind` is "hf", "rae", "vqrae_torch", "path" or "row"; `value` is the
  ORG/NAME, the path (home expanded) or the row's name; `revision` is the
  hub's, None for its default.
  """

  kind: str
  value: str
  revision: str | None = None


def parse_source(word: str, rows: Iterable[str] = ()) -> SourceWord:
  """Reads a source word.

  Args:
    word: as a flag or a config has it.
    rows: the names that a bare word may be.

  Raises:
    UserError: an unknown scheme or row, or a scheme without its value.
  """
  names = tuple(rows)
  if not word.strip():
    raise UserError(
      'an empty source of weights; give hf:ORG/NAME, rae:FILE, a path or a name'
    )
  if word in names:
    return SourceWord('row', word)
  match = _SCHEME.fullmatch(word)
  if match is not None:
    return _with_scheme(word, *match.groups())
  path = pathlib.Path(word).expanduser()
  if '/' in word or word.startswith(('.', '~')) or path.exists():
    return SourceWord('path', str(path))
  raise UserError(
    f'unknown source of weights "{word}"{did_you_mean(word, names)}; a path '
    'has a "/" in it, a hub id starts with hf:'
  )


def _with_scheme(word: str, scheme: str, value: str) -> SourceWord:
  if scheme not in SCHEMES:
    raise UserError(
      f'unknown scheme "{scheme}:" in "{word}"{did_you_mean(scheme, SCHEMES)}'
    )
  if scheme != 'hf':
    if not value:
      raise UserError(f'"{word}" names no file; write {scheme}:FILE')
    return SourceWord(scheme, str(pathlib.Path(value).expanduser()))
  match = _HUB.fullmatch(value)
  if match is None:
    raise UserError(f'"{word}" is no hub id; write hf:ORG/NAME[@REV]')
  return SourceWord('hf', *match.groups())
