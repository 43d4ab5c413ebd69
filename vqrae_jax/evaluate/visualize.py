"""Pictures for people: originals above reconstructions, labelled."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vqrae_jax.files import Path, atomic_write

GAP, BAND, INK, PAPER = 6, 22, (30, 30, 30), (255, 255, 255)


def to_uint8(images: np.ndarray) -> np.ndarray:
  """f[… 3] to uint8, clipped to [0, 1] and rounded, NaN black."""
  unit = np.clip(np.nan_to_num(np.asarray(images, np.float32)), 0, 1)
  return np.round(unit * 255).astype(np.uint8)


def _text(draw, xy, text, width, font) -> None:
  while text and draw.textlength(text, font) > width:
    text = text[:-2] + '…' if len(text) > 2 else ''
  draw.text(xy, text, INK, font)


def comparison(
  originals: Sequence[np.ndarray],
  reconstructions: Sequence[np.ndarray],
  labels: Sequence[str],
  title: str,
) -> Image.Image:
  """One column an image: the original, below it the reconstruction.

  Args:
    originals, reconstructions: uint8 [h w 3] each, of any sizes.
    labels: a line below each column.
    title: a line above all.
  """
  font = ImageFont.load_default(13)
  widths = [max(o.shape[1], 120) for o in originals]
  height = max(o.shape[0] for o in originals)
  side = 118
  page = Image.new(
    'RGB',
    (
      side + sum(widths) + GAP * (len(widths) + 1),
      2 * (height + GAP) + 3 * BAND,
    ),
    PAPER,
  )
  draw = ImageDraw.Draw(page)
  _text(draw, (GAP, 4), title, page.width - 2 * GAP, font)
  rows = (BAND, BAND + height + GAP)
  for label, top in zip(('original', 'reconstruction'), rows, strict=True):
    _text(draw, (GAP, top + height // 2), label, side - GAP, font)
  left = side + GAP
  for i, width in enumerate(widths):
    for image, top in zip(
      (originals[i], reconstructions[i]), rows, strict=True
    ):
      page.paste(Image.fromarray(image), (left, top))
    _text(draw, (left, rows[1] + height + 4), labels[i], width, font)
    left += width + GAP
  return page


def spread(n: int, most: int) -> list[int]:
  """At most `most` of n places, evenly."""
  m = min(most, n)
  return [i * n // m for i in range(m)]


def save_png(image: Image.Image, path: Path) -> None:
  """Writes a PNG, its folder made if absent."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with atomic_write(path) as file:
    image.save(file, format='PNG')


def grid(originals: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
  """uint8 [2h n*w 3]: a row of originals above a row of reconstructions."""
  rows = [np.concatenate(list(x), axis=1) for x in (originals, reconstructions)]
  return np.concatenate(rows, axis=0)
