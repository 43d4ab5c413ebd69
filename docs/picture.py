"""The picture at the top of README.md, of the quick-start's tokenizer.

    python docs/picture.py runs/quickstart/tokenizer

Photographs that the run has not seen: original, tokens as colours, what is
decoded from them.
"""

import pathlib
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import vqrae_jax
from vqrae_jax.data import pipeline, sources
from vqrae_jax.evaluate import evaluator, visualize

NAMES, SIDE, GAP, BAND = ('chelsea', 'coffee'), 256, 8, 26
LABELS = ('image', 'tokens, a colour for each code', 'decoded from the tokens')


def row(tokenizer, variables, image: np.ndarray) -> list[np.ndarray]:
  """uint8 [side side 3] each, in the order of LABELS."""
  tile = min(tokenizer.native_size)
  image, recon = evaluator.reconstruct_tiled(tokenizer, variables, image, tile)
  tiles = pipeline.tiles(image, (tile, tile))
  out = vqrae_jax.reconstruct(tokenizer, variables, tiles)
  z_q = pipeline.join_tiles(out.quantizer.z_q, image.shape[1] // tile)
  (tokens,) = visualize.token_map(z_q[None], image.shape[:2])
  return [image, tokens, visualize.to_uint8(recon)]


def main(folder: str) -> None:
  tokenizer, variables = vqrae_jax.load_tokenizer(folder)
  photos = sources.open_source('bundled:photos')
  found = {photos.names[i]: image for i, image in pipeline.each_image(photos)}
  font = ImageFont.load_default(15)
  size = (3 * SIDE + 2 * GAP, BAND + len(NAMES) * (SIDE + GAP) - GAP)
  page = Image.new('RGB', size, 'white')
  draw = ImageDraw.Draw(page)
  for i, label in enumerate(LABELS):
    draw.text((i * (SIDE + GAP), 4), label, (60, 60, 60), font)
  for j, name in enumerate(NAMES):
    image = found[name]
    top, left = ((n - SIDE) // 2 for n in image.shape[:2])
    image = image[top : top + SIDE, left : left + SIDE]
    for i, cell in enumerate(row(tokenizer, variables, image)):
      at = (i * (SIDE + GAP), BAND + j * (SIDE + GAP))
      page.paste(Image.fromarray(cell), at)
  visualize.save_png(page, pathlib.Path(__file__).parent / 'images/tokens.png')


if __name__ == '__main__':
  main(sys.argv[1])
