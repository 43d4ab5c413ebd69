"""Small tokenizers and runs, the same in every test."""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import vqrae_jax
from tests import flags
from vqrae_jax.ops import trees

VIT = dict(
  width=32, depth=2, mlp_dim=48, num_heads=4, patch_size=4, grid=(4, 4)
)
DECODER = dict(
  posemb='sincos2d', num_prefix_tokens=1, norm_eps=1e-12, patch_size=4
)

QUANTIZERS = {
  'fsq-cosmos': dict(
    name='fsq', levels=(8, 8, 8, 5, 5, 5), convention='cosmos'
  ),
  'fsq-centered': dict(name='fsq', levels=(8, 5, 4), convention='centered'),
  'vq-ema': dict(name='vq', num_codes=64),
  'vq-gradient': dict(
    name='vq', num_codes=64, update='gradient', projection=True, code_dim=12
  ),
  'simvq-l2': dict(name='simvq', num_codes=96, code_dim=24),
  'simvq-cosine': dict(
    name='simvq', num_codes=96, code_dim=24, distance='cosine'
  ),
  'lfq': dict(name='lfq', bits=8),
  'bsq': dict(name='bsq', bits=10),
  'gumbel': dict(name='gumbel', num_codes=64, projection=True, code_dim=12),
}

# Of several codes a token.
_TABLE = dict(name='vq', num_codes=64, code_dim=8)
NESTED = {
  'residual-vq': dict(name='residual', stages=2, quantizer=_TABLE),
  'residual-fsq': dict(
    name='residual',
    stages=2,
    quantizer=dict(name='fsq', levels=(8, 5, 4), bound='clip'),
  ),
  'residual-shared': dict(
    name='residual',
    stages=2,
    shared=True,
    quantizer=dict(name='simvq', num_codes=64, code_dim=8, normalize=False),
  ),
  'grouped-vq': dict(
    name='grouped', groups=2, quantizer=_TABLE | dict(update='gradient')
  ),
  'grouped-bsq': dict(
    name='grouped', groups=3, quantizer=dict(name='bsq', bits=5)
  ),
  'multiscale': dict(
    name='multiscale',
    scales=(1, 4),
    phis=2,
    quantizer=_TABLE | dict(affine=True),
  ),
}

# With what only checkpoints of the PyTorch project have.
_LEVELS = dict(name='fsq', levels=(8, 5, 4), convention='centered')
_COSINE = dict(name='simvq', num_codes=96, distance='cosine', code_dim=32)
CONVERTED = {
  'fsq-fourier': _LEVELS
  | dict(adapter_in='mlp', adapter_out='fourier', bound='clip'),
  'fsq-clip': _LEVELS | dict(bound='clip'),
  'simvq-rows': _COSINE | dict(code_scale='none', projection=False),
  'simvq-unit': _COSINE
  | dict(code_scale='unit', token_map=True, projection=False),
}
# With fields that no other form has.
FURTHER = {
  'fsq-symmetric': dict(
    name='fsq', levels=(8, 5, 2, 4), convention='cosmos',
    preserve_symmetry=True, noise_dropout=0.5, projection='mlp',
  ),
  'vq-cosine': dict(
    name='vq', num_codes=64, distance='cosine', projection='mlp', code_dim=8,
    rotation=True,
  ),
  'vq-unit': dict(
    name='vq', num_codes=64, distance='cosine', update='gradient',
    projection=True, code_dim=8,
  ),
  'vq-affine': dict(
    name='vq', num_codes=64, update='gradient', affine=True, projection=True,
    code_dim=8,
  ),
}  # fmt: skip
FORMS = QUANTIZERS | NESTED | CONVERTED | FURTHER

# Of `jax.jit`: what `tests/flags.py` turns down for all other programs.
AS_USERS = flags.AS_USERS


def alone(devices: int) -> dict[str, str]:
  """The environment of a process with so many fake devices, compiled as the
  suite is, in the suite's cache of compilations."""
  cache = pathlib.Path(__file__).resolve().parents[1] / '.jax_cache'
  return os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': flags.devices(devices),
  }


# Losses that move every leaf of each quantizer.
LOSSES = {
  'fsq-cosmos': dict(l2=1.0),
  'fsq-centered': dict(l2=1.0, commit=0.25),
  'vq-ema': dict(l2=1.0, commit=0.25),
  'vq-gradient': dict(l1=1.0, commit=0.25, codebook=1.0),
  'simvq-l2': dict(l2=1.0, commit=0.25, codebook=1.0),
  'simvq-cosine': dict(l2=1.0, commit=0.25, codebook=1.0),
  'lfq': dict(l2=1.0, commit=0.25, entropy=0.1),
  'bsq': dict(l2=1.0, commit=0.25, entropy=0.1),
  'gumbel': dict(l2=1.0, kl=5e-4),
  'residual-vq': dict(l2=1.0, commit=0.25),
  'none': dict(l2=1.0),
}


def quantizer(kind: str, **fields) -> dict:
  return (dict(name='none') if kind == 'none' else FORMS[kind]) | fields


def model(kind: str = 'fsq-cosmos', depth: int = 2, **options) -> dict:
  """A model config; `options` are quantizer fields but dtype, scan, remat."""
  run = {k: options.pop(k) for k in ('dtype', 'scan', 'remat') if k in options}
  vit = VIT | dict(depth=depth)
  return dict(
    encoder=dict(vit=vit),
    quantizer=quantizer(kind, **options),
    decoder=dict(vit=vit | DECODER),
    **run,
  )


@functools.lru_cache(maxsize=64)
def images(batch: int, h: int = 16, w: int = 16, seed: int = 0):
  """uint8 [b h w 3], smooth as natural images are."""
  rng = np.random.default_rng(seed)
  coarse = rng.random((batch, 4, 4, 3))
  smooth = np.asarray(jax.image.resize(coarse, (batch, h, w, 3), 'linear'))
  noise = rng.normal(0, 0.05, smooth.shape)
  return np.round(np.clip(smooth + noise, 0, 1) * 255).astype(np.uint8)


def built(config: dict, seed: int = 1):
  """(tokenizer, variables), the code table spread over the latents.

  Fresh latents are nearly the same for every token; the learned positions
  are made large so that many codes occur.
  """
  tokenizer = vqrae_jax.build_tokenizer(config)
  variables = jax.tree.map(jnp.asarray, _drawn(tokenizer, seed))
  embed = variables['params']['encoder']['embed']
  if 'positions' in embed:
    embed['positions'] = embed['positions'] * 50.0
  return tokenizer, variables


_SAME = dict.fromkeys(
  ('scale', 'scale1', 'scale2', 'counts', 'std', 'token_var'), 1
) | dict(gain=3)
_ZEROS = ('bias', 'mean', 'real', 'fake', 'token_mean')
_STD = dict(
  positions=0.02, prefix=0.02, codes=1.0, basis=1.0, sums=1.0, frequencies=10.0
)


def draw(rng, name, leaf):
  """The numpy array of a leaf, about as its module draws it: that program
  takes as long to compile as a small step."""
  last = name.rpartition('/')[2]
  if last in _ZEROS or leaf.dtype == np.int32:
    return np.zeros(leaf.shape, leaf.dtype)
  if last in _SAME:
    return np.full(leaf.shape, _SAME[last], leaf.dtype)
  inputs = leaf.shape[-2:-1] or (1,)
  if last in 'uv':  # unit vectors
    inputs = leaf.shape
  elif len(leaf.shape) == 4:  # a convolution
    inputs = leaf.shape[:3]
  std = _STD.get(last, np.prod(inputs) ** -0.5)
  return rng.normal(0, std, leaf.shape).astype('f4')


def drawn(module, *args, seed=0):
  """Variables of a module, as `draw` draws them."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
  rng = np.random.default_rng(seed)
  leaves = trees.map_named(functools.partial(draw, rng), shapes)
  return jax.device_put(leaves)


@functools.lru_cache(maxsize=64)
def _drawn(tokenizer, seed):
  """On the host; traced once for all tests of a tokenizer."""
  return jax.device_get(drawn(tokenizer, images(1), seed=seed))


def normalised(kind: str, norm: str, grid=(4, 4), **options):
  """(tokenizer, variables) of `model(kind)` whose latents are normalised, by a
  mean and a std that are not 0 and 1."""
  latents = dict(norm=norm) | (dict(grid=grid) if norm == 'position' else {})
  config = model(kind, **options) | dict(latents=latents)
  tokenizer, variables = built(config)
  rng, stats = np.random.default_rng(3), variables['codebook']['latents']
  shape = stats['mean'].shape
  stats['mean'] = jnp.asarray(rng.normal(0, 0.3, shape), 'float32')
  stats['std'] = jnp.asarray(rng.uniform(0.5, 2.0, shape), 'float32')
  return tokenizer, variables


def run(kind: str = 'fsq-cosmos', **keys) -> dict:
  """A run config over `model(kind)`, of 16-pixel images."""
  config = dict(
    model=model(kind),
    data=dict(source='bundled:photos', image_size=16),
    losses=LOSSES[kind],
    schedules=(('.*', dict(lr=1e-3)),),
    duration=4,
    batch_size=8,
  )
  return config | keys


def without_clocks(row: dict) -> dict:
  """A row of metrics.jsonl without what depends on the machine's speed."""
  clocks = ('images_per_second', 'data_wait')
  return {k: v for k, v in row.items() if k not in clocks}


def files(folder):
  """{path: bytes, or None of a folder} of all below."""
  return {
    str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
    for p in folder.rglob('*')
  }
