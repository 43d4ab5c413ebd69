"""Decodes an image from bytes in memory to uint8 RGB [h w 3].

The header is read first: an image above `MAX_PIXELS` is rejected before its
pixels take memory. Grey, palette, CMYK and 16-bit images become RGB, alpha is
composited over white, the first frame of an animation is taken, and EXIF
orientation is applied. Whatever cannot be decoded, as 32-bit modes, raises
`ImageDecodeError`, with a one-line reason.

Formats are detected by content, not by name, and only `FORMATS` are tried:
Pillow's other readers never see a file.
"""

import bisect
import contextlib
import copy
import errno
import functools
import importlib.util
import io
import itertools
import os
import pathlib
import types
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

# For their readers: Pillow loads these two only when asked.
from PIL import TiffImagePlugin, WebPImagePlugin  # noqa: F401, isort: skip

from vqrae_jax.data.listing import Listing
from vqrae_jax.errors import UserError

DECODERS = ('pil', 'simplejpeg')  # of JPEG; Pillow reads all else
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF')
MAX_PIXELS = 100_000_000
# More than `MAX_PIXELS` take uncompressed.
_MAX_BYTES = 1 << 30
_TOO_MANY = f'are above the {MAX_PIXELS:,} that are decoded'

# Pillow warns at 89 million pixels and raises at 179 million; `MAX_PIXELS` lies
# between. It also warns of damaged EXIF whenever it reads decodable pixels.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
warnings.filterwarnings('ignore', category=UserWarning, module=r'PIL\.')

_ORIENTATION = 0x0112
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


class ImageDecodeError(UserError):
  """An image that cannot be opened or decoded.

  Attributes:
    where: the image's name in the message.
    reason: the message without that name.
  """

  def __init__(self, where: str, reason: object):
    # One line, whatever the library's message.
    self.where, self.reason = where, ' '.join(str(reason).split())[:200]
    super().__init__(f'cannot read the image {where}: {self.reason}')


class NoImageError(UserError):
  """Files that hold no image that can be read."""


def decode(
  data: bytes, where: str, decoder: str = 'pil', side: int = MAX_PIXELS
) -> Image.Image:
  """Decodes a file's bytes to RGB, upright.

  Args:
    data: all bytes of the file.
    where: the image's name, for errors.
    decoder: one of `DECODERS`. simplejpeg decodes a JPEG at a fraction of its
      size if both sides stay at least `side` pixels; at full size its pixels
      equal Pillow's, if both include the same libjpeg-turbo.
    side: for simplejpeg.

  Raises:
    ImageDecodeError: not an image, damaged, too large, or of a mode without a
      known range.
  """
  return _attempt(data, where, functools.partial(_pixels, data, decoder, side))


def size(data: bytes, where: str) -> tuple[int, int]:
  """(h, w) of the upright image at full size, from the header alone.

  Raises:
    ImageDecodeError: as `decode`.
  """
  return _attempt(data, where, _upright_size)


def is_encoded(data: bytes) -> bool:
  """Whether bytes begin as one of `FORMATS` does."""
  starts = (b'\xff\xd8\xff', b'\x89PNG', b'BM', b'GIF8', b'II', b'MM')
  return data.startswith(starts) or (
    data[:4] == b'RIFF' and data[8:12] == b'WEBP'
  )


def refuse_if_ours(error: OSError) -> None:
  """Re-raises an error of the process: no file handle or memory left."""
  if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
    raise error


def read_bytes(file: int, start: int, size: int, where: str) -> bytes:
  """`size` bytes of a file descriptor from `start`, in one read if possible.

  Raises:
    ImageDecodeError: more than 1 GiB, or the file ends early.
  """
  if size > _MAX_BYTES:
    raise ImageDecodeError(where, f'{size:,} bytes are too many')
  parts = []
  # Some file systems return less than requested.
  while size and (part := os.pread(file, size, start)):
    parts.append(part)
    start, size = start + len(part), size - len(part)
  if size:
    raise ImageDecodeError(where, f'{size:,} bytes are missing')
  return b''.join(parts)


def _attempt(data, where, read):
  if not data:
    raise ImageDecodeError(where, 'an empty file of 0 bytes')
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      w, h = image.size
      if w * h > MAX_PIXELS:
        raise ImageDecodeError(where, f'{h}x{w} pixels {_TOO_MANY}')
      return read(image)
  except ImageDecodeError:
    raise
  except UnidentifiedImageError:
    reason = f'its content is none of {", ".join(FORMATS)}'
    raise ImageDecodeError(where, reason) from None
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    raise ImageDecodeError(where, f'its pixels {_TOO_MANY}') from None
  except MemoryError:  # Pillow's, for a row of over 2^31 bits
    raise ImageDecodeError(where, 'too large for Pillow to decode') from None
  # Damaged bytes raise anything in Pillow: struct.error, KeyError, zlib's.
  except Exception as e:
    if isinstance(e, OSError):
      refuse_if_ours(e)
    raise ImageDecodeError(where, str(e) or type(e).__name__) from None


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(_ORIENTATION, 1)
  except Exception:  # Damaged EXIF: the pixels are still decoded.
    return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
  w, h = image.size
  # Pillow rotates a TIFF itself and reports the rotated size.
  turned = image.format != 'TIFF' and _orientation(image) in (5, 6, 7, 8)
  return (w, h) if turned else (h, w)


def _loaded(data, decoder: str, side: int, image: Image.Image) -> Image.Image:
  jpeg = image.format in ('JPEG', 'MPO') and image.mode in ('L', 'RGB')
  if decoder == 'simplejpeg' and jpeg:
    import simplejpeg

    # If it fails, Pillow may succeed or gives the reason.
    with contextlib.suppress(ValueError):
      return Image.fromarray(
        simplejpeg.decode_jpeg(
          data,
          fastdct=False,
          fastupsample=False,
          min_height=side,
          min_width=side,
        )
      )
  image.load()
  return image


def _pixels(data, decoder: str, side: int, image: Image.Image) -> Image.Image:
  loaded = _loaded(data, decoder, side, image)
  # After loading: by then a TIFF is upright and has no orientation.
  turn = _UPRIGHT.get(_orientation(image))
  image = _to_rgb(loaded if turn is None else loaded.transpose(turn))
  if not all(image.size):
    raise ValueError('a side of no pixels, {1}x{0}'.format(*image.size))
  return image


def _to_rgb(image: Image.Image) -> Image.Image:
  """Any mode as RGB: 16 bits scaled down, alpha over white."""
  if image.mode.startswith('I;16'):
    grey = np.round(np.asarray(image).astype(np.float32) / 257)
    return Image.fromarray(grey.astype(np.uint8)).convert('RGB')
  if image.mode in ('I', 'F'):
    raise ValueError(f'values of mode {image.mode} have no known range')
  alpha = image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La')
  if alpha or 'transparency' in image.info:
    image = image.convert('RGBA')
    page = Image.new('RGBA', image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(page, image)
  # `convert` would copy an image that is RGB already.
  return image if image.mode == 'RGB' else image.convert('RGB')


class EncodedImages:
  """Random access to uint8 [h w 3]; safe to read from many threads.

  The base class of sources of encoded bytes: decoding, sizes, names, labels and
  selection. A subclass adds `_bytes(row)`, which returns an encoded image or
  raises `ImageDecodeError` or OSError, `_name(row)`, `_title(row)`, `_key(row)`
  and `_label(row)`.

  Attributes:
    classes: the names of labels 0, 1, …; None where labels have no names.
    damaged: {file: why} of tars that end early; their images before that are
      used.
  """

  classes: list[str] | None = None
  damaged: Mapping[str, str] = types.MappingProxyType({})
  _decoding: tuple = ('pil',)  # arguments of `decode`

  def __init__(self, listing: Listing, counts: Sequence[int]):
    """`counts`: the number of images in each file, or one total."""
    self._listing = listing
    self._starts = list(itertools.accumulate(counts, initial=0))
    self._rows = np.arange(self._starts[-1])

  @property
  def paths(self) -> list[pathlib.Path]:
    """All files of the source, in order, selected or not."""
    return self._listing.paths

  def _place(self, row: int) -> tuple[int, int]:
    """(file, image in it) of a row."""
    file = bisect.bisect_right(self._starts, row) - 1
    return file, row - self._starts[file]

  def _where(self, row: int) -> str:
    return os.path.join(self._listing.root, self._name(row))

  def __len__(self) -> int:
    return len(self._rows)

  def name(self, index: int) -> str:
    """The unique name of an image in the source."""
    return self._name(int(self._rows[index]))

  def key(self, index: int) -> str:
    """The name of an image in its folder or file: a path, a tar's member, the
    number of a record."""
    return self._key(int(self._rows[index]))

  @property
  def names(self) -> list[str]:
    """Short names, for tables, pictures and `open_source`'s globs."""
    return [self._title(row) for row in self._rows.tolist()]

  def label(self, index: int) -> int | None:
    """The class of an image as the source has it, or None.

    Raises:
      ImageDecodeError: it lies in a record that cannot be read.
    """
    return self._label(int(self._rows[index]))

  def __getitem__(self, index: int) -> np.ndarray:
    """uint8 [h w 3], upright; raises as `picture` does."""
    return np.asarray(self.picture(index))

  def picture(self, index: int) -> Image.Image:
    """The same as a PIL image, which crops without a copy.

    Raises:
      ImageDecodeError: it cannot be opened or decoded.
      UserError: the source has changed since it was opened.
      OSError: the process has no file handle or memory left.
    """
    return self._read(index, lambda *args: decode(*args, *self._decoding))

  def size(self, index: int) -> tuple[int, int]:
    """(h, w) from the header, upright; raises as `picture` does."""
    return self._read(index, size)

  def _read(self, index, read):
    row = int(self._rows[index])
    where = self._where(row)
    try:
      return read(self._bytes(row), where)
    except OSError as e:
      refuse_if_ours(e)
      raise ImageDecodeError(where, e.strerror or e) from None

  def shared_with(self, other: 'EncodedImages') -> int:
    """How many of these images, by path, are in `other` too."""

    def places(source):
      root = os.path.realpath(source._listing.root)  # however it is spelled
      rows = source._rows.tolist()
      return [os.path.join(root, source._name(row)) for row in rows]

    mine = {*places(self)}
    return sum(place in mine for place in places(other))

  def decoded_by(self, decoder: str, side: int) -> 'EncodedImages':
    """The same source, decoded with these arguments of `decode`.

    Raises:
      UserError: the decoder is not installed.
    """
    if decoder == 'simplejpeg' and not importlib.util.find_spec(decoder):
      raise UserError(
        'decoder="simplejpeg" needs a package that is not installed: pip '
        'install \'vqrae_jax[fast_jpeg]\', or take "pil"'
      )
    chosen = copy.copy(self)
    chosen._decoding = decoder, side
    return chosen

  def select(self, kept: np.ndarray) -> 'EncodedImages':
    """The same source with the images where `kept`, bool [n], is True."""
    chosen = copy.copy(self)
    chosen._rows = self._rows[kept]
    return chosen
