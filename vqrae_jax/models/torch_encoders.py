"""Encoders as they lie inside a checkpoint of the PyTorch project.

TO BE REPLACED by the families' own tables when `encoders/` has them: this
file is the one place that knows them here, and `encoder_table` and `home` are
all that is asked of it. SigLIP (fixed sizes) and DINOv2 (gelu), with the names
that transformers gives them.
"""

from vqrae_jax.errors import UserError
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.weights import PREFIXES, Rule, Table, skip

# The wrappers around a family's own names, outermost first.
_PREFIXES = ('encoder.', 'model.', *PREFIXES)
_BLOCK = 'transformer/blocks/'
_SIGLIP = {
  'self_attn.q_proj': 'attention/query',
  'self_attn.k_proj': 'attention/key',
  'self_attn.v_proj': 'attention/value',
  'self_attn.out_proj': 'attention/out',
  'mlp.fc1': 'mlp/fc1',
  'mlp.fc2': 'mlp/fc2',
}
_DINOV2 = {
  'attention.attention.query': 'attention/query',
  'attention.attention.key': 'attention/key',
  'attention.attention.value': 'attention/value',
  'attention.output.dense': 'attention/out',
  'mlp.fc1': 'mlp/fc1',
  'mlp.fc2': 'mlp/fc2',
}


def _dense(theirs: str, ours: str, row: str = '') -> list:
  return [
    Rule(f'{theirs}.weight', f'{ours}/kernel{row}', 'linear'),
    Rule(f'{theirs}.bias', f'{ours}/bias{row}'),
  ]


def _norm(theirs: str, ours: str, row: str = '') -> list:
  return [
    Rule(f'{theirs}.weight', f'{ours}/scale{row}'),
    Rule(f'{theirs}.bias', f'{ours}/bias{row}'),
  ]


def _blocks(layer: str, dense: dict, norms: tuple[str, str]) -> list:
  rows, row = [], '[{i}]'
  for theirs, ours in dense.items():
    rows += _dense(layer + theirs, _BLOCK + ours, row)
  for i, name in enumerate(norms, 1):
    rows += _norm(layer + name, f'{_BLOCK}norm{i}', row)
  return rows


def _last_norm(name: str, spec: EncoderSpec) -> list:
  if spec.output_norm == 'affine':
    return _norm(name, 'norm')
  why = f'the last norm has no parameters (output_norm="{spec.output_norm}")'
  return [skip(rf'{name}\.(weight|bias)', why)]


def _siglip(spec: EncoderSpec) -> list:
  patch = 'embeddings.patch_embedding'
  return [
    Rule(f'{patch}.weight', 'embed/linear/kernel', 'conv_patch'),
    Rule(f'{patch}.bias', 'embed/linear/bias'),
    Rule('embeddings.position_embedding.weight', 'embed/positions', 'grid'),
    *_blocks('encoder.layers.{i}.', _SIGLIP, ('layer_norm1', 'layer_norm2')),
    *_last_norm('post_layernorm', spec),
    skip(r'head\..*', 'the pooling head: latents are taken before it'),
    skip(r'embeddings\.position_ids', 'a row of counting numbers'),
  ]


def _dinov2(spec: EncoderSpec) -> list:
  patch = 'embeddings.patch_embeddings.projection'
  layer = 'encoder.layer.{i}.'
  rows = [
    Rule(f'{patch}.weight', 'embed/linear/kernel', 'conv_patch'),
    Rule(f'{patch}.bias', 'embed/linear/bias'),
    Rule('embeddings.cls_token', 'embed/prefix', 'batched'),
    Rule('embeddings.register_tokens', 'embed/registers', 'batched'),
    Rule(
      'embeddings.position_embeddings',
      ('embed/prefix_positions', 'embed/positions'),
      ('batched', 'batched grid'),
    ),
    *_blocks(layer, _DINOV2, ('norm1', 'norm2')),
    *_last_norm('layernorm', spec),
    skip(r'embeddings\.mask_token', 'the mask token: no patch is masked'),
  ]
  for i in (1, 2):
    rows.append(
      Rule(f'{layer}layer_scale{i}.lambda1', f'{_BLOCK}scale{i}[{{i}}]')
    )
  return rows


def _family(spec: EncoderSpec) -> str:
  s = spec.vit
  if s.layer_scale is not None and s.num_prefix_tokens and s.act == 'gelu':
    return 'dinov2'
  plain = s.layer_scale is None and not s.num_prefix_tokens
  if plain and s.posemb == 'learned' and s.qkv_bias and not s.qk_norm:
    return 'siglip'
  raise UserError(
    'model.encoder is neither a SigLIP nor a DINOv2 (gelu): the PyTorch '
    "project's checkpoints of other encoders cannot be converted yet"
  )


def encoder_table(spec: EncoderSpec) -> Table:
  """The rows of the encoder's family, prefixes of the project allowed.

  Raises:
    UserError: a family that has no table here.
  """
  rows = {'siglip': _siglip, 'dinov2': _dinov2}[_family(spec)](spec)
  return Table(tuple(rows), _PREFIXES)


def home(spec: EncoderSpec) -> str:
  """What stands before a family's names in the project's whole model."""
  return {'siglip': 'encoder.model.', 'dinov2': 'encoder.encoder.'}[
    _family(spec)
  ]
