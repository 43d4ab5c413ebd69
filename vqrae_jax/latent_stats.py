"""python -m vqrae_jax.latent_stats --config=F.py --data=DATA --out=stats.npz

Mean and variance of the latents of a run's encoder, as `init.latents` takes
them: of each channel over all tokens, or with --position of each position's
channels. The encoder is the one that a run of the config begins with
(`init.encoder`, `init_from`, or the seed's); photographs are brought to
`data.image_size` by their shorter side and cropped at the centre, each once.

The file holds "mean" and "var" (of the population), f64 [d] or [gh gw d].
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags, logging

from vqrae_jax import command, config_flag
from vqrae_jax.errors import UserError

MODULE = 'vqrae_jax.latent_stats'
EXAMPLE = (
  f'python -m {MODULE} --config=configs/simvq_siglip_l.py --data=PHOTOS '
  '--out=stats.npz'
)
ABOUT = 'the run whose latents are measured; --config.a.b=v changes a key'


def main(argv: list[str]) -> None:
  """Parses flags, joins the other hosts, measures, writes one file."""
  values = config_flag.parse(argv, MODULE, EXAMPLE, ABOUT, _flags)
  command.required(values, 'config', 'out')
  out = command.new_file(values.out, '.npz')
  for name in ('images', 'batch_size'):
    if values[name].value is not None and values[name].value < 1:
      raise UserError(f'--{name}={values[name].value} must be above 0')
  if values.distributed:
    command.join_hosts()
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
  flags.DEFINE_bool(
    'distributed',
    'JAX_COORDINATOR_ADDRESS' in os.environ,
    'join the other hosts, as in training; each reads its share',
    flag_values=values,
  )


def _encoder(spec: Any, tokenizer: Any, mesh: Any) -> Callable:
  """uint8 [b h w 3] -> f[b gh gw d], by the encoder that a run begins with."""
  import dataclasses

  import jax
  import numpy as np
  from flax import linen as nn

  from vqrae_jax import sharding
  from vqrae_jax.ops import trees
  from vqrae_jax.train import origin

  # Neither has a part in latents; the statistics are not there yet.
  init = dataclasses.replace(spec.init, decoder=None, latents=None)
  given = origin.given_leaves(tokenizer, spec.init_from, init)

  def fresh():
    return origin.from_seed(tokenizer, spec.seed)['params']['encoder']

  shapes = jax.eval_shape(fresh)
  places = sharding.shardings_for(shapes, mesh)
  if given.says:
    logging.info('measures %s', given.says)
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
  from vqrae_jax.evaluate import latents
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
  chosen = latents.spread(len(source), images)
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
      moments, count = latents.moments_of(
        encode,
        latents.crops(source, mine, section.size, skip),
        shape,
        batch_size,
        bar.update,
      )
  found = latents.over_hosts(latents.Measured(moments, count, len(skipped)))
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
  command.run(main)
