"""Every kind of image becomes RGB, or is refused with a reason of one line."""

import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests import tiny
from tests.data.makers import BROKEN, GOOD, colours, encoded
from vqrae_jax.data import decode
from vqrae_jax.errors import UserError

# pytest resets the filters that `decode` sets at import.
pytestmark = pytest.mark.filterwarnings('ignore')


def decoded(data):
  return np.asarray(decode.decode(data, 'x'))


@pytest.mark.parametrize('name', GOOD)
def test_every_kind_becomes_rgb(name):
  image = decoded(GOOD[name])
  assert image.shape == (9, 8, 3) and image.dtype == np.uint8
  assert decode.size(GOOD[name], 'x') == (9, 8)
  assert decode.is_encoded(GOOD[name])
  if not any(kind in name for kind in ('grey', 'bits', 'clear', 'deep', 'big')):
    # JPEG smears colours over two pixels.
    assert np.abs(image[0].astype(int) - (250, 10, 10)).max() < 25


@pytest.mark.parametrize('form', ('GIF', 'WEBP', 'PNG', 'TIFF'))
def test_of_an_animation_the_first_frame_is_taken(form):
  first, *others = (Image.new('L', (8, 9), c) for c in (200, 20, 90))
  keys = dict(lossless=True) if form == 'WEBP' else {}
  data = encoded(first, form, save_all=True, append_images=others, **keys)
  assert (decoded(data) == 200).all()


@pytest.mark.parametrize('form', ('JPEG', 'PNG', 'WEBP', 'TIFF'))
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_stand_upright_by_their_exif(form, orientation):
  images = [colours()]
  if form in ('PNG', 'TIFF'):
    deep = np.arange(72, dtype=np.uint16).reshape(9, 8) * 257
    images += [Image.fromarray(deep), colours('P'), colours('LA')]
  for image in images:
    plain = Image.fromarray(decoded(encoded(image, form)))
    exif = plain.getexif()
    exif[0x0112] = orientation
    want = ImageOps.exif_transpose(plain)
    data = encoded(image, form, exif=exif)
    np.testing.assert_array_equal(decoded(data), want)
    assert decode.size(data, 'x') == want.size[::-1]


def test_16_bits_and_alpha_keep_their_meaning():
  ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
  found = decoded(encoded(Image.fromarray(ramp)))
  assert np.abs(found[0, :, 1].astype(int) - np.arange(256)).max() <= 1
  palette = Image.new('P', (2, 2), 1)
  palette.putpalette([0, 0, 0, 7, 80, 90])
  assert (decoded(encoded(palette)) == (7, 80, 90)).all()
  clear = encoded(Image.new('RGBA', (2, 2), (9, 9, 9, 0)))
  for data in (clear, encoded(palette, transparency=1)):
    assert (decoded(data) == 255).all()


@pytest.mark.parametrize('name', BROKEN)
def test_what_cannot_be_decoded_says_why_in_one_line(name):
  data, words = BROKEN[name]
  with pytest.raises(decode.ImageDecodeError, match=words) as caught:
    decode.decode(data, 'shard.tar:x.jpg')
  e = caught.value
  assert isinstance(e, UserError)
  assert str(e) == f'cannot read the image shard.tar:x.jpg: {e.reason}'
  assert e.reason and '\n' not in e.reason and ' at 0x' not in e.reason


@pytest.mark.parametrize('name', GOOD)
def test_damage_raises_nothing_else(name):
  """Bytes changed, and cut, at places drawn at random."""
  rng = np.random.default_rng(0)
  for _ in range(40):
    data = bytearray(GOOD[name])
    for at in rng.integers(0, len(data), 3):
      data[at] = rng.integers(256)
    data = bytes(data[: rng.integers(1, len(data) + 1)])
    for read in (decode.decode, decode.size):
      try:
        read(data, 'x')
      except decode.ImageDecodeError as e:
        assert e.reason


def test_damaged_exif_spoils_no_pixels():
  data = encoded(colours(), 'JPEG', exif=b'Exif\0\0II*\0\xff\xff\xff\xff')
  assert decoded(data).shape == (9, 8, 3)


def test_no_warning_of_pillow_leaks():
  code = (
    'from vqrae_jax.data import decode; import sys\n'
    'try: decode.decode(sys.stdin.buffer.read(), "x")\n'
    'except decode.ImageDecodeError as e: print(e.reason)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    input=BROKEN['huge.png'][0], capture_output=True, check=True,
  )  # fmt: skip
  assert b'pixels' in done.stdout and not done.stderr


@pytest.mark.parametrize('name', [*GOOD, *BROKEN])
def test_simplejpeg_reads_and_refuses_what_pillow_does(name):
  pytest.importorskip('simplejpeg')
  data = GOOD[name] if name in GOOD else BROKEN[name][0]
  if name in BROKEN:
    with pytest.raises(decode.ImageDecodeError) as want:
      decode.decode(data, 'x')
    with pytest.raises(decode.ImageDecodeError) as found:
      decode.decode(data, 'x', 'simplejpeg')
    assert str(found.value) == str(want.value)
    return
  found = np.asarray(decode.decode(data, 'x', 'simplejpeg'))
  np.testing.assert_array_equal(found, decoded(data))


@pytest.mark.parametrize('orientation', (1, 6))
def test_pixels_of_simplejpeg_are_pillows(orientation):
  """Where both carry the same libjpeg-turbo; a unit off where they do not."""
  simplejpeg = pytest.importorskip('simplejpeg')
  image = Image.fromarray(tiny.images(1, 75, 90)[0])
  exif = image.getexif()
  exif[0x0112] = orientation
  for subsampling, progressive in ((0, False), (2, False), (2, True)):
    keys = dict(subsampling=subsampling, progressive=progressive, exif=exif)
    data = encoded(image, 'JPEG', **keys)
    with mock.patch.object(
      simplejpeg, 'decode_jpeg', wraps=simplejpeg.decode_jpeg
    ) as used:
      found = np.asarray(decode.decode(data, 'x', 'simplejpeg'))
    assert used.call_count == 1
    off = np.abs(found.astype(int) - decoded(data))
    assert found.shape == decoded(data).shape and off.max() <= 1


def test_simplejpeg_shrinks_what_is_larger_than_needed():
  pytest.importorskip('simplejpeg')
  rows = np.linspace(0, 255, 400)[:, None, None] * np.ones((1, 600, 3))
  data = encoded(Image.fromarray(rows.astype(np.uint8)), 'JPEG', quality=95)
  sizes = [
    decode.decode(data, 'x', 'simplejpeg', side).size
    for side in (100, 101, 200, 401)
  ]
  assert sizes[0] == (150, 100) and sizes[2:] == [(300, 200), (600, 400)]
  assert 101 <= sizes[1][1] < 200
  small = decode.decode(data, 'x', 'simplejpeg', 100)
  want = decode.decode(data, 'x').reduce(4)
  off = np.abs(np.asarray(small).astype(int) - np.asarray(want))
  assert off.max() <= 3
  assert decode.size(data, 'x') == (400, 600)
