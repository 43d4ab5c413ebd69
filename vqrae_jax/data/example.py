"""The encoded image of a serialized tf.train.Example, without tensorflow.

The wire format is protobuf's (protobuf.dev/programming-guides/encoding); the
messages are tensorflow/core/example/{example,feature}.proto: Example holds
Features in field 1, Features a map<string, Feature> in field 1, and a
Feature's field 1 is a BytesList, whose field 1 are the values.
"""

from collections.abc import Iterator

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
