"""`.npz` weights, as big_vision publishes them: keys with "/", no pickle.

A member's header gives its shape and type; values are read when asked for.
bfloat16, which NumPy stores as two nameless bytes, is recognised.
"""

import io
import math
import pathlib

import ml_dtypes
import numpy as np

from vqrae_jax.errors import UserError
from vqrae_jax.weights import handles
from vqrae_jax.weights.archive import Archive

_NAMES = r'[^\0]+\.npy'
_HEADER = 1 << 14


def open_npz(path: pathlib.Path) -> handles.Source:
  """The arrays of one `.npz`, by name.

  Raises:
    UserError: no whole `.npz`, or one that holds Python objects.
  """
  archive = Archive(path, _NAMES, '.npz file of arrays')
  found = {
    name.removesuffix('.npy'): _handle(archive, name) for name in archive.names
  }
  return handles.Source(str(path), found)


def _handle(archive: Archive, name: str) -> handles.Handle:
  head = io.BytesIO(archive.head(name, _HEADER))
  where = f'{archive.path}: "{name.removesuffix(".npy")}"'
  readers = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }
  try:
    read = readers[np.lib.format.read_magic(head)]
    shape, fortran, dtype = read(head)
  except (ValueError, KeyError, EOFError, SyntaxError) as e:
    words = ' '.join(str(e).split())[:100]
    raise UserError(f'{where} is no array ({words}); save it again') from None
  if dtype.hasobject:
    raise UserError(
      f'{where} holds Python objects, which could run code; save arrays of '
      'numbers, each under its own name'
    )
  swap = dtype.byteorder == '>'
  if dtype == np.dtype('V2'):
    dtype = np.dtype(ml_dtypes.bfloat16)
  elif dtype.kind not in 'biuf' or dtype.itemsize > 8:
    raise UserError(f'{where} is of type {dtype}; weights are plain numbers')
  else:
    dtype = dtype.newbyteorder('=')
  start = head.tell()
  if archive.size(name) != start + math.prod(shape) * dtype.itemsize:
    raise UserError(
      f'{where} has a header for shape {shape} and another number of bytes; '
      'the file is damaged, fetch it again'
    )
  strides = handles.row_major(shape)
  if fortran:
    strides = handles.row_major(shape[::-1])[::-1]
  return handles.strided(
    lambda first, last: archive.read(name, start + first, start + last),
    shape,
    dtype,
    strides,
    swap=swap,
  )
