"""Pictures for people: originals above reconstructions, labelled."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vqrae_jax.data import sources
from vqrae_jax.files import Path, atomic_write

GAP, BAND, INK, PAPER = 6, 22, (30, 30, 30), (255, 255, 255)


def to_uint8(images: np.ndarray) -> np.ndarray:
  """f[… 3] to uint8, clipped to [0, 1] and rounded, NaN black."""
  unit = np.clip(np.nan_to_num(np.asarray(images, np.float32)), 0, 1)
  return np.round(unit * 255).astype(np.uint8)


def _text(draw, xy, text, width, font) -> None:
  text = ' '.join(text.split())  # one line
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


def enlarged(image: np.ndarray, side: int, least: int) -> np.ndarray:
  """A picture [h w 3] of images of `side` pixels, by a whole factor if those
  have fewer than `least`."""
  times = max(least // side, 1)
  return image.repeat(times, 0).repeat(times, 1)


def save_png(image: Image.Image, path: Path) -> None:
  """Writes a PNG, its folder made if absent."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with atomic_write(path) as file:
    image.save(file, format='PNG')


def grid(*rows: np.ndarray) -> np.ndarray:
  """uint8 [rows*h n*w 3]: rows of images uint8 [n h w 3], one above another."""
  return np.concatenate([np.concatenate(list(x), axis=1) for x in rows])


def token_map(
  latents: np.ndarray, size: tuple[int, int], like: np.ndarray | None = None
) -> np.ndarray:
  """Tokens as colours: uint8 [n h w 3], each token one flat rectangle.

  Red, green and blue are the three principal axes of the tokens, so that like
  codes have like colours, and one code has one colour.

  Args:
    latents: f[n gh gw d], what the decoder reads (`QuantizerOutput.z_q`).
    size: (h, w), multiples of (gh, gw).
    like: f[m _ _ d], whose axes and range are taken; those of `latents` if
      None.
  """
  n, gh, gw, d = latents.shape

  def rows(latents):
    return np.nan_to_num(np.asarray(latents, np.float64).reshape(-1, d))

  known = rows(latents if like is None else like)
  mean = known.mean(0)
  _, axes = np.linalg.eigh((known - mean).T @ (known - mean))
  axes = axes[:, ::-1][:, :3]
  axes = np.pad(axes, ((0, 0), (0, 3 - axes.shape[1])))  # of fewer channels
  known = (known - mean) @ axes
  # The sign of an axis is arbitrary.
  sign = np.where((known**3).sum(0) < 0, -1, 1)
  low, high = np.percentile(known * sign, (1, 99), axis=0)
  x = (rows(latents) - mean) @ axes * sign
  x = to_uint8((x - low) / np.maximum(high - low, 1e-12)).reshape(n, gh, gw, 3)
  return x.repeat(size[0] // gh, 1).repeat(size[1] // gw, 2)


# ----------------------------------------------------------------------------
# A codebook: a row of panels a table.

SCALE = 2  # drawn so many times larger, then shrunk: smooth edges
PANEL, PAD, ROW = (340, 240), (64, 26), 330
GREY, LIGHT, BLUE, RED = (120, 120, 120), (214, 214, 214), (31, 87, 158), (
  206, 60, 40,
)  # fmt: skip
MOST_ROWS = 8


class _Panel:
  """Axes at a place of the page, in page pixels; data go into the unit
  square, y upwards."""

  def __init__(self, draw, left, top, title):
    self.draw, self.left, self.top = draw, left + PAD[0], top + PAD[1]
    self.text((0, -22), title, size=13, ink=INK)
    self.box((0, 0), (1, 1), outline=GREY)

  def at(self, x, y):
    w, h = PANEL
    return (
      (self.left + x * w) * SCALE,
      (self.top + (1 - y) * h) * SCALE,
    )

  def box(self, low, high, **options):
    (x0, y1), (x1, y0) = self.at(*low), self.at(*high)
    self.draw.rectangle((x0, y0, x1, y1), **options)

  def line(self, points, fill, width=1.5):
    points = [self.at(x, y) for x, y in points]
    self.draw.line(points, fill, round(width * SCALE), joint='curve')

  def dots(self, points, colours, radius):
    for (x, y), colour in zip(points, colours, strict=True):
      px, py = self.at(x, y)
      r = radius * SCALE
      self.draw.ellipse((px - r, py - r, px + r, py + r), fill=colour)

  def text(self, offset, text, size=11, ink=GREY, anchor='la'):
    """At page pixels from the panel's top left."""
    font = ImageFont.load_default(size * SCALE)
    xy = ((self.left + offset[0]) * SCALE, (self.top + offset[1]) * SCALE)
    self.draw.text(xy, text, ink, font, anchor=anchor)

  def x_label(self, x, text):
    self.text((x * PANEL[0], PANEL[1] + 5), text, anchor='ma')

  def y_label(self, y, text):
    self.text((-6, (1 - y) * PANEL[1]), text, anchor='rm')


def _usage_panel(draw, left, top, figures) -> None:
  """Sorted counts, log, with a line where even use would be."""
  panel = _Panel(draw, left, top, 'tokens of each code, most used first')
  counts, k = np.asarray(figures['counts'], float), figures['codes']
  if not len(counts):
    return
  decades = max(int(np.ceil(np.log10(counts[0] + 1))), 1)

  def height(n):  # a count of one lies above the axis
    return (np.log10(n) + 0.3) / (decades + 0.3)

  even = figures['tokens'] / k
  if even >= 1:
    panel.line([(0, height(even)), (1, height(even))], LIGHT)
    panel.text(
      (PANEL[0] - 6, (1 - height(even)) * PANEL[1] - 3), 'even use', anchor='rd'
    )
  if figures['used'] < k:
    panel.box((len(counts) / k, 0), (1, 0.02), fill=RED)
    # Beside the curve's foot, wherever that is.
    place = (len(counts) / k + 1) / 2
    xy = min(max(place, 0.2), 0.8) * PANEL[0], 0.93 * PANEL[1]
    panel.text(xy, f'{k - figures["used"]:,} never used', ink=RED, anchor='md')
  shown = np.unique(np.linspace(0, len(counts) - 1, 400).astype(int))
  points = [((i + j) / k, height(counts[i])) for i in shown for j in (0, 1)]
  if figures['used'] < k:
    points.append((len(counts) / k, 0.0))
  panel.line(points, BLUE, 2)
  for d in range(decades + 1):
    panel.y_label(height(10.0**d), f'{10**d:,}')
  for x in (0, 0.5, 1):
    panel.x_label(x, f'{round(x * k):,}')


def _margin_panel(draw, left, top, figures) -> None:
  panel = _Panel(draw, left, top, 'margin of tokens, in mean distances')
  margins = figures['margins']
  if margins is None:
    panel.text((PANEL[0] / 2, PANEL[1] / 2), 'no distances', anchor='mm')
    return
  shares, edges = margins['shares'], margins['edges']
  most = max(shares) * 1.15
  for i, share in enumerate(shares):
    low, high = (i + 0.08) / len(shares), (i + 0.92) / len(shares)
    panel.box((low, 0), (high, share / most), fill=BLUE)
    xy = (low + high) / 2 * PANEL[0], (1 - share / most) * PANEL[1] - 2
    if share:
      digits = 1 if share < 0.0995 else 0
      panel.text(xy, f'{100 * share:.{digits}f} %', anchor='md')
    panel.x_label(i / len(shares), f'{edges[i]:g}')


def _levels_panel(draw, left, top, figures) -> None:
  """A row a channel, a cell a level, as dark as its share."""
  panel = _Panel(draw, left, top, 'share of tokens at each level of a channel')
  rows = figures['levels']
  for i, shares in enumerate(rows):
    low, high = 1 - (i + 0.95) / len(rows), 1 - (i + 0.05) / len(rows)
    for j, share in enumerate(shares):
      ends = j / len(shares) + 0.003, (j + 1) / len(shares) - 0.003
      fill = _blend(share / max(shares)) if share else PAPER
      outline = None if share else RED
      panel.box((ends[0], low), (ends[1], high), fill=fill, outline=outline)
    if len(rows) <= 16 or i % (len(rows) // 8) == 0:
      panel.y_label((low + high) / 2, f'{i}')
  panel.x_label(0.5, 'levels, low to high; never used ones in red')


def _blend(share: float) -> tuple[int, int, int]:
  """Pale to dark blue."""
  pale, dark = np.array((190, 215, 240)), np.array((8, 48, 107))
  return tuple((pale + share * (dark - pale)).astype(int).tolist())


def _map_panel(draw, left, top, table, sample, counts) -> None:
  """Codes and tokens on the two principal axes of both."""
  panel = _Panel(draw, left, top, '')
  table, sample = np.asarray(table, float), np.asarray(sample, float)
  finite = np.isfinite(table).all(-1)
  table, counts = table[finite], counts[finite]
  sample = sample[np.isfinite(sample).all(-1)]
  if not (len(table) and len(sample)):
    panel.text((PANEL[0] / 2, PANEL[1] / 2), 'nothing is finite', anchor='mm')
    return
  # As many of each: a large table would decide alone.
  both = np.concatenate(
    [table[sources.spread(len(table), len(sample))], sample]
  )
  mean = both.mean(0)
  variance, axes = np.linalg.eigh(
    np.cov((both - mean).T).reshape(*mean.shape * 2)
  )
  axes = axes[:, ::-1][:, :2]
  if axes.shape[1] < 2:  # codes of one channel
    axes = np.concatenate([axes, np.zeros_like(axes)], 1)
  share = variance[::-1][:2].sum() / max(variance.sum(), 1e-30)
  name = f'codes and tokens, principal axes ({100 * share:.0f} % of variance)'
  panel.text((0, -22), name, size=13, ink=INK)
  codes, tokens = ((x - mean) @ axes for x in (table, sample))
  low, high = np.percentile(
    np.concatenate([codes, tokens]), (0.5, 99.5), axis=0
  )
  low, high = (
    low - 0.08 * (high - low) - 1e-9,
    high + 0.08 * (high - low) + 1e-9,
  )

  def unit(x):
    x = (x - low) / (high - low)
    inside = ((x > 0.01) & (x < 0.99)).all(-1)
    return x, inside

  x, inside = unit(tokens)
  panel.dots(x[inside], [LIGHT] * int(inside.sum()), 1.3)
  x, inside = unit(codes)
  shade = np.log1p(counts) / max(np.log1p(counts.max()), 1e-9)
  order = np.argsort(counts)
  radius = 2.4 if len(codes) <= 2048 else 1.5
  for used in (False, True):  # the used ones above
    shown = [i for i in order if inside[i] and (counts[i] > 0) == used]
    colours = [_blend(shade[i]) if used else RED for i in shown]
    panel.dots(x[shown], colours, radius)
  legend = (LIGHT, 'tokens'), (RED, 'unused'), (_blend(0), 'rare'), (
    _blend(1), 'frequent',
  )  # fmt: skip
  for i, (colour, text) in enumerate(legend):
    at = i / 4 + 0.02
    panel.dots([(at, -0.05)], [colour], 3)
    panel.text((at * PANEL[0] + 7, 1.05 * PANEL[1]), text, anchor='lm')


def codebook_page(stages: Sequence[tuple], title: str) -> Image.Image:
  """The usage of each table, its tokens' margins (or its channels' levels) and
  a map of its codes.

  Args:
    stages: (`codebooks.Stage`, its figures) each; the first `MOST_ROWS` are
      shown.
    title: a line above all.
  """
  left_out = len(stages) - MOST_ROWS
  stages = stages[:MOST_ROWS]
  columns = 1 + max(
    2 if s.table is not None else int('levels' in f) for s, f in stages
  )
  width = columns * (PANEL[0] + PAD[0] + 14) + 30
  height = ROW * len(stages) + BAND + 30
  page = Image.new('RGB', (width * SCALE, height * SCALE), PAPER)
  draw = ImageDraw.Draw(page)
  font = ImageFont.load_default(15 * SCALE)
  if left_out > 0:
    title += f' (the first {MOST_ROWS} of {MOST_ROWS + left_out})'
  _text(draw, (20 * SCALE, 10 * SCALE), title, (width - 40) * SCALE, font)
  for i, (stage, figures) in enumerate(stages):
    top = BAND + 20 + i * ROW
    line = (
      f'{figures["used"]:,} of {figures["codes"]:,} codes used, perplexity '
      f'{figures["perplexity"]:.1f}, {figures["effective_bits"]:.2f} effective '
      f'bits of {figures["bits"]:.2f}'
    )
    line = f'{stage.name}: {line}' if stage.name else line
    small = ImageFont.load_default(12 * SCALE)
    _text(draw, (20 * SCALE, top * SCALE), line, (width - 40) * SCALE, small)
    places = [8 + j * (PANEL[0] + PAD[0] + 14) for j in range(3)]
    _usage_panel(draw, places[0], top + 24, figures)
    if 'levels' in figures:
      _levels_panel(draw, places[1], top + 24, figures)
    elif stage.table is not None:
      _margin_panel(draw, places[1], top + 24, figures)
      indices = stage.column('indices')
      counts = np.bincount(indices[indices >= 0], minlength=figures['codes'])
      _map_panel(draw, places[2], top + 24, stage.table, stage.sample, counts)
  return page.resize((width, height), Image.LANCZOS)
