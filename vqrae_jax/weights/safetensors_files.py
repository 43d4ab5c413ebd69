"""`.safetensors` weights: one file, or shards under an index.

The library reads the header at opening and maps the rest; a block is sliced
out of the map. Shards are whole only together: the index names every key's
file, and both are compared before a value is read. Writing goes array by
array too: the library would want all of them at once.
"""

import json
import math
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vqrae_jax.errors import UserError
from vqrae_jax.weights import handles

# The format's names of types that weights have.
_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U8': np.uint8,
  'BOOL': np.bool_,
}


def open_safetensors(path: pathlib.Path) -> handles.Source:
  """The arrays of one `.safetensors` file, by name.

  Raises:
    UserError: no whole file of this format.
  """
  try:
    file = safe_open(str(path), framework='numpy')
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
  except (SafetensorError, OSError, ValueError) as e:
    words = ' '.join(str(e).split())[:120]
    raise UserError(
      f'{path} is truncated or damaged, no whole .safetensors file ({words}); '
      'fetch or save it again'
    ) from None
  found = {k: _handle(path, file, k, part) for k, part in slices.items()}
  return handles.Source(str(path), found)


def _handle(path: pathlib.Path, file, key: str, part) -> handles.Handle:
  dtype = _DTYPES.get(part.get_dtype())
  if dtype is None:
    raise UserError(
      f'{path}: "{key}" is of type {part.get_dtype()}, which is not read; '
      f'there are: {", ".join(_DTYPES)}'
    )

  def fetch(block: handles.Bounds) -> np.ndarray:
    try:
      if not block:
        return np.asarray(file.get_tensor(key))
      return np.asarray(part[tuple(slice(*pair) for pair in block)])
    except (SafetensorError, OSError, ValueError) as e:
      words = ' '.join(str(e).split())[:120]
      raise UserError(f'{path}: "{key}" cannot be read ({words})') from None

  return handles.Handle(tuple(part.get_shape()), np.dtype(dtype), fetch)


def write_safetensors(
  path: pathlib.Path,
  shapes: Mapping[str, Any],
  read: Callable[[str], np.ndarray],
) -> None:
  """Writes one `.safetensors` file; no two of its arrays are held at once.

  Args:
    path: the file, replaced if it is there.
    shapes: {name: has .shape and .dtype}.
    read: name -> its array, of that shape and type; called in order of names.
  """
  words = {np.dtype(dtype): word for word, dtype in _DTYPES.items()}
  header, at = {}, 0
  for name in sorted(shapes):
    dtype = np.dtype(shapes[name].dtype)
    shape = [int(n) for n in shapes[name].shape]
    end = at + math.prod(shape) * dtype.itemsize
    header[name] = dict(dtype=words[dtype], shape=shape, data_offsets=[at, end])
    at = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # values begin at a multiple of 8
  with path.open('wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for name, told in header.items():
      array = read(name)
      same = list(array.shape) == told['shape']
      if not same or array.dtype != np.dtype(shapes[name].dtype):
        raise ValueError(f'{name} is {array.dtype}{array.shape}, not {told}')
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
