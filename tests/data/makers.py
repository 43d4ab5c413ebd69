"""Small images, folders, tars and ArrayRecord files for the tests."""

import io
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

from vqrae_jax.data import decode


def photo(i, h=20, w=24):
  """uint8 [h w 3], another for each i."""
  rng = np.random.default_rng(i)
  return rng.integers(0, 256, (h, w, 3), dtype=np.uint8)


def encoded(image, form='PNG', **keys):
  """The bytes of a file of a PIL image."""
  out = io.BytesIO()
  image.save(out, form, **keys)
  return out.getvalue()


def png(i, h=20, w=24):
  return encoded(Image.fromarray(photo(i, h, w)), compress_level=1)


def colours(mode='RGB', h=9, w=8):
  """A PIL image: red above, blue below."""
  image = Image.new('RGB', (w, h), (250, 10, 10))
  image.paste((10, 10, 250), (0, h - h // 2, w, h))
  return image.convert(mode)


def _promise(h, w):
  """A PNG whose header promises h x w pixels, and holds none."""

  def chunk(kind, data):
    crc = zlib.crc32(kind + data)
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', crc)

  header = struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)
  parts = (b'IHDR', header), (b'IDAT', zlib.compress(b'')), (b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*p) for p in parts)


def _cut(form):
  data = encoded(Image.fromarray(photo(0, 64, 64)), form)
  return data[: len(data) * 2 // 3]


def _deep(kind):
  """An image of 16 bits."""
  return Image.fromarray(np.full((9, 8), 40000, kind))


# {file: its bytes}, of every kind that becomes RGB; 9x8.
GOOD = {
  'wörds and spaces.JPG': encoded(colours(), 'JPEG'),
  'grey.jpg': encoded(colours('L'), 'JPEG'),
  'cmyk.jpg': encoded(colours('CMYK'), 'JPEG'),
  'progressive.jpg': encoded(colours(), 'JPEG', progressive=True),
  'two.jpg': encoded(
    colours(), 'MPO', save_all=True, append_images=[colours()]
  ),
  'grey.png': encoded(colours('L')),
  'bits.png': encoded(colours('1')),
  'palette.png': encoded(colours('P')),
  'clear palette.png': encoded(colours('P'), transparency=0),
  'grey alpha.png': encoded(colours('LA')),
  'alpha.png': encoded(colours('RGBA')),
  'deep.png': encoded(_deep('u2')),
  'deep.tiff': encoded(_deep('u2'), 'TIFF'),
  'big-endian.tiff': encoded(_deep('>u2'), 'TIFF'),
  'lzw.tiff': encoded(colours(), 'TIFF', compression='tiff_lzw'),
  'cmyk.tiff': encoded(colours('CMYK'), 'TIFF'),
  'a bmp.jpeg': encoded(colours(), 'BMP'),
  'plain.webp': encoded(colours(), 'WEBP'),
  'plain.gif': encoded(colours('P'), 'GIF'),
}
_FLOATS = Image.fromarray(np.ones((2, 2), np.float32))
# {file: (its bytes, why it is no image)}. What is above the most pixels holds
# none: read before it is refused, it would be truncated.
BROKEN = {
  'zero.png': (b'', '0 bytes'),
  'page.jpeg': (b'<!doctype html><title>404</title>', 'none of JPEG, PNG'),
  'start.jpg': (b'\xff\xd8 no jpeg', 'none of JPEG'),
  'header.png': (GOOD['alpha.png'][:20], ''),
  'cut.jpg': (_cut('JPEG'), 'truncated'),
  'floats.tiff': (encoded(_FLOATS, 'TIFF'), 'mode F'),
  'huge.png': (_promise(10_001, 10_000), '10001x10000 .* 100,000,000'),
  'vast.png': (_promise(60_000, 60_000), '100,000,000'),
  # Pillow has no memory for a row of 2^31 bits.
  'wide.png': (_promise(1, 89_478_485), 'too large'),
  'ppm.png': (encoded(colours(), 'PPM'), 'none of JPEG'),
  **{f'cut {form}.png': (_cut(form), '') for form in decode.FORMATS[1:]},
}


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
