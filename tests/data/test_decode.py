"""Every kind of image becomes RGB, or is refused with a reason of one line."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from vqrae_jax.data import decode
from vqrae_jax.errors import UserError

# pytest resets the filters that `decode` sets at import.
pytestmark = pytest.mark.filterwarnings('ignore')


def encoded(image, form='PNG', **keys):
  out = io.BytesIO()
  image.save(out, form, **keys)
  return out.getvalue()


def colours(mode='RGB', h=9, w=8):
  """Red above, blue below."""
  image = Image.new('RGB', (w, h), (250, 10, 10))
  image.paste((10, 10, 250), (0, h - h // 2, w, h))
  return image.convert(mode)


def png_of(h, w):
  """A PNG whose header promises h x w pixels, and holds none."""

  def chunk(kind, data):
    crc = zlib.crc32(kind + data)
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', crc)

  header = struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)
  parts = (b'IHDR', header), (b'IDAT', zlib.compress(b'')), (b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*p) for p in parts)


DEEP = Image.fromarray(np.full((9, 8), 40000, np.uint16))
GOOD = {
  'jpeg': encoded(colours(), 'JPEG'),
  'grey jpeg': encoded(colours('L'), 'JPEG'),
  'CMYK jpeg': encoded(colours('CMYK'), 'JPEG'),
  'progressive jpeg': encoded(colours(), 'JPEG', progressive=True),
  'grey': encoded(colours('L')),
  'bits': encoded(colours('1')),
  'palette': encoded(colours('P')),
  'palette with alpha': encoded(colours('P'), transparency=0),
  'grey with alpha': encoded(colours('LA')),
  'alpha': encoded(colours('RGBA')),
  '16 bits': encoded(DEEP),
  '16-bit tiff': encoded(DEEP, 'TIFF'),
  'big-endian tiff': encoded(
    Image.fromarray(np.full((9, 8), 40000, '>u2')), 'TIFF'
  ),
  'two images in one': encoded(
    colours(), 'MPO', save_all=True, append_images=[colours()]
  ),
  'lzw tiff': encoded(colours(), 'TIFF', compression='tiff_lzw'),
  'CMYK tiff': encoded(colours('CMYK'), 'TIFF'),
  'bmp': encoded(colours(), 'BMP'),
  'webp': encoded(colours(), 'WEBP'),
  'gif': encoded(colours('P'), 'GIF'),
}


@pytest.mark.parametrize('kind', GOOD)
def test_every_kind_becomes_rgb(kind):
  image = decode.decode(GOOD[kind], 'x')
  assert image.shape == (9, 8, 3) and image.dtype == np.uint8
  assert decode.size(GOOD[kind], 'x') == (9, 8)
  assert decode.is_encoded(GOOD[kind])
  if kind in ('CMYK jpeg', 'CMYK tiff', 'palette', 'alpha', 'bmp', 'webp'):
    # JPEG smears colours over two pixels.
    assert np.abs(image[0].astype(int) - (250, 10, 10)).max() < 25


@pytest.mark.parametrize('form', ('GIF', 'WEBP', 'PNG', 'TIFF'))
def test_of_an_animation_the_first_frame_is_taken(form):
  frames = [Image.new('RGB', (8, 9), (c, c, c)) for c in (200, 20, 90)]
  keys = dict(lossless=True) if form == 'WEBP' else {}
  data = encoded(
    frames[0], form, save_all=True, append_images=frames[1:], **keys
  )
  assert (decode.decode(data, 'x') == 200).all()


@pytest.mark.parametrize('form', ('JPEG', 'PNG', 'WEBP', 'TIFF'))
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_stand_upright_by_their_exif(form, orientation):
  image = colours()
  exif = image.getexif()
  exif[0x0112] = orientation
  keys = {'WEBP': dict(lossless=True), 'JPEG': dict(quality=95)}.get(form, {})
  data = encoded(image, form, exif=exif, **keys)
  with Image.open(io.BytesIO(data)) as file:
    want = np.asarray(ImageOps.exif_transpose(file))
  assert want.shape == ((8, 9, 3) if orientation > 4 else (9, 8, 3))
  np.testing.assert_array_equal(decode.decode(data, 'x'), want)
  assert decode.size(data, 'x') == want.shape[:2]


def test_16_bits_and_alpha_keep_their_meaning():
  ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
  found = decode.decode(encoded(Image.fromarray(ramp)), 'x')
  assert np.abs(found[0, :, 1].astype(int) - np.arange(256)).max() <= 1
  clear = encoded(Image.new('RGBA', (2, 2), (9, 9, 9, 0)))
  assert (decode.decode(clear, 'x') == 255).all()
  palette = Image.new('P', (2, 2), 1)
  palette.putpalette([0, 0, 0, 7, 80, 90])
  assert (decode.decode(encoded(palette), 'x') == (7, 80, 90)).all()
  clear = encoded(palette, transparency=1)
  assert (decode.decode(clear, 'x') == 255).all()


def noise(form):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
  data = encoded(Image.fromarray(pixels), form)
  return data[: len(data) * 2 // 3]


# Without a reason: any, in one line.
BAD = {
  'no bytes': (b'', '0 bytes'),
  'one byte': (b'\xff', 'none of JPEG'),
  'a web page': (b'<!doctype html><title>404</title>', 'none of JPEG, PNG'),
  'start alone': (b'\xff\xd8 no jpeg', 'none of JPEG'),
  'half a header': (GOOD['alpha'][:20], ''),
  'short jpeg': (noise('JPEG'), 'truncated'),
  'short png': (noise('PNG'), 'truncated'),
  'short webp': (noise('WEBP'), ''),
  'short gif': (noise('GIF'), 'truncated'),
  'short tiff': (noise('TIFF'), ''),
  'short bmp': (noise('BMP'), 'truncated'),
  'floats': (
    encoded(Image.fromarray(np.ones((2, 2), np.float32)), 'TIFF'), 'mode F',
  ),
  'huge': (png_of(10_001, 10_000), '10001x10000 .* 100,000,000'),
  'vast': (png_of(60_000, 60_000), '100,000,000'),
  # Pillow has no memory for a row of 2^31 bits.
  'wide': (png_of(1, 89_478_485), 'too large'),
  'another format': (encoded(colours(), 'PPM'), 'none of JPEG'),
  'a script': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'none of'),
}  # fmt: skip


@pytest.mark.parametrize('kind', BAD)
def test_what_cannot_be_decoded_says_why_in_one_line(kind):
  data, words = BAD[kind]
  with pytest.raises(decode.ImageDecodeError, match=words) as caught:
    decode.decode(data, 'shard.tar:x.jpg')
  e = caught.value
  assert isinstance(e, UserError)
  assert str(e) == f'cannot read the image shard.tar:x.jpg: {e.reason}'
  assert e.reason and '\n' not in e.reason and ' at 0x' not in e.reason


@pytest.mark.parametrize('kind', GOOD)
def test_damage_raises_nothing_else(kind):
  """Bytes changed, and cut, at places drawn at random."""
  rng = np.random.default_rng(0)
  for _ in range(40):
    data = bytearray(GOOD[kind])
    for at in rng.integers(0, len(data), 3):
      data[at] = rng.integers(256)
    data = bytes(data[: rng.integers(1, len(data) + 1)])
    for read in (decode.decode, decode.size):
      try:
        read(data, 'x')
      except decode.ImageDecodeError as e:
        assert e.reason


@pytest.mark.parametrize('form', ('PNG', 'TIFF'))
def test_16_bits_and_palettes_stand_upright_too(form):
  for image in (
    Image.fromarray(np.arange(72, dtype=np.uint16).reshape(9, 8) * 257),
    colours('P'),
    colours('LA'),
  ):
    exif = image.getexif()
    exif[0x0112] = 6
    found = decode.decode(encoded(image, form, exif=exif), 'x')
    plain = decode.decode(encoded(image, form), 'x')
    np.testing.assert_array_equal(found, np.rot90(plain, -1))


def test_damaged_exif_spoils_no_pixels():
  data = encoded(colours(), 'JPEG', exif=b'Exif\0\0II*\0\xff\xff\xff\xff')
  assert decode.decode(data, 'x').shape == (9, 8, 3)


def test_a_huge_image_is_refused_before_its_pixels_take_memory(monkeypatch):
  def load(self):
    raise AssertionError('decoded')

  monkeypatch.setattr(ImageFile.ImageFile, 'load', load)
  with pytest.raises(decode.ImageDecodeError, match='above'):
    decode.decode(BAD['huge'][0], 'x')


def test_no_warning_of_pillow_leaks():
  code = (
    'from vqrae_jax.data import decode; import sys\n'
    'try: decode.decode(sys.stdin.buffer.read(), "x")\n'
    'except decode.ImageDecodeError as e: print(e.reason)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    input=BAD['huge'][0], capture_output=True, check=True,
  )  # fmt: skip
  assert b'pixels' in done.stdout and not done.stderr
