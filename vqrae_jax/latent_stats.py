"""python -m vqrae_jax.latent_stats --config=F.py --data=DATA --out=stats.npz

Mean and variance of the latents of a run's encoder, as `init.latents` takes
them: of each channel over all tokens, or with --position of each position's
channels. The encoder is the one that a run of the config begins with
(`init.encoder`, `init_from`, or the seed's); photographs are brought to
`data.image_size` by their shorter side and cropped at the centre, each once.

The file holds "mean" and "var" (of the population), f64 [d] or [gh gw d].
"""

import collections
import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from vqrae_jax import cli
from vqrae_jax.data.decode import ImageDecodeError
from vqrae_jax.data.pipeline import Augment, augment_image, reading_threads
from vqrae_jax.data.sources import ImageSource
from vqrae_jax.errors import UserError

# ----------------------------------------------------------------------------
# Mean and variance of many arrays, exact in f64 and in any order.
#
# Chan, Golub and LeVeque's merge of (count, mean, sum of squares about it): two
# halves merged are the whole, whatever the halves. Sums of squares about zero
# would lose what this keeps where a mean is far from zero.
#
# The host computes in f64, since accelerators have no f64 of any speed and f32
# sums would depend on how tokens were cut into batches. A core takes 2.5 ms for
# an image of 256 tokens of 1024 channels (2026-11), beside the device and about
# as long as decoding its photograph.


@dataclasses.dataclass(frozen=True)
class RunningStats:
  """Of `count` values each: f64 `mean`, and `m2`, squares about it."""

  count: int
  mean: np.ndarray
  m2: np.ndarray

  @classmethod
  def of(cls, rows: np.ndarray) -> 'RunningStats':
    """Of f[n …]: over its first axis, n above 0."""
    rows = np.asarray(rows, np.float64)
    mean = rows.mean(0)
    return cls(len(rows), mean, ((rows - mean) ** 2).sum(0))

  def merge(self, other: 'RunningStats') -> 'RunningStats':
    """Of both together."""
    n = self.count + other.count
    if not n:
      return self
    delta = other.mean - self.mean
    share = other.count / n
    return RunningStats(
      n,
      self.mean + delta * share,
      self.m2 + other.m2 + delta**2 * (self.count * share),
    )

  @property
  def variance(self) -> np.ndarray:
    """f64 m2 / count, the population's."""
    return self.m2 / max(self.count, 1)

  @classmethod
  def none(cls, shape: tuple[int, ...]) -> 'RunningStats':
    """Of nothing: what a merge leaves as it is."""
    return cls(0, np.zeros(shape), np.zeros(shape))

  def packed(self) -> np.ndarray:
    """f64[1 + 2 n], from which `unpacked` makes it again, bit for bit."""
    parts = [self.count], self.mean.ravel(), self.m2.ravel()
    return np.concatenate(parts).astype(np.float64)

  @classmethod
  def unpacked(cls, row: np.ndarray, shape: tuple[int, ...]) -> 'RunningStats':
    """`packed` backwards."""
    mean, m2 = row[1:].reshape(2, *shape)
    return cls(int(row[0]), mean, m2)


# ----------------------------------------------------------------------------
# RunningStats of an encoder's latents over photographs, each taken once.
#
# Threads read and crop ahead, the device encodes, and the host sums in f64 what
# the batch before gave. Sums of tokens do not know batches, so neither their
# size nor the number of hosts moves the result beyond f64's last digits.


@dataclasses.dataclass(frozen=True)
class Measured:
  """What some photographs gave.

  Attributes:
    moments: of latents f64[d], over tokens, or f64[gh gw d], over images.
    images: photographs that were encoded.
    skipped: photographs that could not be read.
  """

  moments: RunningStats
  images: int
  skipped: int


def spread(count: int, wanted: int | None) -> range | list[int]:
  """`wanted` of `count` indices, evenly spaced: listings go class by class."""
  if wanted is None:
    return range(count)
  return [i * count // wanted for i in range(wanted)]


def crops(
  source: ImageSource,
  indices: Sequence[int],
  size: tuple[int, int],
  skip: Callable[[str, str], None],
) -> Iterator[np.ndarray]:
  """uint8 [*size 3]: the centre of each photograph that can be read, in order.

  Args:
    source: the photographs.
    indices: which of them.
    size: (h, w); the photograph is resized until it just covers that.
    skip: is told (name, reason) of each that cannot be read.
  """
  # The shortest side that any photograph may have and cover the crop.
  augment = Augment(size, resize=min(size), crop='center', flip=False)
  rng = np.random.default_rng(0)  # asked for nothing

  def read(index):
    return augment_image(source[index], augment, rng)

  threads = reading_threads()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting: collections.deque = collections.deque()
    ahead = iter(indices)
    while True:
      while len(waiting) < 4 * threads:
        index = next(ahead, None)
        if index is None:
          break
        waiting.append((index, pool.submit(read, index)))
      if not waiting:
        return
      index, image = waiting.popleft()
      try:
        yield image.result()
      except ImageDecodeError as e:
        skip(source.name(index), e.reason)


def batches(
  images: Iterable[np.ndarray], batch_size: int
) -> Iterator[tuple[np.ndarray, int]]:
  """(uint8 [b h w 3], how many of its rows count): the last is padded."""
  rows = []
  for image in images:
    rows.append(image)
    if len(rows) == batch_size:
      yield np.stack(rows), batch_size
      rows = []
  if rows:
    short = batch_size - len(rows)
    yield np.stack(rows + [np.zeros_like(rows[0])] * short), len(rows)


def moments_of(
  encode: Callable[[np.ndarray], jax.Array],
  images: Iterable[np.ndarray],
  shape: tuple[int, ...],
  batch_size: int,
  progress: Callable[[int], Any],
) -> tuple[RunningStats, int]:
  """(moments, number of images) of the latents of `images`.

  Args:
    encode: uint8 [b h w 3] -> f[b gh gw d].
    images: uint8 [h w 3] each.
    shape: (d,) for moments over tokens, (gh, gw, d) over images.
    batch_size: b.
    progress: is told how many images more were summed.
  """
  total, count = RunningStats.none(shape), 0

  def add(pending):
    nonlocal total, count
    latents, n = pending
    rows = np.asarray(latents, np.float32)[:n].reshape(-1, *shape)
    total, count = total.merge(RunningStats.of(rows)), count + n
    progress(n)

  pending = None
  for batch, n in batches(images, batch_size):
    now = encode(batch), n  # dispatched, and not waited for
    if pending is not None:
      add(pending)
    pending = now
  if pending is not None:
    add(pending)
  return total, count


def over_hosts(mine: Measured) -> Measured:
  """All hosts' together, the same on each of them; all must call."""
  if jax.process_count() == 1:
    return mine
  from jax.experimental import multihost_utils

  shape = mine.moments.mean.shape
  row = np.concatenate([[mine.images, mine.skipped], mine.moments.packed()])
  # As halves of f64s: JAX would make f32 of them.
  halves = multihost_utils.process_allgather(row.view(np.uint32))
  total = Measured(RunningStats.none(shape), 0, 0)
  for row in np.ascontiguousarray(halves).view(np.float64):
    total = Measured(
      total.moments.merge(RunningStats.unpacked(row[2:], shape)),
      total.images + int(row[0]),
      total.skipped + int(row[1]),
    )
  return total


MODULE = 'vqrae_jax.latent_stats'
EXAMPLE = (
  f'python -m {MODULE} --config=configs/simvq_siglip_l.py --data=PHOTOS '
  '--out=stats.npz'
)
ABOUT = 'the run whose latents are measured; --config.a.b=v changes a key'


def main(argv: list[str]) -> None:
  """Parses flags, joins the other hosts, measures, writes one file."""
  values = cli.parse_config_flag(argv, MODULE, EXAMPLE, ABOUT, _flags)
  cli.required(values, 'config', 'out')
  out = cli.new_file(values.out, '.npz')
  for name in ('images', 'batch_size'):
    if values[name].value is not None and values[name].value < 1:
      raise UserError(f'--{name}={values[name].value} must be above 0')
  cli.join_hosts(values)
  measure(
    values.config,
    out,
    data=values.data,
    position=values.position,
    images=values.images,
    batch_size=values.batch_size,
  )


def _flags(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    'data',
    None,
    "photographs: a folder, a glob, tar shards, …; the config's data.source if "
    'left out',
    flag_values=values,
  )
  flags.DEFINE_string(
    'out', None, 'the file to write, F.npz', flag_values=values
  )
  flags.DEFINE_bool(
    'position',
    False,
    "of each position's channels, not of channels over all positions; so too "
    'where the config has model.latents.norm="position"',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'images',
    None,
    'so many photographs, evenly spaced in the listing; all if left out',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'batch_size', 32, 'images at once on each host', flag_values=values
  )
  cli.define_hosts(values)


def _encoder(spec: Any, tokenizer: Any, mesh: Any) -> Callable:
  """uint8 [b h w 3] -> f[b gh gw d], by the encoder that a run begins with."""
  import dataclasses

  import jax
  import numpy as np
  from flax import linen as nn

  from vqrae_jax import sharding
  from vqrae_jax.ops import trees
  from vqrae_jax.train import initialize

  # Neither has a part in latents; the statistics are not there yet.
  init = dataclasses.replace(spec.init, decoder=None, latents=None)
  given = initialize.tokenizer_weights(tokenizer, spec.init_from, init)

  def fresh():
    return initialize.random_variables(tokenizer, spec.seed)['params'][
      'encoder'
    ]

  shapes = jax.eval_shape(fresh)
  places = sharding.shardings_for(shapes, mesh)
  if given.summary:
    logging.info('measures %s', given.summary)
    leaves, where = trees.flatten(shapes), trees.flatten(places)

    def laid(name, leaf):
      source = given.leaves[f'params/encoder/{name}']
      return jax.make_array_from_callback(
        leaf.shape,
        where[name],
        lambda index: np.asarray(source[index], leaf.dtype),
      )

    params = trees.unflatten({n: laid(n, x) for n, x in leaves.items()})
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


def measure(
  config: Any,
  out: pathlib.Path,
  data: str | None = None,
  position: bool = False,
  images: int | None = None,
  batch_size: int = 32,
) -> None:
  """Measures the latents of a config's encoder and writes `out`.

  Args:
    config: the run's.
    out: a file that is not there yet.
    data: photographs, the config's if None.
    position: by position; the model's section may say so too.
    images: how many, all if None.
    batch_size: images at once on a host, brought up to its devices.

  Raises:
    UserError: a config that cannot run, fewer photographs than asked for, or
      none that can be read.
  """
  import jax
  from tqdm import tqdm

  from vqrae_jax import sharding
  from vqrae_jax.data.sources import open_source
  from vqrae_jax.models import latents as norms
  from vqrae_jax.models.tokenizer import build_tokenizer
  from vqrae_jax.train import config as config_lib

  sharding.compile_afresh_on_cpu()
  spec = config_lib.read_config(config)
  tokenizer = build_tokenizer(spec.model)
  grid = tokenizer.grid(*spec.data.size)
  norms.check_grid(tokenizer.latents_spec, grid, 'data.image_size')
  by_position = position or tokenizer.latents_spec.norm == 'position'
  shape = (*(grid if by_position else ()), tokenizer.latent_dim)
  section = spec.data
  if data is not None:
    source = open_source(data)
  else:
    source = open_source(section.source, section.include, section.exclude)
  if images is not None and images > len(source):
    raise UserError(
      f'--images={images}, and "{data or section.source}" holds {len(source)}'
    )
  mesh = sharding.make_mesh(
    spec.mesh.layout, jax.local_devices(), spec.mesh.tensor
  )
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  batch_size = -(-batch_size // shards) * shards
  chosen = spread(len(source), images)
  mine = chosen[jax.process_index() :: jax.process_count()]
  skipped = []

  def check(misses, seen):
    if misses > section.max_skipped * seen:
      raise UserError(
        f'{misses} of {seen} photographs could not be read, more than '
        f'data.max_skipped={section.max_skipped:g} of them; mend the data, or '
        'raise it'
      )

  def skip(name, reason):
    skipped.append(name)
    tqdm.write(f'{name}  skipped: {reason}')
    check(len(skipped), len(chosen))  # too many already: no need to go on

  with jax.set_mesh(mesh):
    encode = _encoder(spec, tokenizer, mesh)
    first = jax.process_index() == 0
    with tqdm(total=len(mine), unit='img', disable=not first) as bar:
      moments, count = moments_of(
        encode,
        crops(source, mine, section.size, skip),
        shape,
        batch_size,
        bar.update,
      )
  found = over_hosts(Measured(moments, count, len(skipped)))
  if not found.images:
    raise UserError(
      f'none of the {found.skipped} photographs could be read; the last was '
      f'{skipped[-1] if skipped else "read by another host"}'
    )
  check(found.skipped, found.images + found.skipped)
  if first:
    _write(out, found, found.images * grid[0] * grid[1])


def _write(out: pathlib.Path, found: Any, tokens: int) -> None:
  """The whole file under another name first; then a line of what it holds."""
  import numpy as np

  mean, var = found.moments.mean, found.moments.variance
  if not np.isfinite(mean).all():
    raise UserError('the latents hold NaN or infinity; compute in float32')
  temporary = out.with_name(out.stem + '.writing.npz')
  try:
    np.savez(temporary, mean=mean, var=var)
    os.replace(temporary, out)
  finally:
    temporary.unlink(missing_ok=True)
  lost = f' ({found.skipped} skipped)' if found.skipped else ''
  std = np.sqrt(var)
  print(
    f'wrote {out}: {found.images} images{lost}, {tokens} tokens, mean and var '
    f'of shape {mean.shape}; mean of means {mean.mean():.4g}, stds '
    f'{std.min():.4g} to {std.max():.4g}'
  )


if __name__ == '__main__':
  cli.run(main)
