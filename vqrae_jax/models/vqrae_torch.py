"""Whole tokenizers of the PyTorch project (github hugoycj/RAE), both ways.

A model there has the keys `encoder.` (`torch_encoders.py`), `decoder.`
(`rae.py`) and `quantizer.` with, beside it, `fsq_projection.`,
`fsq_unprojection.`, `post_quant_conv.` (`torch_quantizers.py`). Each part is
held to its own table; together they leave no key and no leaf.

It reads no file by itself (`weights`) and writes none (`convert.py`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vqrae_jax import weights
from vqrae_jax.errors import UserError
from vqrae_jax.models import rae, torch_encoders, torch_quantizers
from vqrae_jax.models.tokenizer import Tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.weights import Pretrained, Source

_OURS = {
  'encoder': 'params/encoder/',
  'quantizer': '',
  'decoder': 'params/decoder/',
}
_WRAPPERS = ('module.', '_orig_mod.')
# State of training, or made from other leaves: in no file of theirs.
_NOT_THEIRS = ('codebook/quantizer/counts', 'codebook/quantizer/sums')
_CODES, _BASIS = 'codebook/quantizer/codes', 'codebook/quantizer/basis'


def split(source: Source) -> dict[str, Source]:
  """The file's arrays by the part of the tokenizer that they belong to."""
  parts: dict[str, dict] = {p: {} for p in _OURS}
  for key in source:
    plain = key
    while plain.startswith(_WRAPPERS):
      plain = plain.split('.', 1)[1]
    part = plain.split('.', 1)[0]
    parts[part if part in _OURS else 'quantizer'][plain] = source[key]
  for part in ('encoder', 'decoder'):
    if not parts[part]:
      raise UserError(
        f'{source.name} holds no "{part}." keys, so it is no whole model of '
        'the PyTorch project; a decoder alone is --source=rae:FILE'
      )
  return {p: Source(source.name, found) for p, found in parts.items()}


def targets(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
  """{part: {leaf name as its table has it: ShapeDtypeStruct}}."""
  p = tokenizer.patch_size
  image = jax.ShapeDtypeStruct((1, p, p, 3), np.float32)
  leaves = trees.flatten(
    jax.eval_shape(tokenizer.init, jax.random.key(0), image)
  )
  return {
    part: {
      n.removeprefix(_OURS[part]): x
      for n, x in leaves.items()
      if n.split('/')[1] == part and n not in _NOT_THEIRS
    }
    for part in _OURS
  }


def fit(source: Source, tokenizer: Tokenizer) -> dict[str, Pretrained]:
  """{part: its arrays held to the tokenizer's leaves}; no value read yet.

  Raises:
    UserError: a part that does not fit; the line shows both sides.
  """
  _check_latents(tokenizer)
  parts, want = split(source), targets(tokenizer)
  shapes = {key: handle.shape for key, handle in parts['encoder'].items()}
  table, names = torch_encoders.file_table(
    tokenizer.encoder_spec, shapes, source.name
  )
  return {
    'encoder': Pretrained(
      parts['encoder'],
      table,
      want['encoder'],
      f'it has the names of {names}: set model.encoder to the one that the '
      'model was trained with (output_norm="plain" if it has no last norm)',
    ),
    'quantizer': Pretrained(
      parts['quantizer'],
      torch_quantizers.quantizer_table(tokenizer.quantizer),
      want['quantizer'],
      'set model.quantizer',
    ),
    'decoder': rae.fit_decoder(
      parts['decoder'], tokenizer.decoder_spec, tokenizer.latent_dim
    ),
  }


def _check_latents(tokenizer: Tokenizer) -> None:
  if tokenizer.latents_spec.norm != 'none':
    raise UserError(
      f'model.latents.norm="{tokenizer.latents_spec.norm}": the PyTorch '
      'project normalises latents after it quantises them, by a file beside '
      'the weights; only models with norm="none" are converted'
    )


def load(fits: Mapping[str, Pretrained]) -> dict[str, np.ndarray]:
  """{"params/…" or "codebook/…": array} of all parts."""
  return {
    _OURS[part] + name: leaf
    for part, fitted in fits.items()
    for name, leaf in fitted.load().items()
  }


def export(tokenizer: Tokenizer, variables: Any) -> dict[str, np.ndarray]:
  """{key there: array}: a state dict of the PyTorch project's whole model.

  It lacks what no tokenizer has: a SigLIP's pooling head, which the project
  builds and does not use (`load_state_dict(…, strict=False)`).

  Raises:
    UserError: a tokenizer that the project has no form for.
  """
  _check_latents(tokenizer)
  leaves = {n: np.asarray(x) for n, x in trees.flatten(variables).items()}
  q = tokenizer.quantizer
  for name in _NOT_THEIRS:
    leaves.pop(name, None)
  if _BASIS in leaves or 'params/quantizer/codes' in leaves:
    leaves.pop(_CODES, None)  # baked
  parts = {
    part: {
      n.removeprefix(_OURS[part]): x
      for n, x in leaves.items()
      if n.split('/')[1] == part
    }
    for part in _OURS
  }
  encoder = torch_encoders.export_encoder(
    parts['encoder'], tokenizer.encoder_spec
  )
  decoder = rae.export_rae_decoder(parts['decoder'], tokenizer.decoder_spec)
  middle = weights.export(
    torch_quantizers.quantizer_table(q), parts['quantizer']
  )
  return (
    encoder
    | {f'decoder.{k}': x for k, x in decoder.items()}
    | middle
    | torch_quantizers.fresh_state(q, middle)
  )
