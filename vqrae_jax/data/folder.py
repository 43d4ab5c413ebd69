"""Image files on disk, opened one by one as they are asked for."""

import io
import os
import pathlib

import numpy as np

from vqrae_jax.data.encoded import EncodedImages
from vqrae_jax.data.listing import Listing


class ImageFiles(EncodedImages):
  """A list of image files, decoded on access.

  `name(i)` is the path below the folder; `names` are the file's stems.
  """

  def __init__(self, listing: Listing, keep: bool = False):
    """`keep` holds decoded photographs in memory: for a few files only."""
    super().__init__(len(listing.names))
    self._listing = listing
    self._kept: dict[int, np.ndarray] | None = {} if keep else None

  @property
  def paths(self) -> list[pathlib.Path]:
    """The files, in the order of their indices; made anew at each call."""
    return [pathlib.Path(self._where(row)) for row in self._rows.tolist()]

  def _open(self, row: int) -> io.IOBase:
    return open(self._where(row), 'rb')

  def _name(self, row: int) -> str:
    return self._listing.names[row]

  def _title(self, row: int) -> str:
    return pathlib.PurePath(self._name(row)).stem

  def _where(self, row: int) -> str:
    return os.path.join(self._listing.root, self._name(row))

  def __getitem__(self, index: int) -> np.ndarray:
    """uint8 [h w 3]; see `EncodedImages`."""
    if self._kept is None:
      return super().__getitem__(index)
    row = int(self._rows[index])
    if row not in self._kept:
      self._kept[row] = super().__getitem__(index)
    return self._kept[row]
