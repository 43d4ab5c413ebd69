"""What encoder families share: rows of weight tables, fields of `config.json`.

A `KeyFormat` is one way of naming leaves: a signature that identifies its files
and a function from a spec to a weight table. A rule for a leaf that the spec
lacks has no effect, so a table lists every leaf that its family may have. The
readers of `config.json` share `vit_fields`. No file is opened here.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from vqrae_jax.errors import UserError, choose
from vqrae_jax.specs import IMAGENET_NORM, EncoderSpec
from vqrae_jax.weights.rules import Ignore, Rule, Table

BLOCKS = 'transformer/blocks/'
_FINAL_NORM = {
  'affine': '',
  'plain': 'the final norm\'s affine part: output_norm="plain" has none',
  'none': 'the final norm: output_norm="none" stops before it',
}
Shapes = Mapping[str, tuple[int, ...]]

# Spec fields that several families share.
SIZES = {
  'base': dict(width=768, depth=12, num_heads=12, mlp_dim=3072),
  'large': dict(width=1024, depth=24, num_heads=16, mlp_dim=4096),
}
QKV_NAMES = ('query', 'key', 'value')
QKV = tuple(f'{BLOCKS}attention/{name}' for name in QKV_NAMES)
NORMS = {'norm1': 'norm1', 'norm2': 'norm2'}
HF_NORMS = {'layernorm_before': 'norm1', 'layernorm_after': 'norm2'}
CLS_TOKEN = dict(num_prefix_tokens=1, prefix_has_posemb=True)
IMAGENET_PIXELS = dataclasses.asdict(IMAGENET_NORM)


@dataclasses.dataclass(frozen=True)
class KeyFormat:
  """One way of naming the leaves of a family.

  Attributes:
    name: the family's, for messages.
    signature: a regex that is found in a key of every such file, and in no key
      of the formats that are tried later (`encoders.KEY_FORMATS`).
    table: (spec, {the file's key: shape}) -> the weight table.
  """

  name: str
  signature: str
  table: Callable[[EncoderSpec, Shapes], Table]

  def matches(self, shapes: Shapes) -> bool:
    return any(re.search(self.signature, key) for key in shapes)


def dense(
  theirs: str, *ours: str, transform: str = 'linear', weight: str = 'kernel'
) -> list[Rule]:
  """Rules of a PyTorch layer, whose outputs are split among several `ours`."""
  return [
    Rule(f'{theirs}.weight', tuple(f'{n}/{weight}' for n in ours), transform),
    Rule(f'{theirs}.bias', tuple(f'{n}/bias' for n in ours)),
  ]


def norm(theirs: str, ours: str) -> list[Rule]:
  """Rules of a PyTorch LayerNorm, or of an RMSNorm, which has no bias."""
  return dense(theirs, ours, transform='same', weight='scale')


def blocks(
  layer: str, linears: Mapping[str, str], norms: Mapping[str, str] = NORMS
) -> list[Rule]:
  """Rules of each block's linear layers and norms, from {their name: ours}."""
  rows = []
  for theirs, ours in linears.items():
    rows += dense(layer + theirs, BLOCKS + ours)
  for theirs, ours in norms.items():
    rows += norm(layer + theirs, BLOCKS + ours)
  return rows


def fc_layers() -> dict[str, str]:
  """{their name: ours} of an MLP's layers that are called fc1 and fc2."""
  return {f'mlp.fc{n}': f'mlp/fc{n}' for n in '12'}


def qkv_layers(layers: str, out: str) -> dict[str, str]:
  """{their name: ours} of attention; {0} in `layers` is "query", {1} is "q"."""
  names = {layers.format(n, n[0]): f'attention/{n}' for n in QKV_NAMES}
  return names | {out: 'attention/out'}


# The attention of transformers' ViT: DINOv2 and ViT-MAE have it.
HF_ATTENTION = qkv_layers('attention.attention.{0}', 'attention.output.dense')

# The blocks of transformers' CLIP: SigLIP has them too.
HF_CLIP = qkv_layers('self_attn.{1}_proj', 'self_attn.out_proj')
HF_CLIP |= fc_layers()
HF_CLIP_NORMS = {f'layer_norm{n}': f'norm{n}' for n in '12'}


def hf_vit(layer: str) -> list[Rule]:
  """The blocks of transformers' ViT: ViT-MAE's, and those of RAE's decoders."""
  mlp = {'intermediate.dense': 'mlp/fc1', 'output.dense': 'mlp/fc2'}
  return blocks(layer, HF_ATTENTION | mlp, HF_NORMS)


def convolution(theirs: str) -> list[Rule]:
  """The convolution that embeds patches."""
  return dense(theirs, 'embed/linear', transform='conv_patch')


def positions(theirs: str) -> Rule:
  """One table of positions, the cls token's first."""
  return Rule(
    theirs,
    ('embed/prefix_positions', 'embed/positions'),
    ('batched', 'batched grid'),
  )


def hf_embeddings() -> list[Rule]:
  """Patches, cls token and positions of transformers' ViTs with a cls token."""
  return [
    *convolution('embeddings.patch_embeddings.projection'),
    Rule('embeddings.cls_token', 'embed/prefix', 'batched'),
    positions('embeddings.position_embeddings'),
  ]


def norm_unused(spec: EncoderSpec) -> str:
  """Why the final norm's leaves are not used; "" if they are."""
  used = 'affine' if 'affine' in spec.norms else spec.norms[0]
  return _FINAL_NORM[used]


def final_norm(spec: EncoderSpec, theirs: str) -> list:
  """Rules of the final norm, or a row that ignores it and says why."""
  if not spec.final_norm:
    return []
  why = norm_unused(spec)
  return [Ignore(rf'{theirs}\..*', why)] if why else norm(theirs, 'norm')


_TANH = dict.fromkeys(('gelu_pytorch_tanh', 'gelu_new'), 'gelu_tanh')
_ACTS = {'gelu': 'gelu', 'quick_gelu': 'quick_gelu', **_TANH}


def vit_fields(
  config: Mapping[str, Any], act: str = 'gelu', qkv_bias: str = 'qkv_bias'
) -> dict:
  """The `ViTSpec` fields whose keys all families share.

  Args:
    config: a published `config.json`, merged over its family's defaults.
    act: the family's default of "hidden_act".
    qkv_bias: the key of the biases of q, k and v, which may be absent.

  Raises:
    UserError: an activation that is not supported.
  """
  act = str(config.get('hidden_act', act))
  return dict(
    width=config['hidden_size'],
    depth=config['num_hidden_layers'],
    num_heads=config['num_attention_heads'],
    mlp_dim=config['intermediate_size'],
    norm_eps=config['layer_norm_eps'],
    act=choose(_ACTS, act, 'hidden_act'),
    qkv_bias=config.get(qkv_bias, True),
  )


def square_side(size: object) -> int:
  """The side in pixels of a square given by a number or a pair.

  Raises:
    UserError: not a square.
  """
  sides = {*size} if isinstance(size, list | tuple) else {size}
  if len(sides) != 1 or not all(isinstance(s, int) and s > 0 for s in sides):
    raise UserError(f'the size {size} in config.json is not a square in pixels')
  return sides.pop()


def patch_grid(config: Mapping[str, Any], image: int, patch: int) -> dict:
  """Patch size and native grid; `image` and `patch` are defaults, in pixels.

  Raises:
    UserError: a size that is not a square.
  """
  patch = square_side(config.get('patch_size', patch))
  n = square_side(config.get('image_size', image)) // patch
  return dict(patch_size=patch, grid=(n, n))
