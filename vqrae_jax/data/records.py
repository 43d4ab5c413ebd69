"""Images in ArrayRecord files.

A record is the bytes of an encoded image, or a tf.train.Example with one in a
bytes feature and perhaps a label in an int64 feature. Arrays of raw pixels are
not read.
"""

import concurrent.futures
import contextlib
import pathlib
from collections.abc import Iterator

from vqrae_jax.data.decode import (
  EncodedImages,
  ImageDecodeError,
  NoImageError,
  is_encoded,
)
from vqrae_jax.data.listing import Listing
from vqrae_jax.tokens import example

# Features of an encoded image in TFDS, the TFRecord convention and webdataset.
KEYS = ('image', 'image/encoded', 'jpg', 'jpeg', 'png', 'webp')
# Features of a label in TFDS and the TFRecord convention (which counts from 1).
LABELS = ('label', 'image/class/label')


def _first_values(record: bytes, kind: type) -> dict:
  """{feature: its first value} of an Example's features of type `kind`.

  Raises:
    ValueError: not an Example.
  """
  try:
    features = example.decode(record)
  except ValueError:
    raise ValueError(
      'a record that is neither an encoded image nor a tf.train.Example'
    ) from None
  first = {key: values[0] for key, values in features.items() if values}
  return {key: value for key, value in first.items() if type(value) is kind}


def image_bytes(record: bytes) -> bytes:
  """The first value of the first of `KEYS` that is not empty.

  Raises:
    ValueError: not an Example, or none of `KEYS` in it.
  """
  features = _first_values(record, bytes)
  for key in KEYS:
    if features.get(key):
      return features[key]
  held = ', '.join(sorted(features)[:8]) or 'none'
  raise ValueError(
    f'its tf.train.Example has none of the bytes features {", ".join(KEYS)}; '
    f'it has {held}'
  )


def label_of(record: bytes) -> int | None:
  """The first value of the first of `LABELS` that the record has, or None.

  Raises:
    ValueError: not an Example.
  """
  features = _first_values(record, int)
  return next((features[key] for key in LABELS if key in features), None)


class Records(EncodedImages):
  """The records of many files, file after file.

  `name(i)` is "file:record", counted from 0; `names` are "file-record".
  """

  def __init__(self, listing: Listing):
    """Opens every file to count its records.

    Raises:
      NoImageError: a file that is not an ArrayRecord, or no record in any.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      self._sources = list(pool.map(_source, listing.paths))
    super().__init__(listing, [len(source) for source in self._sources])
    if not len(self):
      first, *rest = self.paths
      more = f', nor do {len(rest)} others' * bool(rest)
      raise NoImageError(f'the ArrayRecord file {first} holds no record{more}')

  def _name(self, row: int) -> str:
    file, record = self._place(row)
    return f'{self._listing.names[file]}:{record}'

  def _key(self, row: int) -> str:
    return str(self._place(row)[1])

  def _title(self, row: int) -> str:
    file, record = self._place(row)
    return f'{pathlib.PurePath(self._listing.names[file]).stem}-{record}'

  def _bytes(self, row: int) -> bytes:
    with self._named_errors(row):
      data = self._record(row)
      return image_bytes(data) if _is_example(data) else data

  def _label(self, row: int) -> int | None:
    with self._named_errors(row):
      data = self._record(row)
      return label_of(data) if _is_example(data) else None

  def _record(self, row: int) -> bytes:
    file, record = self._place(row)
    return self._sources[file][record]

  @contextlib.contextmanager
  def _named_errors(self, row: int) -> Iterator[None]:
    try:
      yield
    # RuntimeError: array_record found the record damaged.
    except (RuntimeError, ValueError) as e:
      raise ImageDecodeError(self._where(row), e) from None


def _is_example(data: bytes) -> bool:
  return bool(data) and not is_encoded(data)


def _source(path: pathlib.Path):
  # Imported here: only such files need it.
  from array_record.python import array_record_data_source

  try:
    return array_record_data_source.ArrayRecordDataSource([str(path)])
  except RuntimeError as e:
    why = ' '.join(str(e).split()) or 'it is truncated or not an ArrayRecord'
    raise NoImageError(
      f'cannot read the ArrayRecord file {path}: {why}'
    ) from None
