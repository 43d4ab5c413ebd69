"""One door to weight files: `open_weights(path)` by what the file is.

The name's ending says which format is meant and the first bytes say which it
is; where they disagree the error says what to rename. Which of PyTorch's two
formats a checkpoint has, the bytes alone say. Directories and indices are read
as the one set of shards they describe.
"""

import pathlib
from collections.abc import Mapping

from vqrae_jax.errors import UserError, read_json
from vqrae_jax.weights import files as handles
from vqrae_jax.weights.files import open_npz, open_safetensors
from vqrae_jax.weights.torch import open_torch

_OPENERS = {
  '.safetensors': open_safetensors,
  '.npz': open_npz,
  '.pt': open_torch,
  '.pth': open_torch,
  '.bin': open_torch,
}
# What a file of an ending begins with, in the words of `_content`.
_MEANT = {'.safetensors': ('safetensors',), '.npz': ('a zip archive',)}
_INDEX = '.index.json'
# In a directory, the first of these that is there.
_DIRECTORY = (
  'model.safetensors.index.json',
  'model.safetensors',
  'pytorch_model.bin.index.json',
  'pytorch_model.bin',
)


def open_weights(path: str | pathlib.Path) -> handles.WeightFile:
  """{key: lazy array} of a file, an index of shards, or a directory.

  Args:
    path: `.safetensors`, `.npz`, `.pt`, `.pth` or `.bin`; an index
      (`….index.json`) beside its shards; or a directory that holds
      `model.safetensors`, its index, or one `.safetensors` file.

  Raises:
    UserError: nothing there, or a file that is not whole or not what its
      name says.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    return open_weights(_in_directory(path))
  if not path.is_file():
    raise UserError(f'no weights at {path}: there is no such file')
  if path.name.endswith(_INDEX):
    return _open_shards(path)
  opener = _OPENERS.get(path.suffix)
  if opener is None:
    raise UserError(
      f'{path}: the ending "{path.suffix}" says no format of weights; there '
      f'are: {", ".join(_OPENERS)}, {_INDEX}'
    )
  _check_content(path)
  return opener(path)


def _in_directory(path: pathlib.Path) -> pathlib.Path:
  for name in _DIRECTORY:
    if (path / name).is_file():
      return path / name
  found = sorted(path.glob('*.safetensors'))
  if len(found) == 1:
    return found[0]
  if found:
    raise UserError(
      f'{path} holds {len(found)} .safetensors files and no {_DIRECTORY[0]}; '
      'name one of them'
    )
  raise UserError(f'no weights in {path}: it has no {_DIRECTORY[1]}')


def _content(head: bytes) -> str:
  """The format that a file's first bytes say, as words."""
  if head.startswith(b'PK'):
    return 'a zip archive (.npz or .pt)'
  # A header length of eight bytes, then JSON.
  if head[8:9] == b'{':
    return 'safetensors (.safetensors)'
  if head.startswith(b'\x80'):
    return 'a pickle (.pt, as PyTorch before 1.6 wrote it)'
  if b'ustar' in head[250:270]:
    return "a tar archive, PyTorch's first format"
  if head.startswith(b'version https://git-lfs'):
    return 'a Git LFS pointer, not the weights themselves'
  if head.lstrip().lower().startswith((b'<!doctype', b'<html')):
    return 'a web page, not weights'
  return ''


def _check_content(path: pathlib.Path) -> None:
  try:
    with path.open('rb') as file:
      head = file.read(512)
  except OSError as e:
    raise UserError(f'{path} cannot be opened: {e.strerror}') from None
  if not head:
    raise UserError(f'{path} is empty; fetch or save it again')
  meant = _MEANT.get(path.suffix, ('a zip archive', 'a pickle'))
  found = _content(head)
  if found.startswith(meant):
    return
  if found.startswith('a tar archive'):
    raise UserError(
      f'{path} is {found}, which is not read; load it in PyTorch and save it '
      'again, best as .safetensors'
    )
  if found:
    raise UserError(
      f'{path} is {found}; a {path.suffix} file is {" or ".join(meant)}: '
      'rename it or fetch it again'
    )
  # What the bytes are is unknown: the reader says what it misses.


def _open_shards(path: pathlib.Path) -> handles.WeightFile:
  index = read_json(path)
  try:
    where = index['weight_map']
    files = sorted(set(where.values()))
    if not all(isinstance(name, str) and name for name in files):
      raise ValueError('a file name is no text')
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(
      f'{path} is no index of shards ({e!r:.80}); it wants a "weight_map" of '
      'key to file name'
    ) from None
  sources = {}
  for name in files:
    plain = pathlib.PurePath(name).name == name
    if not plain or name.endswith(_INDEX):
      raise UserError(
        f'{path} names the shard "{name}"; shards are files beside their index'
      )
    if not (path.parent / name).is_file():
      raise UserError(
        f'{path} names {len(files)} shards, and {name} is missing; fetch it '
        f'into {path.parent}'
      )
    sources[name] = open_weights(path.parent / name)
  return handles.WeightFile(str(path), _merge(path, where, sources))


def _merge(
  path: pathlib.Path,
  where: Mapping[str, str],
  sources: Mapping[str, handles.WeightFile],
) -> dict[str, handles.LazyArray]:
  """Every key from the shard the index names; no shard holds another."""
  for name, source in sources.items():
    for key in source:
      if where.get(key) != name:
        raise UserError(
          f'{path} and its shards disagree: {name} holds "{key}", the index '
          f'has it in {where.get(key, "none")}; fetch both again'
        )
  for key, name in where.items():
    if key not in sources[name]:
      raise UserError(
        f'{path} and its shards disagree: "{key}" is not in {name}; fetch '
        'both again'
      )
  return {key: sources[name][key] for key, name in where.items()}
