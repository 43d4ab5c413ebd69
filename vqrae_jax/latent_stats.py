"""python -m vqrae_jax.latent_stats --config=F.py --data=DATA --out=stats.npz

Mean and variance of the latents of a run's encoder, as `init.latents` takes
them: of each channel over all tokens, or with --position of each position's
channels. The encoder is the one that a run of the config starts with
(`init.encoder`, `init_from`, or the seed's). Each image is read once: its
shorter side is resized to `data.image_size` and the centre is cropped.

The file holds "mean" and "var" (of the population), f64 [d] or [gh gw d].

The host sums in f64: accelerators have no f64 of any speed, and f32 sums would
depend on how tokens are cut into batches. A core takes 2.5 ms for an image of
256 tokens of 1024 channels (2026-11), while the device encodes the next batch.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from vqrae_jax import cli, hosts
from vqrae_jax.data import pipeline
from vqrae_jax.errors import UserError
from vqrae_jax.files import atomic_write

MODULE = 'vqrae_jax.latent_stats'
EXAMPLE = (
  f'python -m {MODULE} --config=configs/simvq_siglip_l.py --data=IMAGES '
  '--out=stats.npz'
)
ABOUT = 'the run whose latents are measured; --config.a.b=v changes a key'


@dataclasses.dataclass(frozen=True)
class RunningStats:
  """Of `count` rows: f64 `mean`, and `m2`, the squares about it, summed.

  Merging is Chan, Golub and LeVeque's, for sums of squares about zero lose
  digits where a mean is far from zero.
  """

  count: int
  mean: np.ndarray
  m2: np.ndarray

  @classmethod
  def of(cls, rows: np.ndarray) -> 'RunningStats':
    """Of f[n …] over its first axis; n may be 0."""
    rows = np.asarray(rows, np.float64)
    mean = rows.sum(0) / max(len(rows), 1)
    return cls(len(rows), mean, ((rows - mean) ** 2).sum(0))

  def merge(self, other: 'RunningStats') -> 'RunningStats':
    """Of both together."""
    n = max(self.count + other.count, 1)
    delta, share = other.mean - self.mean, other.count / n
    return RunningStats(
      self.count + other.count,
      self.mean + delta * share,
      self.m2 + other.m2 + delta**2 * (self.count * share),
    )

  @property
  def variance(self) -> np.ndarray:
    """The population's."""
    return self.m2 / max(self.count, 1)


def sum_latents(
  encode: Callable[[np.ndarray], Any],
  batches: Iterable[tuple[np.ndarray, list[int]]],
  shape: tuple[int, ...],
  progress: Callable[[int], Any],
) -> RunningStats:
  """Of the latents of all images.

  Args:
    encode: uint8 [b h w 3] -> f[b gh gw d].
    batches: those of `pipeline.eval_batches`.
    shape: (d,) for statistics over tokens, (gh, gw, d) over images.
    progress: is called with the number of images summed.
  """
  total = RunningStats.of(np.zeros((0, *shape)))
  for latents in pipeline.one_ahead(encode, batches):
    progress(len(latents))
    rows = latents.astype(np.float32).reshape(-1, *shape)
    total = total.merge(RunningStats.of(rows))
  return total


def over_hosts(mine: RunningStats, skipped: int) -> tuple[RunningStats, int]:
  """All hosts' together, the same on each of them; all must call."""
  if jax.process_count() == 1:
    return mine, skipped
  from jax.experimental import multihost_utils

  sums = mine.mean.ravel(), mine.m2.ravel()
  row = np.concatenate([[skipped, mine.count], *sums])
  # As halves of f64s: JAX would make f32 of them.
  halves = multihost_utils.process_allgather(row.view(np.uint32))
  total, lost = RunningStats.of(np.zeros((0, *mine.mean.shape))), 0
  for row in np.ascontiguousarray(halves).view(np.float64):
    mean, m2 = row[2:].reshape(2, *mine.mean.shape)
    total = total.merge(RunningStats(int(row[1]), mean, m2))
    lost += int(row[0])
  return total, lost


def main(argv: list[str]) -> None:
  """Parses flags, joins the other hosts, measures, writes one file."""
  values = cli.parse_config_flag(argv, MODULE, EXAMPLE, ABOUT, define)
  cli.required(values, 'config', 'out')
  out = cli.new_file(values.out, '.npz')
  cli.join_hosts(values)
  with hosts.loss_reported():
    measure(values, out)


def define(values: flags.FlagValues) -> None:
  """The command's flags but --config."""
  keys = dict(flag_values=values)
  text = "images: a folder, a glob, …; the config's data.source if left out"
  flags.DEFINE_string('data', None, text, **keys)
  flags.DEFINE_string('out', None, 'the file to write, F.npz', **keys)
  text = (
    'statistics per position and channel, not per channel; always so if the '
    'config has model.latents.norm="position"'
  )
  flags.DEFINE_bool('position', False, text, **keys)
  text = 'number of images, evenly spaced in the listing; default: all'
  flags.DEFINE_integer('images', None, text, lower_bound=1, **keys)
  text = 'images at once on each host'
  flags.DEFINE_integer('batch_size', 32, text, lower_bound=1, **keys)
  cli.define_hosts(values)


def _encoder(spec: Any, tokenizer: Any, mesh: Any) -> Callable:
  """uint8 [b h w 3] -> f[b gh gw d], by the encoder that a run begins with."""
  from flax import linen as nn

  from vqrae_jax import sharding
  from vqrae_jax.ops import trees
  from vqrae_jax.train import initialize

  if getattr(tokenizer.encoder_spec, 'fuse', '') == 'attention':
    raise UserError(
      'encoder.fuse="attention" trains the latents: they have no statistics '
      'before training'
    )
  # Neither has a part in latents; the statistics are not there yet.
  init = dataclasses.replace(spec.init, decoder=None, latents=None)
  given = initialize.tokenizer_weights(tokenizer, spec.init_from, init)

  def fresh():
    return initialize.random_variables(tokenizer, spec.seed)['params'][
      'encoder'
    ]

  places = sharding.shardings_for(jax.eval_shape(fresh), mesh)
  if given.summary:
    logging.info('measuring %s', given.summary)
    shapes, places = trees.flatten(jax.eval_shape(fresh)), trees.flatten(places)

    def load(name, leaf):
      source = np.asarray(given.leaves[f'params/encoder/{name}'])
      read = lambda index: np.asarray(source[index], leaf.dtype)  # noqa: E731
      return jax.make_array_from_callback(leaf.shape, places[name], read)

    params = trees.unflatten({n: load(n, leaf) for n, leaf in shapes.items()})
  else:
    logging.warning(
      'the encoder is random: the config has no init.encoder and no init_from'
    )
    params = jax.jit(fresh, out_shardings=places)()

  @jax.jit
  def encode(params, images):
    with nn.logical_axis_rules(sharding.ACTIVATION_RULES):
      variables = {'params': {'encoder': params}}
      return tokenizer.apply(variables, images, method='encode')

  rows = sharding.batch_sharding(mesh)
  return lambda images: encode(params, jax.device_put(images, rows))


def measure(values: flags.FlagValues, out: pathlib.Path) -> None:
  """Measures the latents of a config's encoder and writes `out`.

  Args:
    values: the flags; batches are brought up to the host's devices.
    out: a file that is not there yet.

  Raises:
    UserError: a config that cannot run, fewer images than asked for, or too
      many that cannot be read.
  """
  from tqdm import tqdm

  from vqrae_jax import sharding
  from vqrae_jax.data.sources import choose_images, open_source
  from vqrae_jax.models import latents as norms
  from vqrae_jax.models.tokenizer import build_tokenizer
  from vqrae_jax.train import config as config_lib

  sharding.compile_afresh_on_cpu()
  spec = config_lib.read_config(values.config)
  tokenizer, section = build_tokenizer(spec.model), spec.data
  grid = tokenizer.grid(*section.size)
  norms.check_grid(tokenizer.latents_spec, grid, 'data.image_size')
  by_position = values.position or tokenizer.latents_spec.norm == 'position'
  shape = (*(grid if by_position else ()), tokenizer.latent_dim)
  own = section.source, section.include, section.exclude
  source = open_source(*(own if values.data is None else [values.data]))
  chosen = choose_images(source, values.images, values.data or section.source)
  wanted = len(chosen)
  mine = chosen[jax.process_index() :: jax.process_count()]
  mesh = sharding.make_mesh(
    spec.mesh.layout, jax.local_devices(), spec.mesh.tensor
  )
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  batch_size = -(-values.batch_size // shards) * shards
  skipped = []

  def cut(image):
    # The shortest side that an image may have and cover the crop.
    return pipeline.centre_crop(image, section.size, min(section.size))[None]

  def check(skipped, seen):
    most = round(section.max_skipped * seen, 6)  # .29 of 100 is 29
    if skipped > most or skipped == seen:
      raise UserError(
        f'{skipped} of {seen} images cannot be read; data.max_skipped allows a '
        f'share of {section.max_skipped:g}, and never all of them'
      )

  def skip(index, error):
    skipped.append(index)
    tqdm.write(f'{source.name(index)}  skipped: {error.reason}')
    check(len(skipped), wanted)  # no need to read the rest

  first = jax.process_index() == 0
  bar = tqdm(total=len(mine), unit='img', disable=None if first else True)
  with jax.set_mesh(mesh), bar:
    stats = sum_latents(
      _encoder(spec, tokenizer, mesh),
      pipeline.eval_batches(source, cut, batch_size, mine, skip),
      shape,
      bar.update,
    )
  stats, lost = over_hosts(stats, len(skipped))
  check(lost, wanted)
  mean, var, std = stats.mean, stats.variance, np.sqrt(stats.variance)
  if not np.isfinite(mean).all():
    raise UserError('the latents hold NaN or infinity; compute in float32')
  if not first:
    return
  with atomic_write(out) as file:
    np.savez(file, mean=mean, var=var)
  count = f'{wanted - lost} images' + f' ({lost} skipped)' * bool(lost)
  print(
    f'wrote {out}: {count}, {(wanted - lost) * grid[0] * grid[1]} tokens, mean '
    f'and var of shape {mean.shape}; mean of means {mean.mean():.4g}, stds '
    f'{std.min():.4g} to {std.max():.4g}'
  )


if __name__ == '__main__':
  cli.run(main)
