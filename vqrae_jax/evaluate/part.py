"""One host's part of an evaluation, saved to disk as it progresses.

A part holds sums and per-image results; the parts of all hosts merge into the
evaluation. It is written every minute, so that a stopped host can continue from
it, and hosts share only the folder of parts.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
import zipfile
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from vqrae_jax import sharding
from vqrae_jax.data import pipeline
from vqrae_jax.data.decode import EncodedImages, ImageDecodeError
from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import evaluator
from vqrae_jax.evaluate.fid import Moments
from vqrae_jax.evaluate.metrics import Sums
from vqrae_jax.files import atomic_write
from vqrae_jax.models.tokenizer import Tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.types import Tree

ROWS = 16  # images of a batch on each device
SAVE_EVERY_S = 60.0


@dataclasses.dataclass(frozen=True)
class Run:
  """What is measured: a tokenizer, the images `chosen` of a source, the size
  they are cropped to, the arrays of the networks."""

  tokenizer: Tokenizer
  variables: Tree
  source: EncodedImages
  chosen: list[int]
  sides: tuple[int, int]
  networks: Tree

  def cut(self, image: Any) -> np.ndarray:
    """An image's crop, uint8 [1 h w 3]."""
    return pipeline.centre_crop(image, self.sides, min(self.sides))[None]


@dataclasses.dataclass
class Part:
  """What one host has measured of its share of n images, or all hosts of all.

  Attributes:
    done: how many images have been read.
    sums: over the measured images.
    skipped: {name: reason} of images that cannot be read.
    measured: bool[n].
    psnr: f64[n], of each measured image.
    latents: f32[n 2 d], see `evaluator.Measured`; d is 0 without labels.
  """

  done: int
  sums: Sums
  skipped: dict[str, str]
  measured: np.ndarray
  psnr: np.ndarray
  latents: np.ndarray


_ARRAYS = ('measured', 'psnr', 'latents')


def _file(parts: pathlib.Path, process: int) -> pathlib.Path:
  return parts / f'{process:05}.npz'


def _write(file: pathlib.Path, part: Part, identity: dict) -> None:
  """An .npz: arrays, and the rest as JSON."""
  text = dict(identity=identity, done=part.done, skipped=part.skipped)
  tree = {name: getattr(part, name) for name in _ARRAYS}
  tree['sums'] = dataclasses.asdict(part.sums)
  file.parent.mkdir(parents=True, exist_ok=True)
  with atomic_write(file) as opened:
    np.savez(opened, text=np.array(json.dumps(text)), **trees.flatten(tree))


def _read(file: pathlib.Path, identity: dict) -> Part | None:
  """What `_write` wrote; None if there is none of this evaluation."""
  try:
    with np.load(file) as opened:
      arrays = dict(opened)
    text = json.loads(str(arrays.pop('text')))
    if text.pop('identity') != json.loads(json.dumps(identity)):
      return None
    tree = trees.unflatten(arrays)
    sums = jax.tree.map(lambda x: x if x.ndim else x.item(), tree.pop('sums'))
    for name, value in sums.items():
      sums[name] = Moments(**value) if isinstance(value, dict) else value
    return Part(sums=Sums(**sums), **text, **tree)
  except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
    return None


def read_all(parts: pathlib.Path, identity: dict) -> Part:
  """Those of all hosts, as one.

  Raises:
    UserError: one is not there.
  """
  hosts = identity['hosts']
  found = []
  for process in range(hosts):
    file = _file(parts, process)
    found.append(_read(file, identity))
    if found[-1] is None:
      raise UserError(
        f'{file} is missing or of other files: --out must be on a disk that '
        'all hosts share, and --data the same on all'
      )
  n = sum(len(p.measured) for p in found)
  arrays = {}
  for name in _ARRAYS:
    first = getattr(found[0], name)
    arrays[name] = np.zeros_like(first, shape=(n, *first.shape[1:]))
    for i, p in enumerate(found):
      arrays[name][i::hosts] = getattr(p, name)
  return Part(
    sum(p.done for p in found),
    functools.reduce(Sums.merge, [p.sums for p in found]),
    {name: why for p in found for name, why in p.skipped.items()},
    **arrays,
  )


def measure(run: Run, parts: pathlib.Path, identity: dict) -> Part:
  """Measures this host's share of the images, from where it was stopped.

  Args:
    run: what is measured; host p of P takes every P-th image from p on.
    parts: the folder of parts.
    identity: what must match for a part to be continued, as JSON values.
  """
  process, source = jax.process_index(), run.source
  file, mine = _file(parts, process), run.chosen[process :: jax.process_count()]
  n = len(mine)
  d = run.tokenizer.latent_dim
  with contextlib.suppress(ImageDecodeError):  # then others have labels, or not
    d = d if source.label(run.chosen[0]) is not None else 0
  latents = np.zeros((n, 2, d), np.float32)
  part = _read(file, identity) or Part(
    0, Sums(), {}, np.zeros(n, bool), np.zeros(n), latents
  )
  if part.done:
    logging.info('continues after %d of %d images', part.done, n)
  devices = jax.local_devices()
  mesh = sharding.make_mesh('fsdp', devices)
  rows = sharding.batch_sharding(mesh)
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  places = sharding.shardings_for(run.variables, mesh)

  def skip(index, error):
    part.skipped[source.name(index)] = error.reason
    tqdm.write(f'{source.name(index)}  skipped: {error.reason}')

  bar = tqdm(
    total=n, initial=part.done, unit='img', disable=bool(process) or None
  )
  saved = time.monotonic()
  with jax.set_mesh(mesh), bar:
    for found in evaluator.measure(
      run.tokenizer,
      jax.device_put(run.variables, places),
      pipeline.eval_batches(
        source, run.cut, ROWS * len(devices), mine[part.done :], skip
      ),
      place=lambda x: jax.device_put(x, rows),
      read=lambda x: x,
      networks=jax.device_put(run.networks, everywhere),
    ):
      at = np.searchsorted(mine, found.owners)
      part.measured[at], part.psnr[at] = True, found.psnr
      part.latents[at] = found.latents[..., :d]
      part.sums = part.sums.merge(found.sums)
      part.done = int(at[-1]) + 1
      bar.update(part.done - bar.n)
      if time.monotonic() - saved >= SAVE_EVERY_S:
        _write(file, part, identity)
        saved = time.monotonic()
    bar.update(n - bar.n)
  if jax.process_count() > 1:
    _write(file, part, identity)
  return part
