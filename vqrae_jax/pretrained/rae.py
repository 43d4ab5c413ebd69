"""RAE's published decoders (arXiv 2510.11690) as leaves of ours, and back.

A flat file of 8 + 16 * depth keys; every row of our table has its key there.
The file contains its position table: with `posemb="sincos2d"` ours is computed
and must equal it; with `posemb="learned"` and `prefix_has_posemb=True` it is
loaded, and a schedule of None keeps it fixed. A file does not contain the
number of heads and the activation: the spec has them, and must have RAE's.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax import weights
from vqrae_jax.encoders import naming
from vqrae_jax.errors import UserError
from vqrae_jax.models.decoder import DECODERS, Decoder
from vqrae_jax.ops import posemb
from vqrae_jax.specs import DecoderSpec
from vqrae_jax.weights import Rule, computed, ignore

_POSITIONS = 'decoder_pos_embed'
# Fields that all published decoders have, and that no shape shows.
_TRAINED = dict(norm='layer', norm_eps=1e-12, act='gelu')


def _fixed_positions(spec: DecoderSpec) -> np.ndarray:
  """f32[1 1+gh*gw d]: a zero row for the cls token, then the grid's."""
  s = spec.vit
  table = posemb.sincos2d(s.width, s.grid, s.grid)
  prefix = np.zeros((s.num_prefix_tokens, s.width), np.float32)
  return np.concatenate([prefix, table])[None]


def rae_table(spec: DecoderSpec) -> weights.Table:
  """The rows of a published RAE decoder, for a decoder of `spec`."""
  if spec.vit.posemb == 'learned':
    positions = naming.positions(_POSITIONS)
  else:
    positions = computed(
      _POSITIONS,
      lambda: _fixed_positions(spec),
      'fixed sin-cos positions',
      hint='to keep the table of the file, set '
      'decoder.vit.posemb="learned" and decoder.vit.prefix_has_posemb=True',
    )
  rows = (
    positions,
    Rule('trainable_cls_token', 'embed/prefix', 'batched'),
    *naming.dense('decoder_embed', 'embed/linear'),
    *naming.hf_vit('decoder_layers.{i}.'),
    *naming.norm('decoder_norm', 'norm'),
    *naming.dense('decoder_pred', 'head'),
    ignore(
      r'(encoder|quantizer|fsq_projection|fsq_unprojection|post_quant_conv)'
      r'\..*',
      'a part of the tokenizer other than its decoder',
    ),
  )
  return weights.Table(rows, ('module.', '_orig_mod.', 'decoder.'))


def _check_spec(spec: DecoderSpec) -> None:
  s = spec.vit
  for field, want in _TRAINED.items():
    if getattr(s, field) != want:
      raise UserError(
        f'decoder.vit.{field}={getattr(s, field)!r}, but RAE trained its '
        f'decoders with {want!r}; set it so to exchange weights with them'
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


def _sizes(source: weights.WeightFile) -> str:
  """The sizes in a file's shapes, as the hint of a misfit."""

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
    return 'it is not an RAE decoder; give the file that RAE published'
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
  """Matches a published RAE decoder with `spec`; reads no value yet.

  `.source.note` names the section of a training file that is read, `.ignored`
  the keys that are not used and why; `.read` and `.load` give leaves.

  Args:
    path: the `.pt` (or `.safetensors`), flat or under "decoder.", or a
      training file, whose "ema" is preferred to its "model".
    spec: the decoder to fill, with the file's `grid`.
    latent_dim: channels of the latents that it decodes.

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
  """{leaf name under params/decoder: array}; see `fit_rae_decoder`.

  Raises:
    UserError: also for a value that is NaN or infinite.
  """
  return fit_rae_decoder(path, spec, latent_dim).load()


def export_rae_decoder(leaves: dict, spec: DecoderSpec) -> dict:
  """{RAE's key: array}: the bitwise inverse of `load_rae_decoder`.

  Args:
    leaves: {leaf name under params/decoder: array}, or the tree.
    spec: the decoder's; with "sincos2d" the positions are computed.
  """
  _check_spec(spec)
  return weights.export(rae_table(spec), leaves)
