"""PyTorch checkpoints (`.pt`, `.pth`, `.bin`) without PyTorch, and without
running their pickles.

Since PyTorch 1.6 a checkpoint is a zip of one pickle and one member of raw
bytes a storage; before, pickles and raw bytes one behind the other
(`torch_legacy.py`). Tensors become lazy handles over the bytes, so views and
shared storages are read as saved. Of a training file's sections the average
is preferred: "ema", else "model", else "state_dict", else the file itself.
"""

import math
import pathlib
from collections.abc import Callable
from typing import Any

from vqrae_jax.errors import UserError
from vqrae_jax.weights import handles, torch_legacy, torch_pickle
from vqrae_jax.weights.archive import Archive

SECTIONS = ('ema', 'model', 'state_dict')

_MEMBERS = (
  r'[^/]+/(data\.pkl|data/\d+|version|byteorder|\.format_version'
  r'|\.storage_alignment|\.data/serialization_id)'
)
# (storage, where) -> reads bytes [first, last) of it.
_Runs = Callable[[torch_pickle.Storage, str], torch_legacy.Run]


def open_torch(path: pathlib.Path) -> handles.Source:
  """The tensors of one checkpoint, by name; its first byte says the format.

  Raises:
    UserError: no whole checkpoint, or one that holds more than weights.
  """
  with path.open('rb') as file:
    pickled = file.read(1) == b'\x80'
  if pickled:
    value, runs = torch_legacy.open_legacy(path)
    swap = False
  else:
    value, runs, swap = _open_zip(path)
  tensors, note = _choose(value, path)
  found = {
    key: _handle(f'{path}: "{handles.shown(key)}"', tensor, runs, swap)
    for key, tensor in tensors.items()
  }
  return handles.Source(str(path), found, note)


def _open_zip(path: pathlib.Path) -> tuple[Any, _Runs, bool]:
  """A zip's value, its storages, and whether their bytes are big-endian."""
  archive = Archive(path, _MEMBERS, 'PyTorch checkpoint')
  tops = {name.split('/')[0] for name in archive.names}
  if len(tops) > 1:
    raise UserError(
      f'{path} holds {len(tops)} top folders, which no PyTorch checkpoint '
      'has; save the weights again'
    )
  (top,) = tops
  pickle = f'{top}/data.pkl'
  if pickle not in archive.names:
    raise UserError(f'{path} is no PyTorch checkpoint: it has no data.pkl')
  if archive.size(pickle) > torch_pickle.MAX_PICKLE:
    raise UserError(
      f'{path}: data.pkl has {archive.size(pickle)} bytes, more than names of '
      'weights need; save the weights alone, best as .safetensors'
    )
  swap = _is_big_endian(archive, top)
  value, _ = torch_pickle.parse(archive.read(pickle), str(path))

  def run(storage: torch_pickle.Storage, where: str) -> torch_legacy.Run:
    member = f'{top}/data/{storage.key[:20]}'
    if member not in archive.names:
      raise UserError(
        f'{where} lies in {member}, which is missing; the file is damaged'
      )
    if archive.size(member) != storage.count * storage.dtype.itemsize:
      raise UserError(
        f'{where} wants {storage.count} elements of {storage.dtype}, {member} '
        f'has {archive.size(member)} bytes; the file is damaged'
      )
    return lambda first, last: archive.read(member, first, last)

  return value, run, swap


def _is_big_endian(archive: Archive, top: str) -> bool:
  name = f'{top}/byteorder'
  if name not in archive.names:
    return False  # older than PyTorch 2.1, which always wrote little
  if archive.size(name) > 16:
    order = b'?'
  else:
    order = archive.read(name).strip()
  if order not in (b'little', b'big'):
    raise UserError(
      f'{archive.path} is damaged: its byte order is neither little nor big'
    )
  return order == b'big'


def _tensors(value: Any) -> dict[str, torch_pickle.Tensor]:
  if not isinstance(value, dict):
    return {}
  return {
    k: v
    for k, v in value.items()
    if isinstance(k, str) and isinstance(v, torch_pickle.Tensor)
  }


def _choose(
  value: Any, path: pathlib.Path
) -> tuple[dict[str, torch_pickle.Tensor], str]:
  """The section that holds the weights, and a line on what was taken."""
  if isinstance(value, torch_pickle.Tensor):
    raise UserError(f'{path} holds one tensor without a name; save a dict')
  if not isinstance(value, dict):
    raise UserError(
      f'{path} holds a {type(value).__name__}; save a dict of named tensors'
    )
  for name in SECTIONS:
    section = value.get(name)
    found = _tensors(section)
    if found:
      _no_more(section, f'{path} ["{name}"]')
      left = ', '.join(handles.shown(k) for k in value if k != name)
      return found, f'took "{name}"' + (f', left {left[:120]}' if left else '')
  found = _tensors(value)
  if not found:
    keys = ', '.join(map(handles.shown, list(value)[:6])) or 'nothing'
    raise UserError(
      f'{path} holds no named tensors (it has {keys}); they are looked for in '
      f'"ema", "model", "state_dict" and at the top'
    )
  _no_more(value, str(path))
  left = ', '.join(handles.shown(k) for k in value if k not in found)
  return found, f'left {left[:120]}' if left else ''


def _no_more(section: dict, where: str) -> None:
  """No tensors deeper down, which would be left out unseen."""
  for key, value in section.items():
    deeper = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple) and any(
      isinstance(v, torch_pickle.Tensor | dict) for v in deeper
    ):
      raise UserError(
        f'{where} holds tensors and, under "{handles.shown(key)}", further '
        'ones; save the weights alone, as one dict of named tensors'
      )


def _handle(
  where: str, tensor: torch_pickle.Tensor, runs: _Runs, swap: bool
) -> handles.Handle:
  storage = tensor.storage
  read = runs(storage, where)
  offset = storage.first + tensor.offset
  needed = handles.extent(tensor.shape, tensor.strides, offset)
  if needed > storage.stop or math.prod(tensor.shape) >= 1 << 48:
    raise UserError(
      f'{where} of shape {tensor.shape} reaches past its storage of '
      f'{storage.stop - storage.first} elements; the file is damaged'
    )
  return handles.strided(
    read, tensor.shape, storage.dtype, tensor.strides, offset, swap
  )
