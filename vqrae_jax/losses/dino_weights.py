"""DINO ViT-S/8's published weights (arXiv 2104.14294) as a backbone's leaves.

The file is `dino_deitsmall8_pretrain.pth`, whose names are timm's. Its final
norm is not used: taps are taken before it. The biases of keys are zero here,
as RAE's discriminator has them; softmax does not see them.
"""

import pathlib

import jax
import jax.numpy as jnp

from vqrae_jax import weights
from vqrae_jax.nn.dino import Backbone
from vqrae_jax.ops import trees
from vqrae_jax.types import Tree
from vqrae_jax.weights import Rule, published, skip

_LAYER = 'blocks.{i}.'
_BLOCKS = 'transformer/blocks/'
_QKV = ('query', 'key', 'value')


def _qkv() -> tuple[Rule, Rule]:
  homes = [f'{_BLOCKS}attention/{name}' for name in _QKV]
  theirs = f'{_LAYER}attn.qkv'
  return (
    Rule(
      f'{theirs}.weight', tuple(f'{h}/kernel[{{i}}]' for h in homes), 'linear'
    ),
    Rule(
      f'{theirs}.bias',
      tuple(f'{h}/bias[{{i}}]' for h in homes),
      ('same', 'zeros', 'same'),
    ),
  )


def _dense(theirs: str, ours: str) -> tuple[Rule, Rule]:
  return (
    Rule(
      f'{_LAYER}{theirs}.weight', f'{_BLOCKS}{ours}/kernel[{{i}}]', 'linear'
    ),
    Rule(f'{_LAYER}{theirs}.bias', f'{_BLOCKS}{ours}/bias[{{i}}]'),
  )


def _norm(name: str) -> tuple[Rule, Rule]:
  return (
    Rule(f'{_LAYER}{name}.weight', f'{_BLOCKS}{name}/scale[{{i}}]'),
    Rule(f'{_LAYER}{name}.bias', f'{_BLOCKS}{name}/bias[{{i}}]'),
  )


_ROWS = (
  Rule('patch_embed.proj.weight', 'embed/linear/kernel', 'conv_patch'),
  Rule('patch_embed.proj.bias', 'embed/linear/bias'),
  Rule('cls_token', 'embed/prefix', 'batched'),
  Rule(
    'pos_embed',
    ('embed/prefix_positions', 'embed/positions'),
    ('batched', 'batched grid'),
  ),
  *_norm('norm1'),
  *_qkv(),
  *_dense('attn.proj', 'attention/out'),
  *_norm('norm2'),
  *_dense('mlp.fc1', 'mlp/fc1'),
  *_dense('mlp.fc2', 'mlp/fc2'),
  skip(r'norm\..*', 'the final norm: taps are taken before it'),
  skip(r'head\..*', 'the head that DINO trained with'),
)
TABLE = weights.Table(_ROWS, ('module.', '_orig_mod.', 'backbone.'))


def _image(backbone: Backbone) -> jax.ShapeDtypeStruct:
  s = backbone.spec
  size = [n * s.patch_size for n in s.grid]
  return jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)


def random_backbone(key: jax.Array, backbone: Backbone) -> Tree:
  """A collection "backbone" at random, for tests and trials."""
  image = _image(backbone)
  init = jax.jit(lambda k: backbone.init(k, jnp.zeros(image.shape)))
  return init(key)['params']


def load_backbone(
  backbone: Backbone, path: str | pathlib.Path | None = None
) -> Tree:
  """The collection "backbone" out of a published file.

  Args:
    backbone: `DinoDiscriminator.backbone`, whose spec is the file's.
    path: of the file; None for the one that `fetch_weights` brings.

  Returns:
    Nested f32 NumPy arrays.

  Raises:
    UserError: no file, a damaged one, or one that does not fit.
  """
  path = published.locate('dino-s8') if path is None else path
  shapes = jax.eval_shape(backbone.init, jax.random.key(0), _image(backbone))
  fitted = weights.Pretrained(
    weights.open_weights(path),
    TABLE,
    shapes['params'],
    way_out='give the ViT-S/8 that DINO published, its backbone alone',
  )
  return trees.unflatten(fitted.load())
