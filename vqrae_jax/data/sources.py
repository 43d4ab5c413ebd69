"""Where images come from: random access, uint8 RGB [h w 3] on the host.

`open_source` takes the `DATA` of every command line: a folder, a file, a glob
or a brace pattern of image files, tar shards or ArrayRecord files, or
`bundled:photos`, the images in the scikit-image and scikit-learn wheels
(nothing is downloaded).
"""

import difflib
import fnmatch
import importlib.util
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vqrae_jax.data.decode import EncodedImages, read_bytes
from vqrae_jax.data.listing import Listing, images_at, list_data
from vqrae_jax.data.records import Records
from vqrae_jax.data.tar import TarShards
from vqrae_jax.errors import UserError


class ImageFiles(EncodedImages):
  """A list of image files, decoded on access.

  `name(i)` is the path below the folder; `names` are the files' stems. The
  classes are the sub-folders directly below the folder, in sorted order, if
  there are at least two and no image lies beside them.
  """

  def __init__(self, listing: Listing, keep: bool = False):
    """`keep` holds decoded images in memory: for a few files only."""
    super().__init__(listing, [len(listing.names)])
    self._kept: dict[tuple, Image.Image] | None = {} if keep else None
    folders = sorted({_folder(name) for name in listing.names})
    if listing.classes and len(folders) > 1 and '' not in folders:
      self.classes = folders
      self._numbers = {name: i for i, name in enumerate(folders)}

  def _bytes(self, row: int) -> bytes:
    # In few calls: in each, another thread may take the interpreter.
    file = os.open(where := self._where(row), os.O_RDONLY)
    try:
      return read_bytes(file, 0, os.fstat(file).st_size, where)
    finally:
      os.close(file)

  def _name(self, row: int) -> str:
    return self._listing.names[row]

  _key = _name

  def _title(self, row: int) -> str:
    return pathlib.PurePath(self._name(row)).stem

  def _label(self, row: int) -> int | None:
    return self.classes and self._numbers[_folder(self._name(row))]

  def picture(self, index: int) -> Image.Image:
    """See `EncodedImages`."""
    if self._kept is None:
      return super().picture(index)
    key = int(self._rows[index]), self._decoding
    if key not in self._kept:
      self._kept[key] = super().picture(index)
    return self._kept[key]


def _folder(name: str) -> str:
  """The first folder of a relative path; '' if it has none."""
  first, slash, _ = name.partition('/')
  return first if slash else ''


# Package, folder inside it, its colour images.
_BUNDLED = (
  (
    'skimage',
    'data',
    'astronaut.png chelsea.png coffee.png hubble_deep_field.jpg ihc.png '
    'motorcycle_left.png motorcycle_right.png retina.jpg rocket.jpg',
  ),
  ('sklearn', 'datasets/images', 'china.jpg flower.jpg'),
)
_KINDS = {'image': ImageFiles, 'tar': TarShards, 'record': Records}


def _bundled() -> list[pathlib.Path]:
  paths = []
  for module, folder, names in _BUNDLED:
    spec = importlib.util.find_spec(module)
    if spec is None:
      raise UserError(
        'data "bundled:photos" needs the scikit-image and scikit-learn wheels: '
        "pip install 'vqrae_jax[demo]'"
      )
    root = pathlib.Path(spec.submodule_search_locations[0]) / folder
    paths += [root / name for name in names.split() if (root / name).exists()]
  return sorted(paths, key=lambda p: p.stem)


def list_source(data: str) -> Listing:
  """The files that `data`, as in `open_source`, names; none is opened.

  Raises:
    UserError: nothing there, or files of several kinds.
  """
  if data == 'bundled:photos':
    return images_at(_bundled())
  if data.startswith('bundled:'):
    raise UserError(f'unknown data "{data}"; did you mean "bundled:photos"?')
  return list_data(data)


def open_listing(listing: Listing) -> EncodedImages:
  """The images in the files of a listing.

  Raises:
    UserError: a file that cannot be opened, or no image in any.
  """
  return _KINDS[listing.kind](listing)


def spread(n: int, most: int) -> list[int]:
  """At most `most` of n places, evenly: listings go class by class."""
  m = min(most, n)
  return [i * n // m for i in range(m)]


def choose_images(
  source: EncodedImages, images: int | None, data: str
) -> list[int]:
  """The images of a source that --images asks for, all if it is not given.

  Raises:
    UserError: `data` holds fewer.
  """
  if images and images > len(source):
    raise UserError(f'--images={images}, but "{data}" holds only {len(source)}')
  return spread(len(source), images or len(source))


def open_source(
  data: str, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> EncodedImages:
  """The images that `data` names.

  Args:
    data: "bundled:photos", a folder (searched recursively), a file, a glob, or
      a shell's brace pattern, "train-{000..010}.tar".
    include: globs, one of which an image's short name (`EncodedImages.names`)
      must match, or one with a "/" its full name; () for all images.
    exclude: globs of the same form, none of which may match.

  Raises:
    UserError: nothing there, no image left, files of several kinds, a file that
      cannot be opened, or a glob that matches nothing.
  """
  found = list_source(data)
  if data.startswith('bundled:'):
    source = ImageFiles(found, keep=True)
  else:
    source = open_listing(found)
  if not (include or exclude):
    return source
  names, patterns, paths = source.names, (*include, *exclude), []
  if any('/' in p for p in patterns):
    paths = [source.name(i) for i in range(len(source))]
  matches = np.array(
    [
      [fnmatch.fnmatch(n, p) for n in (paths if '/' in p else names)]
      for p in patterns
    ]
  )
  for i, (pattern, row) in enumerate(zip(patterns, matches, strict=True)):
    if not row.any():
      key = 'include' if i < len(include) else 'exclude'
      near = difflib.get_close_matches(pattern, names[:50], n=1) or names
      raise UserError(
        f'{key}=("{pattern}",) names no image of "{data}": a glob is of names, '
        f'such as "{near[0]}", or, if it has a "/", of paths, such as '
        f'"{source.name(0)}"; "()" clears it'
      )
  kept = ~matches[len(include) :].any(0)
  if include:
    kept &= matches[: len(include)].any(0)
  if not kept.any():
    raise UserError(
      f'data "{data}" holds no image that include and exclude leave'
    )
  return source.select(kept)
