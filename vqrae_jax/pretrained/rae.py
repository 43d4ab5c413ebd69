"""RAE's published decoders (arXiv 2510.11690) as leaves of ours, and back.

A flat file of 8 + 16 * depth keys; every row of ours has its key there. The
file carries its position table: with `posemb="sincos2d"` ours is computed and
must equal it, with `posemb="learned"` and `prefix_has_posemb=True` it is
loaded as it is, and a schedule of None keeps it so. What a file cannot say is
its number of heads and its activation: those come from the spec, and are held
to what RAE trained.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax import weights
from vqrae_jax.errors import UserError
from vqrae_jax.models.decoder import DECODERS, Decoder
from vqrae_jax.ops import posemb
from vqrae_jax.specs import DecoderSpec
from vqrae_jax.weights import Rule, computed, ignore

_LAYER = 'decoder_layers.{i}.'
_BLOCK = 'transformer/blocks/'
_DENSE = {
  'attention.attention.query': 'attention/query',
  'attention.attention.key': 'attention/key',
  'attention.attention.value': 'attention/value',
  'attention.output.dense': 'attention/out',
  'intermediate.dense': 'mlp/fc1',
  'output.dense': 'mlp/fc2',
}
_NORMS = {'layernorm_before': 'norm1', 'layernorm_after': 'norm2'}
_POSITIONS = 'decoder_pos_embed'

# What the published decoders share, beyond the shapes of their leaves.
_TRAINED = dict(norm='layer', norm_eps=1e-12, act='gelu')


def _dense(theirs: str, ours: str, row: str = '') -> tuple[Rule, Rule]:
  return (
    Rule(f'{theirs}.weight', f'{ours}/kernel{row}', 'linear'),
    Rule(f'{theirs}.bias', f'{ours}/bias{row}'),
  )


def _norm(theirs: str, ours: str, row: str = '') -> tuple[Rule, Rule]:
  return (
    Rule(f'{theirs}.weight', f'{ours}/scale{row}'),
    Rule(f'{theirs}.bias', f'{ours}/bias{row}'),
  )


def _fixed_positions(spec: DecoderSpec) -> np.ndarray:
  """f32[1 1+gh*gw d]: a zero row for the cls token, then the grid's."""
  s = spec.vit
  table = posemb.sincos2d(s.width, s.grid, s.grid)
  prefix = np.zeros((s.num_prefix_tokens, s.width), np.float32)
  return np.concatenate([prefix, table])[None]


def _positions(spec: DecoderSpec) -> tuple:
  if spec.vit.posemb == 'learned':
    return (
      Rule(
        _POSITIONS,
        ('embed/prefix_positions', 'embed/positions'),
        ('batched', 'batched grid'),
      ),
    )
  return (
    computed(
      _POSITIONS,
      lambda: _fixed_positions(spec),
      'fixed sin-cos positions',
      hint='to keep the table of the file, set '
      'decoder.vit.posemb="learned" and decoder.vit.prefix_has_posemb=True',
    ),
  )


def rae_table(spec: DecoderSpec) -> weights.Table:
  """The rows of a published RAE decoder, for a decoder of `spec`."""
  row = '[{i}]'
  rows = [*_positions(spec)]
  rows.append(Rule('trainable_cls_token', 'embed/prefix', 'batched'))
  rows += _dense('decoder_embed', 'embed/linear')
  for theirs, ours in _DENSE.items():
    rows += _dense(_LAYER + theirs, _BLOCK + ours, row)
  for theirs, ours in _NORMS.items():
    rows += _norm(_LAYER + theirs, _BLOCK + ours, row)
  rows += _norm('decoder_norm', 'norm')
  rows += _dense('decoder_pred', 'head')
  rows.append(
    ignore(
      r'(encoder|quantizer|fsq_projection|fsq_unprojection|post_quant_conv)'
      r'\..*',
      'a part of the tokenizer other than its decoder',
    )
  )
  return weights.Table(tuple(rows), ('module.', '_orig_mod.', 'decoder.'))


def _check_spec(spec: DecoderSpec) -> None:
  s = spec.vit
  for field, want in _TRAINED.items():
    if getattr(s, field) != want:
      raise UserError(
        f'decoder.vit.{field}={getattr(s, field)!r}, and RAE decoders were '
        f'trained with {want!r}: this one cannot be exchanged with them (a new '
        'run may set it so)'
      )
  if s.posemb == 'learned' and not s.prefix_has_posemb:
    raise UserError(
      'decoder.vit.posemb="learned" takes the positions of an RAE file, which '
      'has one for the cls token: set decoder.vit.prefix_has_posemb=True'
    )
  for name, row in DECODERS.items():
    same = all(row[f] == getattr(s, f) for f in ('width', 'depth', 'mlp_dim'))
    if same and s.num_heads != row['num_heads']:
      raise UserError(
        f'decoder.vit.num_heads={s.num_heads}, and the RAE decoder {name} has '
        f'{row["num_heads"]}; set it so'
      )


def _sizes(source: weights.WeightFile) -> str:
  """The sizes that a file's shapes tell, as a way out of a misfit."""

  def shape(suffix: str, ndim: int) -> tuple[int, ...] | None:
    found = [h.shape for k, h in source.items() if k.endswith(suffix)]
    return found[0] if found and len(found[0]) == ndim else None

  embed = shape('decoder_embed.weight', 2)
  hidden = shape('.intermediate.dense.weight', 2)
  head = shape('decoder_pred.weight', 2)
  table = shape(_POSITIONS, 3)
  layers = [
    int(m[1]) for k in source if (m := re.search(r'decoder_layers\.(\d+)\.', k))
  ]
  if not (embed and hidden and head and table and layers):
    return 'it is no RAE decoder; give the file that RAE published'
  patch = round((head[0] / 3) ** 0.5)
  return (
    f'the file is a decoder for latents of {embed[1]} channels with '
    f'width={embed[0]}, depth={1 + max(layers)}, mlp_dim={hidden[0]}, '
    f'patch_size={patch} and {table[1] - 1} positions: set model.decoder.vit, '
    'or the encoder, to these'
  )


def fit_rae_decoder(
  path: str | pathlib.Path, spec: DecoderSpec, latent_dim: int
) -> weights.Pretrained:
  """A published RAE decoder held to `spec`, whole, its values not read yet.

  `.source.note` says which section of a training file was taken, `.ignored`
  what was left out and why; `.read` and `.load` give leaves.

  Args:
    path: the `.pt` (or `.safetensors`), flat or under "decoder.", or a
      training file, whose "ema" is preferred to its "model".
    spec: the decoder to fill; its `grid` is the file's.
    latent_dim: channels of the latents it decodes.

  Raises:
    UserError: no such file, a damaged one, or one that does not fit.
  """
  return fit_decoder(weights.open_weights(path), spec, latent_dim)


def fit_decoder(
  source: weights.WeightFile, spec: DecoderSpec, latent_dim: int
) -> weights.Pretrained:
  """`fit_rae_decoder` of an opened file."""
  _check_spec(spec)
  latents = jax.ShapeDtypeStruct((1, *spec.vit.grid, latent_dim), jnp.float32)
  target = jax.eval_shape(Decoder(spec).init, jax.random.key(0), latents)
  return weights.Pretrained(
    source, rae_table(spec), target['params'], hint=_sizes(source)
  )


def load_rae_decoder(
  path: str | pathlib.Path, spec: DecoderSpec, latent_dim: int
) -> dict[str, np.ndarray]:
  """{leaf name under params/decoder: array}; arguments of `fit_rae_decoder`.

  Raises:
    UserError: as there, and a value that is NaN or infinite.
  """
  return fit_rae_decoder(path, spec, latent_dim).load()


def export_rae_decoder(leaves: dict, spec: DecoderSpec) -> dict:
  """{RAE's key: array}: `load_rae_decoder` backwards, bitwise.

  Args:
    leaves: {leaf name under params/decoder: array}, or the tree.
    spec: the decoder's; with "sincos2d" the positions written are computed.
  """
  _check_spec(spec)
  return weights.export(rae_table(spec), leaves)
