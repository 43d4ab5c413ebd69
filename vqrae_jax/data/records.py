"""Photographs in ArrayRecord files: encoded images, or tf.train.Examples.

A record is the bytes of an image, or an Example with one in a bytes feature
(`example.py`). Arrays of raw pixels are not read.
"""

import concurrent.futures
import io
import pathlib

import numpy as np

from vqrae_jax.data import decode, example
from vqrae_jax.data.encoded import EncodedImages
from vqrae_jax.data.listing import Listing
from vqrae_jax.errors import UserError


class Records(EncodedImages):
  """The records of many files, file after file.

  `name(i)` is "file:record", counted from 0; `names` are "file-record".
  """

  def __init__(self, listing: Listing):
    """Opens every file to count its records.

    Raises:
      UserError: a file that is no ArrayRecord, or no record in any.
    """
    self.paths = listing.paths
    self._files = listing.names
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      self._sources = list(pool.map(_source, self.paths))
    self._starts = np.cumsum([0, *map(len, self._sources)])
    if not self._starts[-1]:
      raise UserError(f'the ArrayRecord file {self.paths[0]} holds no record')
    super().__init__(int(self._starts[-1]))

  def _place(self, row: int) -> tuple[int, int]:
    file = int(np.searchsorted(self._starts, row, side='right')) - 1
    return file, int(row - self._starts[file])

  def _name(self, row: int) -> str:
    file, record = self._place(row)
    return f'{self._files[file]}:{record}'

  def _title(self, row: int) -> str:
    file, record = self._place(row)
    return f'{pathlib.PurePath(self._files[file]).stem}-{record}'

  def _where(self, row: int) -> str:
    file, record = self._place(row)
    return f'{self.paths[file]}:{record}'

  def _open(self, row: int) -> io.BytesIO:
    file, record = self._place(row)
    try:
      data = self._sources[file][record]
      if not decode.is_encoded(data) and data:
        data = example.image_bytes(data)
    # RuntimeError: array_record found the record damaged.
    except (RuntimeError, ValueError) as e:
      raise decode.Unreadable(self._where(row), e) from None
    return io.BytesIO(data)


def _source(path: pathlib.Path):
  # Opened here, not at import: it is needed for such files only.
  from array_record.python import array_record_data_source

  try:
    return array_record_data_source.ArrayRecordDataSource([str(path)])
  except RuntimeError as e:
    why = ' '.join(str(e).split()) or 'it is truncated or no ArrayRecord'
    raise UserError(f'cannot read the ArrayRecord file {path}: {why}') from None
