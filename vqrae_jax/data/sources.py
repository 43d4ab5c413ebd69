"""Where photographs come from: random access, uint8 RGB [h w 3] on the host.

`open_source` reads the one `DATA` word that every command line takes: an
image folder, a glob of image files, or `bundled:photos`, the photographs that
the scikit-image and scikit-learn wheels carry (nothing is downloaded).
"""

import fnmatch
import glob
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vqrae_jax.errors import UserError, did_you_mean

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff')

# Wheel, folder inside it, photographs in colour.
_BUNDLED = (
  (
    'skimage',
    'data',
    (
      'astronaut.png',
      'chelsea.png',
      'coffee.png',
      'hubble_deep_field.jpg',
      'ihc.png',
      'motorcycle_left.png',
      'motorcycle_right.png',
      'retina.jpg',
      'rocket.jpg',
    ),
  ),
  ('sklearn', 'datasets/images', ('china.jpg', 'flower.jpg')),
)


def read_image(path: pathlib.Path) -> np.ndarray:
  """One file as uint8 [h w 3], upright by its EXIF orientation.

  Raises:
    UserError: the file cannot be opened or decoded.
  """
  try:
    with Image.open(path) as image:
      return _to_rgb(ImageOps.exif_transpose(image))
  except _UNREADABLE as e:
    raise UserError(f'cannot read the image {path}: {e}') from None


_UNREADABLE = (
  OSError,
  UnidentifiedImageError,
  SyntaxError,
  ValueError,
  Image.DecompressionBombError,
)


def _to_rgb(image: Image.Image) -> np.ndarray:
  """Any mode as uint8 [h w 3]: 16 bits scaled down, alpha over white."""
  if image.mode.startswith('I;16'):
    grey = np.round(np.asarray(image).astype(np.float32) / 257)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
  if image.mode in ('I', 'F'):
    raise ValueError(f'values of mode {image.mode} have no known range')
  if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
    image = image.convert('RGBA')
    page = Image.new('RGBA', image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(page, image)
  return np.asarray(image.convert('RGB'))


@runtime_checkable
class Photographs(Protocol):
  """What the pipeline reads: random access to uint8 [h w 3]."""

  def __len__(self) -> int:
    """How many there are."""

  def __getitem__(self, index: int) -> np.ndarray:
    """uint8 [h w 3]."""


class ImageFiles:
  """A sorted list of image files, decoded on access.

  Attributes:
    paths: the files, in the order of their indices.
    names: what the files are called in tables and on pictures.
  """

  def __init__(self, paths: Sequence[pathlib.Path], keep: bool = False):
    """`keep` holds decoded photographs in memory: for a few files only."""
    self.paths = list(paths)
    self.names = [p.stem for p in self.paths]
    self._kept: dict[int, np.ndarray] | None = {} if keep else None

  def size(self, index: int) -> tuple[int, int]:
    """(h, w) from the file's header; a quarter turn by EXIF counts."""
    try:
      with Image.open(self.paths[index]) as image:
        w, h = image.size
        turned = image.getexif().get(0x0112, 1) >= 5
    except _UNREADABLE as e:
      raise UserError(
        f'cannot read the image {self.paths[index]}: {e}'
      ) from None
    return (w, h) if turned else (h, w)

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> np.ndarray:
    if self._kept is None:
      return read_image(self.paths[index])
    if index not in self._kept:
      self._kept[index] = read_image(self.paths[index])
    return self._kept[index]


def _bundled() -> list[pathlib.Path]:
  paths = []
  for module, folder, names in _BUNDLED:
    spec = importlib.util.find_spec(module)
    if spec is None:
      raise UserError(
        'data "bundled:photos" are photographs of the scikit-image and '
        "scikit-learn wheels; install them: pip install 'vqrae_jax[demo]'"
      )
    root = pathlib.Path(spec.submodule_search_locations[0]) / folder
    paths += [root / name for name in names if (root / name).exists()]
  return sorted(paths, key=lambda p: p.stem)


def _listed(data: str) -> list[pathlib.Path]:
  path = pathlib.Path(data).expanduser()
  if path.is_dir():
    found = path.rglob('*')
  elif path.is_file():
    found = [path]
  else:
    found = [pathlib.Path(p) for p in glob.glob(str(path), recursive=True)]
    if not found:
      raise UserError(
        f'data "{data}" is no folder, file, glob or "bundled:photos"'
      )
  return sorted(p for p in found if p.suffix.lower() in EXTENSIONS)


def open_source(
  data: str, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> ImageFiles:
  """The photographs that `data` names.

  Args:
    data: "bundled:photos", a folder (searched in depth), a file or a glob.
    include: if given, only names (file stems) that match one of these globs.
    exclude: no names that match one of these globs.

  Raises:
    UserError: nothing there, nothing left, or a glob that matches nothing.
  """
  bundled = data.startswith('bundled:')
  if bundled and data != 'bundled:photos':
    raise UserError(f'unknown data "{data}"; did you mean "bundled:photos"?')
  paths = _bundled() if bundled else _listed(data)
  names = [p.stem for p in paths]
  for pattern in (*include, *exclude):
    if not fnmatch.filter(names, pattern):
      raise UserError(
        f'no photograph of "{data}" is named "{pattern}"'
        f'{did_you_mean(pattern, names[:50])}'
      )

  def wanted(name):
    kept = not include or any(fnmatch.fnmatch(name, p) for p in include)
    return kept and not any(fnmatch.fnmatch(name, p) for p in exclude)

  paths = [p for p in paths if wanted(p.stem)]
  if not paths:
    raise UserError(
      f'data "{data}" holds no image ({", ".join(EXTENSIONS)}) to read'
    )
  return ImageFiles(paths, keep=bundled)
