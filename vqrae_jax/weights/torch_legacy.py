"""PyTorch checkpoints of the format before 1.6: pickles, then raw bytes.

A file is five pickles, one behind the other (a magic number, the format's
version, a word on the machine, the value itself, the keys of its storages),
and for each key, in that order, an i64 count of elements and the elements.
Counts and elements are little-endian whatever machine wrote them, as
`torch.save` has it. torchvision's older files, LPIPS's heads and DINO's are in
this format.

Opening reads the pickles and the counts, and holds all sizes to the file's.
There is no checksum in it: damage inside a value is not seen here. What it
does not do: choose tensors (`torch_files.py`), or read the tar archives that
came before it.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from vqrae_jax.errors import UserError
from vqrae_jax.weights.handles import shown
from vqrae_jax.weights.torch_pickle import Front, Storage, parse

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_COUNT = 8  # bytes

# Reads bytes [first, last) of a storage.
Run = Callable[[int, int], bytes]


def open_legacy(
  path: pathlib.Path,
) -> tuple[Any, Callable[[Storage, str], Run]]:
  """The value of a file, and what gives each storage's bytes.

  Raises:
    UserError: no whole checkpoint, or one that holds more than weights.
  """
  try:
    size = path.stat().st_size
    with path.open('rb') as file:
      front = Front(file, str(path), size)
      _check_head(front, path)
      value, storages = parse(front, str(path), legacy=True)
      keys, _ = parse(front, str(path), legacy=True)
      places = _places(file, front.at, size, _listed(keys, storages))
  except OSError as e:
    raise UserError(f'{path} cannot be read: {e.strerror}') from None
  except _Damaged as e:
    raise UserError(
      f'{path} is truncated or damaged: {e}; fetch or save it again'
    ) from None

  def run(storage: Storage, where: str) -> Run:
    start = places[storage.key]
    return lambda first, last: _read(path, start + first, last - first, where)

  return value, run


class _Damaged(Exception):
  """Sizes that disagree; the words say which."""


def _check_head(front: Front, path: pathlib.Path) -> None:
  magic, _ = parse(front, str(path), legacy=True)
  if type(magic) is not int or magic != _MAGIC:
    raise UserError(
      f"{path} is a Python pickle and no PyTorch checkpoint (PyTorch's magic "
      'number is not its first value); save the weights as .safetensors or '
      'with torch.save'
    )
  version, _ = parse(front, str(path), legacy=True)
  if type(version) is not int or version != _VERSION:
    raise UserError(
      f'{path} is of an unknown version of the PyTorch format before 1.6, not '
      f'{_VERSION}; load it in PyTorch and save it again'
    )
  machine, _ = parse(front, str(path), legacy=True)
  if not isinstance(machine, dict):
    raise _Damaged('no word on the machine that wrote it')


def _listed(keys: Any, storages: list[Storage]) -> dict[str, Storage]:
  """The storages in the file's order; each is used, and alike everywhere."""
  used: dict[str, Storage] = {}
  for storage in storages:
    first = used.setdefault(storage.key, storage)
    if (first.dtype, first.count) != (storage.dtype, storage.count):
      raise _Damaged(f'storage {shown(storage.key)} is of two types or sizes')
  if type(keys) is not list or not all(type(k) is str for k in keys):
    raise _Damaged('no list of storages follows its value')
  if len(set(keys)) != len(keys):
    raise _Damaged('it lists a storage twice')
  for key in set(keys) ^ set(used):
    raise _Damaged(f'its value and its list disagree on storage {shown(key)}')
  return {key: used[key] for key in keys}


def _places(
  file: BinaryIO, at: int, size: int, storages: Mapping[str, Storage]
) -> dict[str, int]:
  """{key: where its elements begin}; they fill the file to its last byte."""
  places = {}
  for key, storage in storages.items():
    file.seek(at)
    head = file.read(_COUNT)
    if len(head) < _COUNT:
      raise _Damaged(f'it ends before storage {shown(key)}')
    count = int.from_bytes(head, 'little', signed=True)
    if count != storage.count:
      raise _Damaged(
        f'storage {shown(key)} has {count} elements, and its tensors want '
        f'{storage.count}'
      )
    places[key] = at + _COUNT
    at = places[key] + count * storage.dtype.itemsize
    if at > size:
      raise _Damaged(f'it ends inside storage {shown(key)}')
  if at < size:
    raise _Damaged(f'{size - at} bytes follow its last storage')
  return places


def _read(path: pathlib.Path, at: int, count: int, where: str) -> bytes:
  try:
    with path.open('rb') as file:
      file.seek(at)
      found = file.read(count)
  except OSError as e:
    raise UserError(f'{path} cannot be read: {e.strerror}') from None
  if len(found) != count:
    raise UserError(f'{where} ends early: the file has changed; fetch it again')
  return found
