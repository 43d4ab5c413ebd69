"""Small images, folders, tars and ArrayRecord files for the tests."""

import io
import os
import tarfile
import time

import numpy as np
from PIL import Image


def photo(i, h=20, w=24):
  """uint8 [h w 3], another for each i."""
  rng = np.random.default_rng(i)
  return rng.integers(0, 256, (h, w, 3), dtype=np.uint8)


def png(i, h=20, w=24):
  out = io.BytesIO()
  Image.fromarray(photo(i, h, w)).save(out, 'PNG', compress_level=1)
  return out.getvalue()


def tar(path, members, form=tarfile.GNU_FORMAT):
  """Writes (name, bytes) pairs."""
  with tarfile.open(path, 'w', format=form) as file:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      file.addfile(info, io.BytesIO(data))
  return path


def array_record(path, records):
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()
  return path


def _field(number, data):
  """A length-delimited field of protobuf's wire format."""
  size = len(data)
  length = b''
  while size > 0x7F:
    length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
  return bytes([number << 3 | 2]) + length + bytes([size]) + data


def example(**features):
  """A tf.train.Example of bytes, or of ints."""
  entries = b''
  for key, value in features.items():
    if isinstance(value, bytes):
      feature = _field(1, _field(1, value))
    else:
      feature = _field(3, _field(1, bytes([value])))
    entry = _field(1, key.replace('__', '/').encode()) + _field(2, feature)
    entries += _field(1, entry)
  return _field(1, entries)


def settle(folder, seconds=60):
  """Sets times of a tree's folders and tars back: nothing just changed."""
  then = time.time() - seconds
  for where, _, files in os.walk(folder, topdown=False):
    for name in (*(f for f in files if f.endswith('.tar')), '.'):
      os.utime(os.path.join(where, name), (then, then))
