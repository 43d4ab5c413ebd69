"""Lazy arrays by key: what every reader of weight files returns.

Opening a file reads names, shapes and types; `Handle.read` reads values, and
only those of the slice asked for. What it does not do: know a file format
(the readers beside it do) or a model (`rules.py`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

# One (start, stop) per axis, with 0 <= start <= stop <= size.
Bounds = tuple[tuple[int, int], ...]


def shown(key: object) -> str:
  """A name out of a file, fit to stand in a line of an error."""
  line = ''.join(c if c.isprintable() else '?' for c in str(key)[:90])
  return line if len(line) < 90 else line + '…'


def bounds(index: Sequence[slice] | None, shape: Sequence[int]) -> Bounds:
  """Slices of step one, as `jax.make_array_from_callback` gives them, as
  numbers; axes beyond the last slice are whole."""
  index = tuple(index or ())
  if len(index) > len(shape) or any(s.step not in (None, 1) for s in index):
    raise ValueError(f'{index} is no block of an array of shape {shape}')
  index += (slice(None),) * (len(shape) - len(index))
  pairs = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
  return tuple((start, max(start, stop)) for start, stop in pairs)


@dataclasses.dataclass(frozen=True, eq=False)
class Handle:
  """An array in a file: its shape, its type, and how to read a block of it."""

  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[Bounds], np.ndarray]

  def read(self, index: Sequence[slice] | None = None) -> np.ndarray:
    """The block `index` (all of it: None), in the file's own type.

    Raises:
      UserError: the file is damaged there.
    """
    block = bounds(index, self.shape)
    shape = tuple(stop - start for start, stop in block)
    if 0 in shape:
      return np.zeros(shape, self.dtype)
    return self.fetch(block)


class Source(Mapping):
  """{key: Handle} of one file or one set of shards.

  `name` is the file's, for errors; `note` says what was chosen in it and what
  was left out, for logs.
  """

  def __init__(self, name: str, handles: Mapping[str, Handle], note: str = ''):
    self.name = name
    self.note = note
    self._handles = dict(handles)

  def __getitem__(self, key: str) -> Handle:
    return self._handles[key]

  def __iter__(self) -> Iterator[str]:
    return iter(self._handles)

  def __len__(self) -> int:
    return len(self._handles)

  def __repr__(self) -> str:
    return f'Source({self.name!r}, {len(self)} arrays)'


def arrays(name: str, values: Mapping[str, np.ndarray]) -> Source:
  """A source over arrays in memory, so that they pass the same checks."""

  def handle(value: np.ndarray) -> Handle:
    def fetch(block: Bounds) -> np.ndarray:
      return np.asarray(value[tuple(slice(*pair) for pair in block)])

    return Handle(tuple(value.shape), value.dtype, fetch)

  return Source(name, {k: handle(np.asarray(v)) for k, v in values.items()})


def strided(
  read: Callable[[int, int], bytes],
  shape: Sequence[int],
  dtype: np.dtype,
  strides: Sequence[int],
  offset: int = 0,
  swap: bool = False,
) -> Handle:
  """An array of any strides inside a run of bytes.

  A block is read as the one range of bytes that spans it, so rows of a
  contiguous array cost what they weigh.

  Args:
    read: (first byte, last byte + 1) -> bytes.
    shape: the array's.
    dtype: native type of an element.
    strides: elements, not bytes, from one index to the next, not negative.
    offset: elements before the first.
    swap: whether the bytes of each element are in the other order.
  """
  size = dtype.itemsize
  word = np.dtype(f'<u{size}')

  def fetch(block: Bounds) -> np.ndarray:
    first = offset + sum(
      start * step for (start, _), step in zip(block, strides, strict=True)
    )
    counts = tuple(stop - start for start, stop in block)
    span = 1 + sum(
      (n - 1) * step for n, step in zip(counts, strides, strict=True)
    )
    flat = np.frombuffer(read(first * size, (first + span) * size), word)
    if swap:
      flat = flat.byteswap()
    view = np.lib.stride_tricks.as_strided(
      flat.view(dtype), counts, [s * size for s in strides], writeable=False
    )
    return np.ascontiguousarray(view).reshape(counts)

  return Handle(tuple(shape), dtype, fetch)


def extent(shape: Sequence[int], strides: Sequence[int], offset: int) -> int:
  """Elements from a storage's start to the end of a strided array in it."""
  if 0 in shape:
    return offset
  return (
    offset
    + 1
    + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
  )


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
  """Strides, in elements, of a C-ordered array."""
  return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
