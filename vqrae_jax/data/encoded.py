"""Photographs that lie somewhere as encoded bytes: what all sources share.

A source says how to open row i and what it is called; decoding, sizes, names
and the choice of some rows are here.
"""

import copy
import fnmatch
import io
import pathlib
from collections.abc import Sequence

import numpy as np

from vqrae_jax.data import decode


class EncodedImages:
  """Random access to uint8 [h w 3]; safe to read from many threads.

  Attributes:
    paths: the files read, in order.
  """

  paths: list[pathlib.Path]

  def __init__(self, rows: int):
    """`rows`: how many photographs there are before any is left out."""
    self._rows = np.arange(rows)

  def _open(self, row: int) -> io.IOBase:
    """The encoded bytes; raises `Unreadable` or OSError."""
    raise NotImplementedError

  def _name(self, row: int) -> str:
    raise NotImplementedError

  def _title(self, row: int) -> str:
    raise NotImplementedError

  def _where(self, row: int) -> str:
    raise NotImplementedError

  def __len__(self) -> int:
    return len(self._rows)

  def name(self, index: int) -> str:
    """What tells this photograph from all others of the source."""
    return self._name(int(self._rows[index]))

  @property
  def names(self) -> list[str]:
    """What photographs are called in tables and on pictures."""
    return [self._title(row) for row in self._rows.tolist()]

  def __getitem__(self, index: int) -> np.ndarray:
    """uint8 [h w 3], upright.

    Raises:
      Unreadable: it cannot be opened or decoded.
      UserError: the source as a whole is not what it was.
    """
    return self._read(index, decode.decode)

  def size(self, index: int) -> tuple[int, int]:
    """(h, w) from the header; a quarter turn by EXIF counts."""
    return self._read(index, decode.size)

  def _read(self, index, read):
    row = int(self._rows[index])
    where = self._where(row)
    try:
      with self._open(row) as file:
        return read(file, where)
    except OSError as e:
      decode.refuse_if_ours(e)
      raise decode.Unreadable(where, e.strerror or e) from None

  def matching(self, patterns: Sequence[str]) -> np.ndarray:
    """bool [patterns n]: which names match which glob."""
    found = np.zeros((len(patterns), len(self)), bool)
    for i, row in enumerate(self._rows.tolist()):
      title = self._title(row)
      found[:, i] = [fnmatch.fnmatch(title, p) for p in patterns]
    return found

  def shared_with(self, other: 'EncodedImages') -> int:
    """How many of these photographs, by where they lie, are in `other` too."""
    places = {self._where(row) for row in self._rows.tolist()}
    return sum(other._where(row) in places for row in other._rows.tolist())

  def select(self, kept: np.ndarray) -> 'EncodedImages':
    """The same source with only the photographs of a bool [n]."""
    chosen = copy.copy(self)
    chosen._rows = self._rows[kept]
    return chosen
