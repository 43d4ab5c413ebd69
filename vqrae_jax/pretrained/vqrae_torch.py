"""Whole tokenizers of the PyTorch project (github hugoycj/RAE), both ways.

A model there has the keys `encoder.` (`torch_encoders.py`), `decoder.`
(`rae.py`) and `quantizer.` with, beside it, `fsq_projection.`,
`fsq_unprojection.`, `post_quant_conv.` (`torch_quantizers.py`). Each part is
held to its own table; together they leave no key and no leaf.

It reads no file by itself (`weights`) and writes none (`convert.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from vqrae_jax import encoders, quantizers, weights
from vqrae_jax.encoders import dinov2, internvit, mae, siglip
from vqrae_jax.encoders.naming import Shapes
from vqrae_jax.errors import UserError
from vqrae_jax.models.tokenizer import Tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import rae
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.weights import (
  PREFIXES,
  Pretrained,
  Rule,
  Table,
  WeightFile,
  computed,
  export,
  ignore,
)

# ----------------------------------------------------------------------------
# The quantizers of the PyTorch project (github hugoycj/RAE) and ours.
#
# A form is read off a file's keys (`detect`): VQ with a table that averages or
# gradients move, SimVQ by squared L2 or by cosine, FSQ between linear maps or
# between an MLP and a Fourier unprojection, each with or without a convolution.
# `quantizer_table` is the weight table of any of them. What is no part of a
# tokenizer is skipped with its reason, and written back (`fresh_state`) as a
# training run there would find it at its start.
#
# What it does not do: know the rest of a model (`vqrae_torch.py`).

_P, _C = 'params/quantizer/', 'codebook/quantizer/'
# VQ's table there is a buffer that averages move; one that gradients move is
# written as PyTorch's `nn.Embedding` would have it.
_TABLES = {
  'ema': 'quantizer.embedding',
  'gradient': 'quantizer.embedding.weight',
}
_AVERAGE = r'quantizer\.(ema_cluster_size|ema_w)'
_REFUSED = {
  'quantizer.input_proj.': 'SimVQ of the first form, whose codes are rows that '
  'no map has touched',
  'fsq_projection.transformer.': "FSQ's attention projector",
}


@dataclasses.dataclass(frozen=True)
class Form:
  """A quantizer as its keys tell it.

  `fields` are certain; `guesses` are what the project's code did when it
  wrote such keys, and give way to what a user says; `words` are for a report.
  """

  name: str
  fields: dict[str, Any]
  guesses: dict[str, Any]
  words: str


def _levels(source: WeightFile) -> tuple[int, ...] | None:
  """FSQ's levels, from its buffers; None without them."""
  if 'quantizer.scales' in source:
    tops = source['quantizer.scales'].read()
  elif 'quantizer.codebook' in source:
    tops = source['quantizer.codebook'].read().max(0)
  else:
    return None
  return tuple(round(2 * float(t) + 1) for t in tops)


def detect(source: WeightFile, latent_dim: int, name: str) -> Form:
  """The form of a file's quantizer.

  Args:
    source: the part "quantizer" of `split`.
    latent_dim: the encoder's width.
    name: the config's quantizer, for a file that has no key of one.

  Raises:
    UserError: a form that cannot be loaded, or none.
  """
  for prefix, what in _REFUSED.items():
    if any(k.startswith(prefix) for k in source):
      raise UserError(
        f'{source.name} holds {prefix}*: {what}, which this package does not '
        'have; convert a later checkpoint'
      )
  fsq = any(k.startswith('fsq_') for k in source) or 'quantizer.basis' in source
  if fsq:
    form = _detect_fsq(source)
  elif 'quantizer.embedding_proj.weight' in source:
    form = _detect_simvq(source)
  elif found := [u for u, key in _TABLES.items() if key in source]:
    (update, *_) = found
    k, c = source[_TABLES[update]].shape
    fields = dict(num_codes=k, code_dim=c, update=update, projection=False)
    form = Form('vq', fields, {}, f'VQ, {k} codes of {c}, update="{update}"')
  elif not any(k.startswith('quantizer.') for k in source):
    form = Form(name, {}, {}, f'no key of a quantizer: {name}, as configured')
  else:
    keys = ', '.join(sorted(source)[:4])
    raise UserError(
      f'{source.name}: no quantizer has these keys: {keys}; known are VQ '
      f'({", ".join(_TABLES.values())}), SimVQ '
      '(quantizer.embedding_proj.*) and FSQ (fsq_projection.*)'
    )
  return _with_post_quant(form, source, latent_dim)


def _detect_fsq(source: WeightFile) -> Form:
  levels = _levels(source)
  mlp = 'fsq_projection.net.0.weight' in source
  fourier = 'fsq_unprojection.fourier.B' in source
  fields: dict[str, Any] = dict(
    convention='centered',
    projection=any(k.startswith('fsq_') for k in source),
    adapter_in='mlp' if mlp else 'linear',
    adapter_out='fourier' if fourier else 'linear',
  )
  if levels:
    fields['levels'] = levels
  if mlp:
    fields['bound'] = 'clip'
    bound = ''
  else:
    bound = ', bound as configured (no key tells: "tanh" or "clip")'
  ways = f'in {fields["adapter_in"]}, out {fields["adapter_out"]}'
  return Form(
    'fsq', fields, {}, f'FSQ, levels {levels or "as given"}, {ways}{bound}'
  )


def _detect_simvq(source: WeightFile) -> Form:
  k, c = source['quantizer.embedding.weight'].shape
  mapped = 'quantizer.z_proj.weight' in source
  fields = dict(num_codes=k, code_dim=c, projection=False, token_map=mapped)
  if 'quantizer.l2_norm_scale' in source:
    scale = 'unit' if mapped else 'none'
    guesses = dict(distance='cosine', code_scale=scale, normalize=True)
    words = f'cosine (it has a temperature), codes scaled "{scale}"'
  else:
    guesses = dict(distance='l2', code_scale='rms', normalize=False)
    words = 'squared L2 (it has no temperature), tokens as they are'
  return Form('simvq', fields, guesses, f'SimVQ, {k} codes of {c}, {words}')


def _with_post_quant(form: Form, source: WeightFile, latent_dim: int) -> Form:
  conv = source.get('post_quant_conv.weight')
  post = None
  if conv is not None:
    width, *_, kernel = conv.shape
    code = form.name != 'fsq' or width != latent_dim
    post = dict(kernel=kernel, space='code' if code else 'latent')
  words = f', post_quant {post["kernel"]}x{post["kernel"]}' if post else ''
  fields = form.fields | dict(post_quant=post)
  return dataclasses.replace(form, fields=fields, words=form.words + words)


def _linear(theirs: str, ours: str) -> list[Rule]:
  return [
    Rule(f'{theirs}.weight', f'{_P}{ours}/kernel', 'linear'),
    Rule(f'{theirs}.bias', f'{_P}{ours}/bias'),
  ]


def _norm(theirs: str, ours: str) -> list[Rule]:
  return [
    Rule(f'{theirs}.weight', f'{_P}{ours}/scale'),
    Rule(f'{theirs}.bias', f'{_P}{ours}/bias'),
  ]


def _fsq_rows(q: quantizers.FSQ) -> list:
  rows: list = []
  if q.projection and q.adapter_in == 'mlp':
    rows += _norm('fsq_projection.norm', 'project_in/norm')
    for i in range(3):
      rows += _linear(f'fsq_projection.net.{2 * i}', f'project_in/dense{i}')
    rows.append(Rule('fsq_projection.post_gain', f'{_P}project_in/gain'))
  elif q.projection:
    rows += _linear('fsq_projection', 'project_in')
  if q.projection and q.adapter_out == 'fourier':
    rows.append(Rule('fsq_unprojection.fourier.B', f'{_C}frequencies'))
    for i in range(3):
      rows += _linear(f'fsq_unprojection.mlp.{3 * i}', f'project_out/dense{i}')
    for i in range(2):
      rows += _norm(f'fsq_unprojection.mlp.{3 * i + 1}', f'project_out/norm{i}')
  elif q.projection:
    rows += _linear('fsq_unprojection', 'project_out')
  tables = fsq_buffers(q.levels)
  if (q.adapter_in, q.adapter_out) == ('linear', 'linear'):
    del tables['quantizer.scales']
    rows.append(ignore(r'quantizer\.(scales|_basis|_levels)', 'made of levels'))
  for key, table in tables.items():
    rows.append(computed(key, lambda x=table: x, 'made of quantizer.levels'))
  return rows


def fsq_buffers(levels: tuple[int, ...]) -> dict[str, np.ndarray]:
  """What FSQ there holds and computes from its levels."""
  tops = np.asarray([(n - 1) / 2 for n in levels], np.float32)
  axes = [np.arange(n) - top for n, top in zip(levels, tops, strict=True)]
  grid = np.meshgrid(*axes, indexing='ij')
  basis = np.cumprod([1, *levels[:0:-1]])[::-1]
  return {
    'quantizer.codebook': np.stack([g.ravel() for g in grid], -1).astype('f4'),
    'quantizer.basis': basis.astype(np.int64),
    'quantizer.scales': tops,
  }


def quantizer_table(q: quantizers.Quantizer) -> Table:
  """The rows of a quantizer, for reading and writing alike.

  Raises:
    UserError: the project has no such quantizer.
  """
  rows: list = []
  if isinstance(q, quantizers.FSQ):
    if q.convention != 'centered':
      raise UserError(
        'the PyTorch project has FSQ of convention="centered" only'
      )
    rows += _fsq_rows(q)
  elif q.projection:
    raise UserError(
      f'the PyTorch project has no projections around {type(q).__name__}: only '
      'a tokenizer with quantizer.projection=False can go there'
    )
  elif isinstance(q, quantizers.VQ):
    ours = _C if q.update == 'ema' else _P
    rows.append(Rule(_TABLES[q.update], f'{ours}codes'))
    rows.append(ignore(_AVERAGE, "an average's memory: a tokenizer has none"))
  elif isinstance(q, quantizers.SimVQ):
    _check_simvq(q)
    rows.append(Rule('quantizer.embedding.weight', f'{_C}basis'))
    rows.append(
      Rule('quantizer.embedding_proj.weight', f'{_P}kernel', 'linear')
    )
    rows.append(Rule('quantizer.embedding_proj.bias', f'{_P}bias'))
    rows += _linear('quantizer.z_proj', 'map_tokens')
    temperature = 'a positive factor of all scores changes no nearest code'
    rows.append(ignore(r'quantizer\.l2_norm_scale', temperature))
    rows.append(ignore(_AVERAGE, 'counts of codes, for a log'))
  if q.post_quant is not None:
    rows.append(Rule('post_quant_conv.weight', f'{_P}post_conv/kernel', 'conv'))
    rows.append(Rule('post_quant_conv.bias', f'{_P}post_conv/bias'))
  return Table(tuple(rows), ())


def _check_simvq(q: quantizers.SimVQ) -> None:
  """The project scales neither tokens nor codes to an RMS of one."""
  if q.distance == 'l2' and q.normalize:
    raise UserError(
      'the PyTorch project compares tokens as they are: SimVQ of '
      'distance="l2" goes there with quantizer.normalize=False only'
    )
  if q.distance == 'cosine' and q.code_scale == 'rms':
    raise UserError(
      "the PyTorch project's decoder reads codes of norm one or as they are: "
      'SimVQ of distance="cosine" goes there with quantizer.code_scale="unit" '
      'or "none" only'
    )


def fresh_state(
  q: quantizers.Quantizer, middle: Mapping
) -> dict[str, np.ndarray]:
  """State of a training run there, as it begins."""
  if isinstance(q, quantizers.VQ) and q.update == 'ema':
    codes = middle[_TABLES['ema']]
    counts = np.ones(q.num_codes, np.float32)
    return {'quantizer.ema_cluster_size': counts, 'quantizer.ema_w': codes}
  if isinstance(q, quantizers.SimVQ):
    counts = np.zeros(q.num_codes, np.float32)
    out = {'quantizer.ema_cluster_size': counts}
    if q.distance == 'cosine':
      out['quantizer.l2_norm_scale'] = np.asarray(10.0, np.float32)
    return out
  return {}


# ----------------------------------------------------------------------------
# Encoders as they lie inside a checkpoint of the PyTorch project.
#
# The families' own tables, behind the project's prefixes: SigLIP (fixed sizes),
# DINOv2 (SwiGLU too), ViT-MAE and InternViT, as transformers' files name their
# leaves. A file says by its keys whose names it has; on the way back the spec
# says which names to write. The project itself has no InternViT: its place is
# that of the other models there.

# The wrappers around a family's own names, outermost first.
_PREFIXES = ('encoder.', 'model.', *PREFIXES)


@dataclasses.dataclass(frozen=True)
class _Family:
  """A family's names, and what stands before them in a whole model."""

  table: Callable[[EncoderSpec, Shapes], Table]
  home: str


_FAMILIES = {
  'SigLIP': _Family(siglip.table, 'encoder.model.'),
  'DINOv2': _Family(dinov2.table, 'encoder.encoder.'),
  'ViT-MAE': _Family(mae.table, 'encoder.model.'),
  'InternViT': _Family(internvit.hf_table, 'encoder.model.'),
}


def _family(spec: EncoderSpec) -> str:
  """Whose names a spec's leaves have; no spec is of two families."""
  s = spec.vit
  plain = s.norm == 'layer' and not s.qk_norm
  scaled = s.layer_scale is not None
  if s.posemb == 'learned' and not s.num_prefix_tokens:
    if plain and not scaled and s.qkv_bias:
      return 'SigLIP'
  elif s.posemb == 'learned' and s.prefix_has_posemb:
    one = s.num_prefix_tokens == 1 and not s.num_registers
    if scaled and plain and spec.final_norm:
      return 'DINOv2'
    if not scaled and plain and spec.final_norm and one:
      return 'ViT-MAE'
    if scaled and not spec.final_norm and one:
      return 'InternViT'
  raise UserError(
    "model.encoder is of no family that the PyTorch project's checkpoints are "
    f'written for: {", ".join(_FAMILIES)}; keep it as a tokenizer directory'
  )


def file_table(
  spec: EncoderSpec, shapes: Shapes, where: str
) -> tuple[Table, str]:
  """The rows for a file's own names, prefixes of the project allowed, and
  the names' name.

  Args:
    spec: the encoder to fill.
    shapes: {the file's key: shape}.
    where: the file, for the error.

  Raises:
    UserError: no family's names.
  """
  naming = encoders.naming_of(shapes, where)
  table = naming.table(spec, shapes)
  return dataclasses.replace(table, prefixes=_PREFIXES), naming.name


def export_encoder(leaves: dict, spec: EncoderSpec) -> dict[str, np.ndarray]:
  """{key in the project's whole model: array} of an encoder.

  DINOv2's mask token, which no tokenizer has and no latent needs, is written
  as it is drawn: zeros. SigLIP's pooling head is not written.

  Args:
    leaves: {leaf name under params/encoder: array}.
    spec: the encoder's.

  Raises:
    UserError: a family whose checkpoints are not written.
  """
  name = _family(spec)
  family = _FAMILIES[name]
  theirs = export(family.table(spec, {}), leaves)
  if name == 'DINOv2':
    width = spec.vit.width
    theirs['embeddings.mask_token'] = np.zeros((1, width), np.float32)
  return {family.home + key: x for key, x in theirs.items()}


_OURS = {
  'encoder': 'params/encoder/',
  'quantizer': '',
  'decoder': 'params/decoder/',
}
_WRAPPERS = ('module.', '_orig_mod.')
# State of training, or made from other leaves: in no file of theirs.
_NOT_THEIRS = ('codebook/quantizer/counts', 'codebook/quantizer/sums')
_CODES, _BASIS = 'codebook/quantizer/codes', 'codebook/quantizer/basis'


def split(source: WeightFile) -> dict[str, WeightFile]:
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
  return {p: WeightFile(source.name, found) for p, found in parts.items()}


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


def fit(source: WeightFile, tokenizer: Tokenizer) -> dict[str, Pretrained]:
  """{part: its arrays held to the tokenizer's leaves}; no value read yet.

  Raises:
    UserError: a part that does not fit; the line shows both sides.
  """
  _check_latents(tokenizer)
  parts, want = split(source), targets(tokenizer)
  shapes = {key: handle.shape for key, handle in parts['encoder'].items()}
  table, names = file_table(tokenizer.encoder_spec, shapes, source.name)
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
      quantizer_table(tokenizer.quantizer),
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


def to_torch(tokenizer: Tokenizer, variables: Any) -> dict[str, np.ndarray]:
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
  encoder = export_encoder(parts['encoder'], tokenizer.encoder_spec)
  decoder = rae.export_rae_decoder(parts['decoder'], tokenizer.decoder_spec)
  middle = weights.export(quantizer_table(q), parts['quantizer'])
  return (
    encoder
    | {f'decoder.{k}': x for k, x in decoder.items()}
    | middle
    | fresh_state(q, middle)
  )
