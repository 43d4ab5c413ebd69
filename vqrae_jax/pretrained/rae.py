"""RAE's published decoders (arXiv 2510.11690) to a decoder's leaves, and back.

A file is flat: 8 + 16 * depth keys, each with its row in the table.
One key is the position table: with `posemb="sincos2d"` positions are computed
here and must equal it; with `posemb="learned"` and `prefix_has_posemb=True` it
is loaded, and a schedule of None keeps it fixed. A file does not record the
number of heads or the activation: the spec must have RAE's.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.encoders import naming
from vqrae_jax.errors import UserError
from vqrae_jax.models.decoder import DECODERS, Decoder
from vqrae_jax.ops import posemb
from vqrae_jax.specs import DecoderSpec
from vqrae_jax.weights.files import WeightFile
from vqrae_jax.weights.load import Pretrained, deviation, export
from vqrae_jax.weights.rules import Computed, Ignore, Rule, Table

_POSITIONS = 'decoder_pos_embed'
# Values of all published decoders.
_TRAINED = dict(
  norm='layer', norm_eps=1e-12, act='gelu', qkv_bias=True, num_prefix_tokens=1,
  num_registers=0,
)  # fmt: skip


def _fixed_positions(spec: DecoderSpec) -> np.ndarray:
  """f32[1 prefix+gh*gw d]: zero rows for prefix tokens, then the grid's."""
  s = spec.vit
  table = posemb.sincos2d(s.width, s.grid, s.grid)
  return np.pad(table, ((s.num_prefix_tokens, 0), (0, 0)))[None]


def rae_table(spec: DecoderSpec) -> Table:
  """The weight table from a published RAE decoder to a decoder of `spec`."""
  if spec.vit.posemb == 'learned':
    positions = naming.positions(_POSITIONS)
  else:
    positions = Computed(
      _POSITIONS,
      lambda: _fixed_positions(spec),
      'fixed sin-cos positions',
      hint='to keep the table of the file, set model.decoder.vit='
      'dict(posemb="learned", prefix_has_posemb=True) in the config file',
    )
  rows = (
    positions,
    Rule('trainable_cls_token', 'embed/prefix', 'batched'),
    *naming.dense('decoder_embed', 'embed/linear'),
    *naming.hf_vit('decoder_layers.{i}.'),
    *naming.norm('decoder_norm', 'norm'),
    *naming.dense('decoder_pred', 'head'),
    Ignore(
      r'(encoder|quantizer|fsq_projection|fsq_unprojection|post_quant_conv)'
      r'\..*',
      'a part of the tokenizer other than its decoder',
    ),
  )
  return Table(rows, ('module.', '_orig_mod.', 'decoder.'))


def _check_spec(spec: DecoderSpec) -> None:
  s = spec.vit
  for field, want in _TRAINED.items():
    if getattr(s, field) != want:
      raise UserError(
        f'decoder.vit.{field}={getattr(s, field)!r}, but RAE trained its '
        f'decoders with {want!r}; set it so to exchange weights with them'
      )
  if s.posemb == 'rope2d':
    raise UserError(
      'decoder.vit.posemb="rope2d", but RAE\'s decoders add positions; set '
      '"sincos2d" or "learned" to exchange weights with them'
    )
  if s.posemb == 'learned' and not s.prefix_has_posemb:
    raise UserError(
      'decoder.vit.posemb="learned" loads the positions of an RAE file, which '
      'include the cls token: set decoder.vit.prefix_has_posemb=True'
    )
  for name, row in DECODERS.items():
    same = all(row[f] == getattr(s, f) for f in ('width', 'depth', 'mlp_dim'))
    if same and s.num_heads != row['num_heads']:
      raise UserError(
        f'decoder.vit.num_heads={s.num_heads}, but the RAE decoder {name} has '
        f'{row["num_heads"]}'
      )


def has_trained_positions(source: WeightFile, spec: DecoderSpec) -> bool:
  """Whether a file's positions were trained: they have the shape of the fixed
  ones of `spec` and other values."""
  fixed = _fixed_positions(spec)
  found = next((x for k, x in source.items() if k.endswith(_POSITIONS)), None)
  if found is None or found.shape != fixed.shape:
    return False
  return deviation(found.read().astype('f4'), fixed, found.dtype) > 0


def _sizes(source: WeightFile) -> str:
  """A hint for the error: the decoder's sizes, from the file's shapes."""

  def shape(suffix: str) -> tuple[int, ...]:
    return next((x.shape for k, x in source.items() if k.endswith(suffix)), ())

  try:
    width, latent_dim = shape('decoder_embed.weight')
    mlp_dim, _ = shape('.intermediate.dense.weight')
    values, _ = shape('decoder_pred.weight')
    _, positions, _ = shape(_POSITIONS)
    layers = re.findall(r'decoder_layers\.(\d+)\.', ' '.join(source))
    depth = 1 + max(map(int, layers))
  except ValueError:
    return 'it is not an RAE decoder; give the file that RAE published'
  return (
    f'the file is a decoder for latents of {latent_dim} channels with '
    f'width={width}, depth={depth}, mlp_dim={mlp_dim}, '
    f'patch_size={round((values / 3) ** 0.5)} and {positions - 1} positions: '
    'set model.decoder.vit, or the encoder, to these'
  )


def fit_decoder(
  source: WeightFile, spec: DecoderSpec, latent_dim: int
) -> Pretrained:
  """Matches a published RAE decoder with `spec`.

  Of the values it reads only fixed positions, to compare them. `.source.note`
  names the section of a training file that is used, `.ignored` the keys that
  are not and why; `.read` and `.load` give leaves.

  Args:
    source: the opened file, flat or under "decoder.", or a training file,
      whose "ema" is preferred to its "model".
    spec: the decoder to fill, with the file's `grid`.
    latent_dim: channels of the latents that it decodes.

  Raises:
    UserError: a file that does not fit, or a `spec` that RAE's decoders lack.
  """
  _check_spec(spec)
  latents = jax.ShapeDtypeStruct((1, *spec.vit.grid, latent_dim), jnp.float32)
  target = jax.eval_shape(Decoder(spec).init, jax.random.key(0), latents)
  return Pretrained(
    source, rae_table(spec), target['params'], hint=_sizes(source)
  )


def export_rae_decoder(leaves: dict, spec: DecoderSpec) -> dict:
  """{RAE's key: array}: the inverse of `fit_decoder`, bitwise.

  Args:
    leaves: {leaf name under params/decoder: array}, or the tree.
    spec: the decoder's; with "sincos2d" the positions are computed.

  Raises:
    UserError: RAE's decoders cannot have this `spec`.
  """
  _check_spec(spec)
  return export(rae_table(spec), leaves)
