"""Models of the PyTorch project (github hugoycj/RAE), read and written.

The keys of a full model start with `encoder.`, `decoder.` or `quantizer.`;
those of `fsq_projection.`, `fsq_unprojection.` and `post_quant_conv.` belong to
the quantizer. Each part has its own weight table, and together they match every
key and every leaf:

  encoder    the family's own table behind the project's prefixes: SigLIP (fixed
             sizes), DINOv2, ViT-MAE and InternViT, as transformers names them
  quantizer  the form that the keys show: VQ with an EMA codebook or a trained
             one, SimVQ by squared L2 or by cosine, FSQ between linear maps or
             between an MLP and Fourier features, each with or without a
             convolution
  decoder    RAE's (`rae.py`)

No file is opened or written here (`weights/` and `convert.py` do).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from vqrae_jax import encoders, quantizers
from vqrae_jax.encoders import dinov2, internvit, mae, naming, siglip
from vqrae_jax.encoders.naming import Shapes
from vqrae_jax.errors import UserError
from vqrae_jax.models.tokenizer import Tokenizer, is_training_only
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import rae
from vqrae_jax.specs import TORCH_BICUBIC, EncoderSpec
from vqrae_jax.weights.files import WeightFile
from vqrae_jax.weights.load import Pretrained, export
from vqrae_jax.weights.rules import PREFIXES, Computed, Ignore, Rule, Table

# ------------------------------------------------------------------ encoders

# The project's wrappers around a family's own names, outermost first.
_PREFIXES = ('encoder.', 'model.', *PREFIXES)

# Family: (weight table, prefix of its keys in a full model). The project has no
# InternViT; it gets the prefix of the others.
_FAMILIES: dict[str, tuple[Callable[[EncoderSpec, Shapes], Table], str]] = {
  'SigLIP': (siglip.table, 'encoder.model.'),
  'DINOv2': (dinov2.table, 'encoder.encoder.'),
  'ViT-MAE': (mae.table, 'encoder.model.'),
  'InternViT': (internvit.hf_table, 'encoder.model.'),
}


NO_COUNTERPART = (
  "model.encoder has no counterpart among the PyTorch project's encoders: "
  f'{", ".join(_FAMILIES)}; keep the tokenizer directory'
)


def encoder_family(spec: EncoderSpec) -> str:
  """The family whose checkpoints have exactly the leaves of `spec`.

  Raises:
    UserError: there is none.
  """
  if not isinstance(spec, EncoderSpec):
    raise UserError(NO_COUNTERPART)
  s = spec.vit
  plain = s.norm == 'layer' and not s.qk_norm
  scaled = s.layer_scale is not None
  learned = s.posemb == 'learned' and spec.layers is None
  learned = learned and not s.embed_norm and s.qkv_bias != 'qv'
  if learned and not s.num_prefix_tokens:
    if plain and not scaled and s.qkv_bias:
      return 'SigLIP'
  elif learned and s.prefix_has_posemb:
    one = s.num_prefix_tokens == 1 and not s.num_registers
    if scaled and plain and spec.final_norm:
      return 'DINOv2'
    if not scaled and plain and spec.final_norm and one:
      return 'ViT-MAE'
    if scaled and not spec.final_norm and one:
      return 'InternViT'
  raise UserError(NO_COUNTERPART)


def export_encoder(leaves: dict, spec: EncoderSpec) -> dict[str, np.ndarray]:
  """{key in the project's full model: array} of an encoder.

  DINOv2's mask token, which a tokenizer does not have, is written as zeros,
  its initial value. SigLIP's pooling head is not written.

  Args:
    leaves: {leaf name under params/encoder: array}.
    spec: the encoder's.

  Raises:
    UserError: a family that the project does not have.
  """
  family = encoder_family(spec)
  table, prefix = _FAMILIES[family]
  theirs = export(table(spec, {}), leaves)
  if family == 'DINOv2':
    mask = np.zeros((1, spec.vit.width), np.float32)
    theirs['embeddings.mask_token'] = mask
  return {prefix + key: x for key, x in theirs.items()}


# ---------------------------------------------------------------- quantizers

_P, _C = 'params/quantizer/', 'codebook/quantizer/'
# An EMA codebook is a buffer there; one trained by gradients has the key of an
# `nn.Embedding`.
_TABLES = {
  'ema': 'quantizer.embedding',
  'gradient': 'quantizer.embedding.weight',
}
_AVERAGE = r'quantizer\.(ema_cluster_size|ema_w)'
_REFUSED = {
  'quantizer.input_proj.': 'the first form of SimVQ, whose codes are unmapped '
  'rows of its table',
  'fsq_projection.transformer.': "FSQ's attention projector",
}


@dataclasses.dataclass(frozen=True)
class Form:
  """A quantizer as the keys of a file describe it.

  Attributes:
    name: of the quantizer.
    fields: its fields that the keys determine.
    defaults: fields that the keys do not determine, as the project's code had
      them when it wrote such keys; the user's values take precedence.
    summary: for the printed report.
  """

  name: str
  fields: dict[str, Any]
  defaults: dict[str, Any]
  summary: str


def detect(source: WeightFile, latent_dim: int, name: str) -> Form:
  """The form of a file's quantizer.

  Args:
    source: the part "quantizer" of `split`.
    latent_dim: the encoder's width.
    name: the config's quantizer, for a file without quantizer keys.

  Raises:
    UserError: an unknown form, or one that is not supported.
  """
  for prefix, what in _REFUSED.items():
    if any(k.startswith(prefix) for k in source):
      raise UserError(
        f'{source.name} holds {prefix}*: {what}, which is not supported; '
        'convert a later checkpoint'
      )
  update = next((u for u, key in _TABLES.items() if key in source), None)
  if any(k.startswith('fsq_') for k in source) or 'quantizer.basis' in source:
    form = _detect_fsq(source)
  elif 'quantizer.embedding_proj.weight' in source:
    form = _detect_simvq(source)
  elif update:
    k, c = _shape(source, _TABLES[update], 2)
    fields = dict(num_codes=k, code_dim=c, update=update, projection=False)
    form = Form('vq', fields, {}, f'VQ, {k} codes of {c}, update="{update}"')
  elif not any(k.startswith('quantizer.') for k in source):
    summary = f'the file has no quantizer keys: {name}, as configured'
    form = Form(name, {}, {}, summary)
  else:
    keys = ', '.join(sorted(source)[:4])
    raise UserError(
      f'{source.name}: no supported quantizer has these keys: {keys}; '
      f'supported: VQ ({", ".join(_TABLES.values())}), SimVQ '
      '(quantizer.embedding_proj.*) and FSQ (fsq_projection.*)'
    )
  post, summary = None, form.summary
  if 'post_quant_conv.weight' in source:
    width, *_, kernel = _shape(source, 'post_quant_conv.weight', 4)
    code = form.name != 'fsq' or width != latent_dim
    post = dict(kernel=kernel, space='code' if code else 'latent')
    summary += f', post_quant {kernel}x{kernel}'
  fields = form.fields | dict(post_quant=post)
  return dataclasses.replace(form, fields=fields, summary=summary)


def _shape(source: WeightFile, key: str, ndim: int) -> tuple[int, ...]:
  found = source[key].shape if key in source else None
  if found is None or len(found) != ndim:
    what = 'is missing' if found is None else f'has shape {list(found)}'
    raise UserError(
      f'{source.name}: {key} {what}; it must have {ndim} dimensions'
    )
  return found


def _detect_fsq(source: WeightFile) -> Form:
  mlp = 'fsq_projection.net.0.weight' in source
  fourier = 'fsq_unprojection.fourier.B' in source
  fields: dict[str, Any] = dict(
    convention='centered',
    projection=any(k.startswith('fsq_') for k in source),
    adapter_in='mlp' if mlp else 'linear',
    adapter_out='fourier' if fourier else 'linear',
  )
  levels, tops = 'from the config', None
  if 'quantizer.scales' in source:
    tops = source['quantizer.scales'].read()
  elif 'quantizer.codebook' in source:
    tops = source['quantizer.codebook'].read().astype('f4').max(0, initial=-1)
  if tops is not None:
    if tops.ndim != 1 or not (np.isfinite(tops) & (tops > 0)).all():
      raise UserError(
        f'{source.name}: the largest values of quantizer.scales or .codebook '
        'are not (levels - 1) / 2 of each channel'
      )
    levels = fields['levels'] = tuple(round(2 * float(t) + 1) for t in tops)
  defaults = {}
  if mlp:
    fields['bound'] = 'clip'
  else:  # in all of the project's code; a fork may differ, and no key shows it
    defaults['bound'] = 'clip'
  ways = f'in {fields["adapter_in"]}, out {fields["adapter_out"]}'
  bound = 'bound "clip"' + ' unless --quantizer sets it' * (not mlp)
  summary = f'FSQ, levels {levels}, {ways}, {bound}'
  return Form('fsq', fields, defaults, summary)


def _detect_simvq(source: WeightFile) -> Form:
  k, c = _shape(source, 'quantizer.embedding.weight', 2)
  mapped = 'quantizer.z_proj.weight' in source
  fields = dict(num_codes=k, code_dim=c, projection=False, token_map=mapped)
  if 'quantizer.l2_norm_scale' in source:
    scale = 'unit' if mapped else 'none'
    defaults = dict(distance='cosine', code_scale=scale, normalize=True)
    metric = f'cosine (it has a temperature), codes scaled "{scale}"'
  else:
    defaults = dict(distance='l2', code_scale='rms', normalize=False)
    metric = 'squared L2 (it has no temperature), tokens not normalized'
  return Form('simvq', fields, defaults, f'SimVQ, {k} codes of {c}, {metric}')


def _fsq_rows(q: quantizers.FSQ) -> list:
  rows: list = []
  to_codes, to_latents = f'{_P}project_in', f'{_P}project_out'
  if q.projection and q.adapter_in == 'mlp':
    rows += naming.norm('fsq_projection.norm', f'{to_codes}/norm')
    for i in range(3):
      theirs = f'fsq_projection.net.{2 * i}'
      rows += naming.dense(theirs, f'{to_codes}/dense{i}')
    rows.append(Rule('fsq_projection.post_gain', f'{to_codes}/gain'))
  elif q.projection:
    rows += naming.dense('fsq_projection', to_codes)
  if q.projection and q.adapter_out == 'fourier':
    rows.append(Rule('fsq_unprojection.fourier.B', f'{_C}frequencies'))
    for i in range(3):
      theirs = f'fsq_unprojection.mlp.{3 * i}'
      rows += naming.dense(theirs, f'{to_latents}/dense{i}')
    for i in range(2):
      theirs = f'fsq_unprojection.mlp.{3 * i + 1}'
      rows += naming.norm(theirs, f'{to_latents}/norm{i}')
  elif q.projection:
    rows += naming.dense('fsq_unprojection', to_latents)
  buffers, why = fsq_buffers(q.levels), 'computed from quantizer.levels'
  if (q.adapter_in, q.adapter_out) == ('linear', 'linear'):
    del buffers['quantizer.scales']
    rows.append(Ignore(r'quantizer\.(scales|_basis|_levels)', why))
  rows += [Computed(k, lambda x=x: x, why) for k, x in buffers.items()]
  return rows


def fsq_buffers(levels: tuple[int, ...]) -> dict[str, np.ndarray]:
  """{key: buffer} of the project's FSQ, computed from the levels."""
  tops = np.asarray([(n - 1) / 2 for n in levels], np.float32)
  digits = np.indices(levels, np.float32).reshape(len(levels), -1).T
  basis = np.cumprod([1, *levels[:0:-1]])[::-1]
  return {
    'quantizer.codebook': digits - tops,
    'quantizer.basis': basis.astype(np.int64),
    'quantizer.scales': tops,
  }


def quantizer_table(q: quantizers.Quantizer) -> Table:
  """A quantizer's weight table, for reading and writing.

  Raises:
    UserError: the project has no such quantizer.
  """
  rows: list = []
  if (name := quantizers.name_of(q)) not in ('fsq', 'none', 'simvq', 'vq'):
    raise UserError(
      f'quantizer.name="{name}": the PyTorch project has no such quantizer; it '
      'has fsq, simvq, vq and none'
    )
  if isinstance(q, quantizers.FSQ):
    if q.convention != 'centered':
      raise UserError(
        f'quantizer.convention="{q.convention}": the PyTorch project has '
        'FSQ of convention="centered" only'
      )
    _check_levels(q)
    rows += _fsq_rows(q)
  elif q.projection:
    raise UserError(
      f'quantizer.projection={q.projection!r}: codes of {type(q).__name__} in '
      f'the PyTorch project are as wide as the latents ({q.latent_dim}, not '
      f'{q.code_width}), without projections'
    )
  elif isinstance(q, quantizers.VQ):
    if q.distance != 'l2' or q.affine:
      raise UserError(
        f'quantizer.distance="{q.distance}", quantizer.affine={q.affine}: the '
        'PyTorch project has VQ of distance="l2" and affine=False only'
      )
    ours = _C if q.update == 'ema' else _P
    rows.append(Rule(_TABLES[q.update], f'{ours}codes'))
    rows.append(Ignore(_AVERAGE, 'EMA state, which no tokenizer has'))
  elif isinstance(q, quantizers.SimVQ):
    _check_simvq(q)
    rows.append(Rule('quantizer.embedding.weight', f'{_C}basis'))
    rows += naming.dense('quantizer.embedding_proj', _P.rstrip('/'))
    rows += naming.dense('quantizer.z_proj', f'{_P}map_tokens')
    temperature = 'a temperature, which does not change the nearest code'
    rows.append(Ignore(r'quantizer\.l2_norm_scale', temperature))
    rows.append(Ignore(_AVERAGE, 'counts of codes, for a log'))
  if q.post_quant is not None:
    rows.append(Rule('post_quant_conv.weight', f'{_P}post_conv/kernel', 'conv'))
    rows.append(Rule('post_quant_conv.bias', f'{_P}post_conv/bias'))
  return Table(tuple(rows), ())


def _check_levels(q: quantizers.FSQ) -> None:
  """Refuses linear FSQ with even levels, which are half-integers: the project
  rounds to integers."""
  linear = q.adapter_in == 'linear' and q.bound == 'clip'
  if linear and any(n % 2 == 0 for n in q.levels):
    raise UserError(
      f'quantizer.levels={q.levels}: the linear FSQ of the PyTorch project '
      'rounds to integers, but an even number of levels has half-integers '
      'here; there is no counterpart (for a fork that bounds by tanh: '
      '--quantizer=bound="tanh")'
    )


def _check_simvq(q: quantizers.SimVQ) -> None:
  """Refuses scales that the project's SimVQ does not have."""
  if q.distance == 'l2' and q.normalize:
    raise UserError(
      'quantizer.normalize=True: the PyTorch project does not normalize tokens '
      'of SimVQ with distance="l2"'
    )
  if q.distance == 'cosine' and q.code_scale == 'rms':
    raise UserError(
      'quantizer.code_scale="rms": SimVQ with distance="cosine" has "unit" or '
      '"none" in the PyTorch project'
    )


def initial_state(
  q: quantizers.Quantizer, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """The initial training state of the project's quantizer with these exported
  arrays."""
  if isinstance(q, quantizers.VQ) and q.update == 'ema':
    codes = arrays[_TABLES['ema']]
    counts = np.ones(q.num_codes, np.float32)
    return {'quantizer.ema_cluster_size': counts, 'quantizer.ema_w': codes}
  if isinstance(q, quantizers.SimVQ):
    counts = np.zeros(q.num_codes, np.float32)
    out = {'quantizer.ema_cluster_size': counts}
    if q.distance == 'cosine':
      out['quantizer.l2_norm_scale'] = np.asarray(10.0, np.float32)
    return out
  return {}


# ----------------------------------------------------------- complete models

_OURS = {
  'encoder': 'params/encoder/',
  'quantizer': '',
  'decoder': 'params/decoder/',
}
_WRAPPERS = r'^((module|_orig_mod)\.)+'


def split(source: WeightFile) -> dict[str, WeightFile]:
  """The file's arrays by the part of the tokenizer that they belong to.

  Raises:
    UserError: the file has no encoder or no decoder, or a key twice.
  """
  parts: dict[str, dict] = {p: {} for p in _OURS}
  for key in source:
    plain = re.sub(_WRAPPERS, '', key)
    part = plain.split('.', 1)[0]
    found = parts[part if part in _OURS else 'quantizer']
    if plain in found:
      raise UserError(
        f'{source.name} holds {plain} more than once, under several prefixes; '
        'save the weights of one model'
      )
    found[plain] = source[key]
  for part in ('encoder', 'decoder'):
    if not parts[part]:
      raise UserError(
        f'{source.name} holds no "{part}." keys, so it is not a full model of '
        'the PyTorch project; a decoder alone is --source=rae:FILE'
      )
  return {p: WeightFile(source.name, found) for p, found in parts.items()}


def _by_part(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """{part: {leaf name as its table has it: leaf}}."""
  return {
    part: {
      n.removeprefix(prefix): x
      for n, x in leaves.items()
      if n.split('/')[1] == part and not is_training_only(n)
    }
    for part, prefix in _OURS.items()
  }


def fit(source: WeightFile, tokenizer: Tokenizer) -> dict[str, Pretrained]:
  """{part: its arrays, matched with the tokenizer's leaves}.

  Of the values it reads only those that are computed here, to compare them.

  Raises:
    UserError: a part that does not fit, with both sides of each difference, or
      a tokenizer without a counterpart.
  """
  _check_latents(tokenizer)
  if not isinstance(tokenizer.encoder_spec, EncoderSpec):
    raise UserError(NO_COUNTERPART)
  parts, p = split(source), tokenizer.patch_size
  image = jax.ShapeDtypeStruct((1, p, p, 3), np.float32)
  shapes = jax.eval_shape(tokenizer.init, jax.random.key(0), image)
  targets = _by_part(trees.flatten(shapes))
  keys = {key: array.shape for key, array in parts['encoder'].items()}
  found = encoders.key_format(keys, source.name)
  table = found.table(tokenizer.encoder_spec, keys)
  return {
    'encoder': Pretrained(
      parts['encoder'],
      dataclasses.replace(table, prefixes=_PREFIXES),
      targets['encoder'],
      f'it has the names of {found.name}: set model.encoder to the one that '
      'the model was trained with (output_norm="plain" if it has no last norm)',
    ),
    'quantizer': Pretrained(
      parts['quantizer'],
      quantizer_table(tokenizer.quantizer),
      targets['quantizer'],
      'set model.quantizer',
    ),
    'decoder': rae.fit_decoder(
      parts['decoder'], tokenizer.decoder_spec, tokenizer.latent_dim
    ),
  }


def _check_latents(tokenizer: Tokenizer) -> None:
  if getattr(tokenizer.encoder_spec, 'output_norm', '') == 'none':
    raise UserError(
      'model.encoder.output_norm="none": the PyTorch project normalizes '
      'latents, and its indices are others; only "plain" and "affine" are '
      'converted'
    )
  if tokenizer.latents_spec.norm != 'none':
    raise UserError(
      f'model.latents.norm="{tokenizer.latents_spec.norm}": the PyTorch '
      'project normalizes latents after quantizing them, with a file beside '
      'the weights; only norm="none" is converted'
    )


def load(fits: Mapping[str, Pretrained]) -> dict[str, np.ndarray]:
  """{"params/…" or "codebook/…": array} of all parts."""
  return {
    _OURS[part] + name: leaf
    for part, fitted in fits.items()
    for name, leaf in fitted.load().items()
  }


def check_counterpart(tokenizer: Tokenizer) -> None:
  """Checks that the project computes the same indices and images.

  Raises:
    UserError: the tokenizer has a part or value that the project lacks.
  """
  _check_latents(tokenizer)
  encoder_family(tokenizer.encoder_spec)
  spec, q = tokenizer.encoder_spec, tokenizer.quantizer
  quantizer_table(q)
  if isinstance(q, quantizers.FSQ) and q.bound == 'tanh':
    raise UserError(
      'quantizer.bound="tanh": the FSQ of the PyTorch project clips and would '
      'give other indices; train with bound="clip" and odd levels to convert'
    )
  resized = spec.patch_size != tokenizer.patch_size
  if resized and spec.resize != TORCH_BICUBIC:
    raise UserError(
      f'encoder.resize="{spec.resize}": the PyTorch project resizes images '
      'differently, which gives other indices; train with '
      f'encoder.resize="{TORCH_BICUBIC}" to convert'
    )
  if tokenizer.features_spec is not None:
    raise UserError('model.feature_decoder: the PyTorch project has none')
  if tokenizer.decoder_spec.pixel_norm != spec.pixel_norm:
    raise UserError(
      'decoder.pixel_norm: in the PyTorch project it is that of the encoder'
    )


def to_torch(tokenizer: Tokenizer, variables: Any) -> dict[str, np.ndarray]:
  """{key: array}: a state dict of the PyTorch project's full model.

  It lacks SigLIP's pooling head, which the project builds and does not use
  (`load_state_dict(…, strict=False)`).

  Raises:
    UserError: the project has no counterpart of the tokenizer.
  """
  check_counterpart(tokenizer)
  leaves = {n: np.asarray(x) for n, x in trees.flatten(variables).items()}
  if f'{_C}basis' in leaves or f'{_P}codes' in leaves:
    leaves.pop(f'{_C}codes', None)  # computed from these
  parts, q = _by_part(leaves), tokenizer.quantizer
  encoder = export_encoder(parts['encoder'], tokenizer.encoder_spec)
  decoder = rae.export_rae_decoder(parts['decoder'], tokenizer.decoder_spec)
  arrays = export(quantizer_table(q), parts['quantizer'])
  return {
    **encoder,
    **{f'decoder.{k}': x for k, x in decoder.items()},
    **arrays,
    **initial_state(q, arrays),
  }
