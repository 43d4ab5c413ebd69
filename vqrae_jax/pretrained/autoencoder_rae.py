"""Complete RAE models (arXiv 2510.11690) as diffusers' `AutoencoderRAE` (0.42).

They are read and written. A folder holds `config.json`, with the sizes, and
`diffusion_pytorch_model`, whose keys start with `encoder.` or `decoder.`, apart
from the mean and std of pixels and of latents. The class builds its encoder
with transformers: DINOv2 with registers, SigLIP or ViT-MAE, of a given width,
depth and patch size, with heads of 64 channels and transformers' defaults for
the rest. The final norm has no affine part.

Encoder keys are read as transformers 5 or earlier versions name them, and
written as version 5 does, SigLIP's with the prefix "vision_model.": diffusers
0.42 needs it, and cannot build SigLIP with transformers 5.23, which dropped it.

Here the model is a continuous tokenizer. Images of its `image_size` give the
same results as in diffusers, which resizes all others to that square; here they
keep their own grid. No file is opened or written here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from vqrae_jax import encoders, plugins
from vqrae_jax.encoders import dinov2, mae, siglip
from vqrae_jax.encoders.naming import Shapes
from vqrae_jax.errors import UserError, choose
from vqrae_jax.models.decoder import DECODERS
from vqrae_jax.models.tokenizer import (
  Tokenizer,
  build_tokenizer,
  describe,
  variable_shapes,
)
from vqrae_jax.ops import posemb, trees
from vqrae_jax.pretrained import rae
from vqrae_jax.specs import IMAGENET_NORM, TORCH_BICUBIC, EncoderSpec
from vqrae_jax.weights.files import WeightFile, arrays
from vqrae_jax.weights.load import TOLERANCE, Pretrained, export
from vqrae_jax.weights.rules import Computed, Ignore, Table

CLASS = 'AutoencoderRAE'
WEIGHTS = 'diffusion_pytorch_model.safetensors'
_VERSION = '0.42.1'

# The keys of `config.json`, and the default of each.
_DEFAULTS: dict[str, Any] = dict(
  encoder_type='dinov2',
  encoder_hidden_size=768,
  encoder_patch_size=14,
  encoder_num_hidden_layers=12,
  decoder_hidden_size=512,
  decoder_num_hidden_layers=8,
  decoder_num_attention_heads=16,
  decoder_intermediate_size=2048,
  patch_size=16,
  encoder_input_size=224,
  image_size=None,
  num_channels=3,
  encoder_norm_mean=None,
  encoder_norm_std=None,
  latents_mean=None,
  latents_std=None,
  noise_tau=0.0,
  reshape_to_2d=True,
  use_encoder_loss=False,  # nothing reads it
  scaling_factor=1.0,
)
_GRID = 16  # the grid at which diffusers' positions are RAE's
_HEAD = 64  # channels of each head of an encoder
_SHOWN = 3  # differences that an error lists
_EPS = np.float32(1e-5)  # added to the std of latents

_PIXELS = 'stored as pixel_norm in the config'

# A decoder's position fields: the table is a leaf, or computed here.
_LEARNED = dict(posemb='learned', prefix_has_posemb=True)
_FIXED = dict(posemb='sincos2d', prefix_has_posemb=False)
_TABLE = 'decoder.decoder_pos_embed'

# ------------------------------------------------------------------ the parts

_QKV = ('query', 'key', 'value')
_ATTENTION = {
  f'attention.attention.{n}': f'attention.{n[0]}_proj' for n in _QKV
}
_ATTENTION |= {'attention.output.dense': 'attention.o_proj'}
_DECODER = {f'attention.attention.{n}': f'attention.to_{n[0]}' for n in _QKV}
_DECODER |= {'attention.output.dense': 'attention.to_out.0'}


class _Kind(NamedTuple):
  """A kind of encoder that the class builds.

  Attributes:
    model_type: transformers' name of its config.
    image_size: the side in pixels for which it has positions.
    table: our weight table for the hub's keys.
    names: {part of a hub's key: the same part in a file of diffusers}.
    unused: (width, mlp_dim) -> {key: shape} of arrays that diffusers ignores.
    prefix: of the keys that are written.
  """

  model_type: str
  image_size: int
  table: Callable[[EncoderSpec, Shapes], Table]
  names: Mapping[str, str]
  unused: Callable[[int, int], dict[str, tuple[int, ...]]]
  prefix: str = 'encoder.'


def _pooling_head(d: int, mlp: int) -> dict[str, tuple[int, ...]]:
  shapes: dict[str, tuple[int, ...]] = {'probe': (1, 1, d)}
  for name, outputs, inputs in (
    ('attention.in_proj_', 3 * d, d),
    ('attention.out_proj.', d, d),
    ('mlp.fc1.', mlp, d),
    ('mlp.fc2.', d, mlp),
  ):
    shapes |= {f'{name}weight': (outputs, inputs), f'{name}bias': (outputs,)}
  shapes |= {'layernorm.weight': (d,), 'layernorm.bias': (d,)}
  return {f'head.{name}': shape for name, shape in shapes.items()}


_KINDS = {
  'dinov2': _Kind(
    'dinov2_with_registers',
    518,
    dinov2.table,
    _ATTENTION,
    lambda d, _: {'embeddings.mask_token': (1, d)},
  ),
  'siglip2': _Kind(
    'siglip_vision_model',
    256,
    siglip.table,
    {},
    _pooling_head,
    'encoder.vision_model.',
  ),
  'mae': _Kind(
    'vit_mae',
    224,
    mae.table,
    _ATTENTION
    | {
      'encoder.layer.': 'layers.',
      'intermediate.dense': 'mlp.fc1',
      '.output.dense': '.mlp.fc2',
    },
    lambda *_: {},
  ),
}


def _renamed(
  table: Table, names: Mapping[str, str], prefixes: tuple[str, ...]
) -> Table:
  """The table with parts of its keys renamed and other prefixes."""

  def rename(row):
    if isinstance(row, Ignore):
      return row
    source = row.source
    for ours, theirs in names.items():
      source = source.replace(ours, theirs)
    return dataclasses.replace(row, source=source)

  return Table(tuple(map(rename, table.rows)), prefixes)


def _tables(tokenizer: Tokenizer, kind: str, old: bool) -> dict[str, Table]:
  """{part: its weight table}; `old`: encoder keys are from transformers 4."""
  spec = tokenizer.encoder_spec
  row, pixels = _KINDS[kind], spec.pixel_norm
  return {
    'encoder': _renamed(
      row.table(spec, {}),
      {} if old else row.names,
      ('encoder.', 'vision_model.'),
    ),
    'decoder': _renamed(
      rae.rae_table(tokenizer.decoder_spec), _DECODER, ('decoder.',)
    ),
    'statistics': Table(
      (
        Computed('encoder_mean', lambda: _channels(pixels.mean), _PIXELS),
        Computed('encoder_std', lambda: _channels(pixels.std), _PIXELS),
        Ignore(
          r'_latents_(mean|std)', 'stored as codebook/latents, with std + 1e-5'
        ),
      ),
      (),
    ),
  }


def _channels(values: Any) -> np.ndarray:
  return np.asarray(values, np.float32).reshape(1, 3, 1, 1)


def _positions(width: int, n: int) -> np.ndarray:
  """f32[1 1+n*n width]: RAE's; n x n tokens span the coordinates of 16 x 16."""
  line = np.arange(n, dtype=np.float32) / np.float32(n / _GRID)
  return np.pad(posemb.sincos_at(width, line, line), ((1, 0), (0, 0)))[None]


# -------------------------------------------------------------------- reading


def _model(c: Mapping[str, Any], where: str) -> dict:
  """The section `model`, without latents, from a `config.json` merged over the
  defaults."""
  row = choose(_KINDS, c['encoder_type'], f'encoder_type in {where}')
  width, patch = c['encoder_hidden_size'], c['encoder_patch_size']
  if width < _HEAD:
    raise UserError(
      f'{where}: encoder_hidden_size={width} must be at least {_HEAD}, the '
      'channels of a head'
    )
  encoder = encoders.fields_of(
    dict(
      model_type=row.model_type,
      image_size=row.image_size,
      patch_size=patch,
      hidden_size=width,
      num_hidden_layers=c['encoder_num_hidden_layers'],
      num_attention_heads=width // _HEAD,
    ),
    where,
  )
  n = max(c['encoder_input_size'] // patch, 1)
  for key, want in (
    ('num_channels', 3),
    ('encoder_input_size', n * patch),
    ('image_size', n * c['patch_size']),
  ):
    if c[key] not in (want, None):
      raise UserError(f'{where}: {key}={c[key]!r} must be {want}')
  vit = DECODERS['B'] | dict(
    width=c['decoder_hidden_size'],
    depth=c['decoder_num_hidden_layers'],
    num_heads=c['decoder_num_attention_heads'],
    mlp_dim=c['decoder_intermediate_size'],
    patch_size=c['patch_size'],
    grid=(n, n),
  )
  if n != _GRID:
    vit |= _LEARNED
  norm = dict(
    mean=tuple(c['encoder_norm_mean'] or IMAGENET_NORM.mean),
    std=tuple(c['encoder_norm_std'] or IMAGENET_NORM.std),
  )
  encoder |= dict(pixel_norm=norm, output_norm='plain', resize=TORCH_BICUBIC)
  return dict(
    encoder=encoder, quantizer=dict(name='none'), decoder=dict(vit=vit)
  )


def _statistics(
  c: Mapping[str, Any], source: WeightFile, n: int
) -> tuple[dict, dict[str, np.ndarray]]:
  """(the section `model.latents`, {leaf name: array}) for n x n tokens."""

  def found(name: str, default: float) -> np.ndarray:
    if (handle := source.get(f'_latents_{name}')) is not None:
      return handle.read().astype(np.float32)
    values = c[f'latents_{name}']
    return np.asarray([default] if values is None else values, np.float32)

  mean, std, scale = found('mean', 0), found('std', 1), c['scaling_factor']
  if (mean.tolist(), std.tolist(), scale) == ([0], [1], 1):
    return {}, {}  # diffusers still divides latents by 1 + 1e-5
  d, channel_first = c['encoder_hidden_size'], c['reshape_to_2d']
  shape = (1, d, n, n) if channel_first else (1, n * n, d)
  ends = (-2, None) if channel_first else (-2, -1)
  by_position = any(s > 1 for x in (mean, std) for s in x.shape[slice(*ends)])

  def ours(x: np.ndarray) -> np.ndarray:
    try:
      x = np.broadcast_to(x, shape)
    except ValueError:
      raise UserError(
        f'{source.name}: the statistics of latents have shape {x.shape}, which '
        f'must be {shape}, or have 1 for any of these sizes'
      ) from None
    x = (np.moveaxis(x, 1, -1) if channel_first else x).reshape(n, n, d)
    if not np.isfinite(x).all():
      raise UserError(
        f'{source.name}: the statistics of latents are NaN or infinite '
        f'(scaling_factor={scale})'
      )
    return x if by_position else x[0, 0]

  with np.errstate(divide='ignore'):
    std = (std + _EPS) / np.float32(scale)
  leaves = dict(mean=ours(mean), std=ours(std))
  section = dict(norm='channel')
  if by_position:
    section = dict(norm='position', grid=(n, n))
  return section, {f'codebook/latents/{k}': x for k, x in leaves.items()}


def read(
  config: Mapping[str, Any], where: str, source: WeightFile
) -> tuple[Tokenizer, dict[str, Pretrained], dict[str, np.ndarray]]:
  """Matches a folder's weights with the tokenizer that its config describes.

  Of the values, it reads the means, the stds and the decoder's positions.

  Args:
    config: its `config.json`.
    where: the path of that file, for errors.
    source: its opened weights, whose means and stds take precedence over the
      config's, as in diffusers.

  Returns:
    (the tokenizer, {part: its matched arrays}, {"codebook/latents/…": array}).

  Raises:
    UserError: the config is invalid or has no counterpart here, or the weights
      do not fit it.
  """
  c = {k: v for k, v in config.items() if not k.startswith('_')}
  if unknown := c.keys() - _DEFAULTS.keys():
    raise UserError(
      f'{where}: "{min(unknown)}" is not a key of {CLASS} in diffusers '
      f'{_VERSION}, which ignores it; remove it'
    )
  c = _DEFAULTS | c
  for key, usual in _DEFAULTS.items():
    if type(usual) is int and not (type(c[key]) is int and c[key] > 0):
      raise UserError(
        f'{where}: {key}={c[key]!r} must be a whole number above 0'
      )
  for name in ('mean', 'std'):
    if (pixels := source.get(f'encoder_{name}')) is not None:
      # The shortest decimal: .485 rather than .48500001.
      values = pixels.read().astype(np.float32).ravel()
      c[f'encoder_norm_{name}'] = [float(str(x)) for x in values]
  try:
    model = _model(c, where)
    n = model['decoder']['vit']['grid'][0]
    model['latents'], statistics = _statistics(c, source, n)
  except UserError:
    raise
  except (TypeError, ValueError, ArithmeticError) as e:
    raise UserError(f'{where} is not a config of {CLASS}: {e}') from None
  tokenizer = build_tokenizer(model)
  kind, spec = c['encoder_type'], tokenizer.decoder_spec.vit
  old = any('attention.attention.query' in key for key in source)
  parts: dict[str, dict] = {p: {} for p in ('encoder', 'decoder', 'statistics')}
  for key, handle in source.items():
    part = key.split('.', 1)[0]
    parts[part if part in parts else 'statistics'][key] = handle
  if spec.posemb == 'learned':
    parts['decoder'] |= arrays('', {_TABLE: _positions(spec.width, n)})
  targets = variable_shapes(tokenizer)
  fits = {
    part: Pretrained(
      WeightFile(source.name, parts[part]),
      table,
      _of_part(targets, part),
      f'{where} describes another model',
    )
    for part, table in _tables(tokenizer, kind, old).items()
  }
  return tokenizer, fits, statistics


def _of_part(leaves: Mapping[str, Any], part: str) -> dict[str, Any]:
  prefix = f'params/{part}/'
  return {
    n.removeprefix(prefix): x for n, x in leaves.items() if n.startswith(prefix)
  }


# -------------------------------------------------------------------- writing


def _config(tokenizer: Tokenizer, kind: str) -> dict[str, Any]:
  """A config with the tokenizer's sizes and pixel norm, else the defaults."""
  e, d = tokenizer.encoder_spec, tokenizer.decoder_spec.vit
  return _DEFAULTS | dict(
    encoder_type=kind,
    encoder_hidden_size=e.vit.width,
    encoder_patch_size=e.vit.patch_size,
    encoder_num_hidden_layers=e.vit.depth,
    decoder_hidden_size=d.width,
    decoder_num_hidden_layers=d.depth,
    decoder_num_attention_heads=d.num_heads,
    decoder_intermediate_size=d.mlp_dim,
    patch_size=d.patch_size,
    encoder_input_size=d.grid[0] * e.vit.patch_size,
    encoder_norm_mean=list(e.pixel_norm.mean),
    encoder_norm_std=list(e.pixel_norm.std),
  )


def _differences(tokenizer: Tokenizer, kind: str) -> list[str]:
  """Where a tokenizer differs from the closest one that diffusers builds."""
  latents = dataclasses.asdict(tokenizer.latents_spec)
  d = tokenizer.decoder_spec.vit
  if latents['grid']:
    latents['grid'] = d.grid
  model = _model(_config(tokenizer, kind), f'a config of {CLASS}')
  # The caller compares the position tables themselves.
  vit = model['decoder']['vit']
  vit |= _LEARNED if d.posemb == 'learned' else _FIXED
  theirs = build_tokenizer(model | dict(latents=latents))
  have, want = (
    traverse_util.flatten_dict(describe(t), sep='.')
    for t in (tokenizer, theirs)
  )
  for fields in (have, want):
    # Only whether there is LayerScale: its initial value has no effect here.
    fields['encoder.vit.layer_scale'] = (
      fields['encoder.vit.layer_scale'] is not None
    )
    if d.patch_size == tokenizer.encoder_spec.patch_size:
      del fields['encoder.resize']  # nothing is resized
  return [
    f'model.{key}={have.get(key)!r} (there {want.get(key)!r})'
    # The quantizer first: no other encoder or decoder would change it.
    for key in sorted(have | want, key=lambda key: key != 'quantizer.name')
    if have.get(key) != want.get(key)
  ]


def to_diffusers(
  tokenizer: Tokenizer, variables: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """(`config.json`, {key: array}) of an `AutoencoderRAE`.

  DINOv2's mask token and SigLIP's pooling head, which the class has but does
  not use, are written as zeros.

  Raises:
    UserError: the class cannot represent the tokenizer.
  """
  if not isinstance(tokenizer.encoder_spec, EncoderSpec):
    raise UserError(
      f'model.encoder.name="{plugins.name_of(type(tokenizer.encoder_spec))}" '
      f"has no counterpart in diffusers' {CLASS}"
    )
  found = {kind: _differences(tokenizer, kind) for kind in _KINDS}
  kind = min(found, key=lambda k: len(found[k]))
  if found[kind]:
    more = len(found[kind]) - _SHOWN
    raise UserError(
      f'diffusers\' {CLASS} with encoder_type="{kind}" has no counterpart of '
      f'{", ".join(found[kind][:_SHOWN])}{f" and {more} more" * (more > 0)}'
    )
  leaves = {n: np.asarray(x) for n, x in trees.flatten(variables).items()}
  theirs = {
    part: export(table, _of_part(leaves, part))
    for part, table in _tables(tokenizer, kind, old=False).items()
  }
  d = tokenizer.decoder_spec.vit
  positions = theirs['decoder'].pop('decoder_pos_embed')
  off = np.abs(positions - _positions(d.width, d.grid[0])).max()
  if off > TOLERANCE:
    raise UserError(
      f'model.decoder.vit.posemb="{d.posemb}": the positions differ by up to '
      f"{off:.3g} from those that diffusers' {CLASS} computes, which has RAE's "
      f'for {_GRID}x{_GRID} tokens alone, and no trained ones'
    )
  config = {'_class_name': CLASS, '_diffusers_version': _VERSION}
  config |= _config(tokenizer, kind)
  out = theirs['statistics']
  for name, default in ('mean', 0), ('std', 1):
    x = leaves.get(f'codebook/latents/{name}')
    if x is None:
      out[f'_latents_{name}'] = np.full(1, default, np.float32)
      continue
    x = x - _EPS if name == 'std' else x
    x = np.moveaxis(x if x.ndim == 3 else x[None, None], -1, 0)
    out[f'_latents_{name}'] = x
    config[f'latents_{name}'] = x.tolist()
  row, vit = _KINDS[kind], tokenizer.encoder_spec.vit
  encoder = theirs['encoder']
  for key, shape in row.unused(vit.width, vit.mlp_dim).items():
    encoder[key] = np.zeros(shape, np.float32)
  out |= {row.prefix + key: x for key, x in encoder.items()}
  return config, out | {f'decoder.{k}': x for k, x in theirs['decoder'].items()}
