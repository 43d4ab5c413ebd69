"""What a run shows of itself on the way: pictures, and figures of held-out
tiles, both of the averaged weights.

The images are fixed: tiles spread evenly over the held-out photographs, or,
without an `eval.source`, the run's first ones. Every host takes part, since
parameters may lie over all of them.
"""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image

from vqrae_jax import sharding
from vqrae_jax.evaluate import evaluator, pictures
from vqrae_jax.train import state as state_lib
from vqrae_jax.train.run import Run, host_copy

SHOWN = 8
LARGE = 128  # pixels: smaller images are enlarged by a whole number


class Shown:
  """A run's fixed images and what its weights make of them.

  Attributes:
    images: uint8 [m h w 3], at most 8, for the pictures.
  """

  def __init__(self, run: Run, frozen: Any):
    self._run, self._frozen = run, frozen
    if run.spec.eval is None:
      if run.spec.log.images_every:
        logging.info('pictures are of training images: there is no eval.source')
      first = run.place(run.batches.batch(0))['images']
      self.images = host_copy(first, run.mesh)[:SHOWN]
      return
    photographs = [
      run.held_out[i] for i in pictures.spread(len(run.held_out), SHOWN)
    ]
    tiles = evaluator.tiles_of(photographs, run.spec.eval.tile)
    self.images = tiles[pictures.spread(len(tiles), SHOWN)]

  @functools.cached_property
  def _tiles(self) -> np.ndarray:
    return evaluator.tiles_of(self._run.held_out, self._run.spec.eval.tile)

  def _variables(self, state: Any) -> Any:
    return state_lib.variables_of(state, self._frozen, ema=True)

  def picture(self, state: Any) -> np.ndarray:
    """uint8 [2h m*w 3]: the images above their reconstructions."""
    painted = _reconstruct(
      self._run.tokenizer, self._variables(state), self.images
    )
    painted = host_copy(painted, self._run.mesh)
    return pictures.grid(self.images, pictures.to_uint8(painted))

  def figures(self, state: Any) -> dict[str, float]:
    """{"eval/psnr", "eval/ssim", …} of all held-out tiles, through indices."""
    mesh, spec = self._run.mesh, self._run.spec.eval
    # Whole rows for every device.
    batch = -(-spec.batch_size // mesh.size) * mesh.size
    over = sharding.batch_sharding(mesh)

    def place(rows):
      return jax.make_array_from_callback(rows.shape, over, rows.__getitem__)

    measured, _ = evaluator.measure(
      self._run.tokenizer,
      self._variables(state),
      self._tiles,
      batch,
      place=place,
      read=lambda x: host_copy(x, mesh),
    )
    return {f'eval/{name}': x for name, x in measured.results().items()}


def save(picture: np.ndarray, workdir: pathlib.Path, step: int) -> None:
  """Writes workdir/pictures/STEP.png, on process 0; small images enlarged."""
  if not jax.process_index():
    path = workdir / 'pictures' / f'{step:08d}.png'
    times = max(LARGE // (len(picture) // 2), 1)
    picture = picture.repeat(times, 0).repeat(times, 1)
    pictures.save_png(Image.fromarray(picture), path)


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(tokenizer, variables, images):
  return tokenizer.apply(variables, images).images
