"""Images in ArrayRecord files.

A record is the bytes of an encoded image, or a tf.train.Example with one in a
bytes feature. Arrays of raw pixels are not read.

Examples are read without tensorflow: the wire format is protobuf's
(protobuf.dev/programming-guides/encoding), the messages are those of
tensorflow/core/example/{example,feature}.proto: Example holds Features in
field 1, Features a map<string, Feature> in field 1, and a Feature's field 1 is
a BytesList, whose field 1 are the values.
"""

import concurrent.futures
import io
import pathlib
from collections.abc import Iterator

from vqrae_jax.data.decode import EncodedImages, ImageDecodeError, is_encoded
from vqrae_jax.data.listing import Listing
from vqrae_jax.errors import UserError

# As TFDS, the TFRecord convention and webdataset call an encoded image.
KEYS = ('image', 'image/encoded', 'jpg', 'jpeg', 'png', 'webp')


def image_bytes(record: bytes) -> bytes:
  """The first value of the first feature of `KEYS` that there is.

  Raises:
    ValueError: no Example, or none of `KEYS` in it.
  """
  try:
    features = _bytes_features(memoryview(record))
  except (IndexError, ValueError):
    raise ValueError(
      'a record that is neither an encoded image nor a tf.train.Example'
    ) from None
  for key in KEYS:
    if features.get(key):
      return features[key]
  held = ', '.join(sorted(features)[:8]) or 'none'
  raise ValueError(
    f'its tf.train.Example has none of the bytes features {", ".join(KEYS)}; '
    f'it has {held}'
  )


def _bytes_features(record: memoryview) -> dict[str, bytes]:
  found = {}
  for features in _fields(record, 1):
    for entry in _fields(features, 1):
      key = b''.join(_fields(entry, 1)).decode()
      for feature in _fields(entry, 2):
        for values in _fields(feature, 1):
          first = next(_fields(values, 1), None)
          if first is not None:
            found[key] = bytes(first)
  return found


def _fields(message: memoryview, number: int) -> Iterator[memoryview]:
  """What the length-delimited fields of this number hold."""
  at = 0
  while at < len(message):
    tag, at = _varint(message, at)
    kind = tag & 7
    if kind == 0:
      _, at = _varint(message, at)
      continue
    if kind == 2:
      size, at = _varint(message, at)
    elif kind in (1, 5):
      size = 8 if kind == 1 else 4
    else:
      raise ValueError(f'wire type {kind}')
    if at + size > len(message):
      raise ValueError('a field ends after its message')
    if kind == 2 and tag >> 3 == number:
      yield message[at : at + size]
    at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
  value, shift = 0, 0
  while True:
    byte = message[at]
    value |= (byte & 0x7F) << shift
    at, shift = at + 1, shift + 7
    if byte < 0x80:
      return value, at
    if shift > 63:
      raise ValueError('a number of over 64 bits')


class Records(EncodedImages):
  """The records of many files, file after file.

  `name(i)` is "file:record", counted from 0; `names` are "file-record".
  """

  def __init__(self, listing: Listing):
    """Opens every file to count its records.

    Raises:
      UserError: a file that is no ArrayRecord, or no record in any.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      self._sources = list(pool.map(_source, listing.paths))
    super().__init__(listing, [len(source) for source in self._sources])
    if not len(self):
      raise UserError(f'the ArrayRecord file {self.paths[0]} holds no record')

  def _name(self, row: int) -> str:
    file, record = self._place(row)
    return f'{self._listing.names[file]}:{record}'

  def _title(self, row: int) -> str:
    file, record = self._place(row)
    return f'{pathlib.PurePath(self._listing.names[file]).stem}-{record}'

  def _open(self, row: int) -> io.BytesIO:
    file, record = self._place(row)
    try:
      data = self._sources[file][record]
      if data and not is_encoded(data):
        data = image_bytes(data)
    # RuntimeError: array_record found the record damaged.
    except (RuntimeError, ValueError) as e:
      raise ImageDecodeError(self._where(row), e) from None
    return io.BytesIO(data)


def _source(path: pathlib.Path):
  # Opened here, not at import: it is needed for such files only.
  from array_record.python import array_record_data_source

  try:
    return array_record_data_source.ArrayRecordDataSource([str(path)])
  except RuntimeError as e:
    why = ' '.join(str(e).split()) or 'it is truncated or no ArrayRecord'
    raise UserError(f'cannot read the ArrayRecord file {path}: {why}') from None
