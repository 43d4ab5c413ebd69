"""The frozen networks of losses and figures: published files to arrays.

  weights = {'lpips': networks.load('lpips')}          the published networks
  weights = {'lpips': networks.random('lpips', key)}   random ones, as such

A term's arrays are {"net": VGG16's, ConvNeXt's or Inception's parameters}, and
for LPIPS {"heads": {"tap1": f32[64], …}} beside them. Names are torchvision's,
those of LPIPS's own file (version 0.1), which the package `lpips` carries (its
copy is taken where it is installed, without importing it), and pytorch-fid's.
"""

import functools
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vqrae_jax.encoders import naming
from vqrae_jax.errors import UserError, choose
from vqrae_jax.nn import inception, vgg
from vqrae_jax.nn.convnext import ConvNeXt
from vqrae_jax.nn.dino import Backbone
from vqrae_jax.ops import trees
from vqrae_jax.types import Tree
from vqrae_jax.weights import hub
from vqrae_jax.weights.files import open_weights
from vqrae_jax.weights.load import Pretrained
from vqrae_jax.weights.rules import Rule, Table, ignore

# ----------------------------------------------------------------------------
# DINO ViT-S/8 (arXiv 2104.14294) as the discriminator's backbone.
#
# The names are timm's. Its final norm is not used: features are taken before
# it. The biases of keys are zero here, as RAE's discriminator has them; softmax
# does not see them.

_LAYER = 'blocks.{i}.'
TABLE = Table(
  (
    *naming.convolution('patch_embed.proj'),
    Rule('cls_token', 'embed/prefix', 'batched'),
    naming.positions('pos_embed'),
    *naming.blocks(
      _LAYER, naming.fc_layers('mlp.') | {'attn.proj': 'attention/out'}
    ),
    Rule(
      f'{_LAYER}attn.qkv.weight',
      tuple(f'{name}/kernel' for name in naming.QKV),
      'linear',
    ),
    Rule(
      f'{_LAYER}attn.qkv.bias',
      tuple(f'{name}/bias' for name in naming.QKV),
      ('same', 'zeros', 'same'),
    ),
    ignore(r'norm\..*', 'the final norm: features are taken before it'),
    ignore(r'head\..*', 'the head that DINO trained with'),
  ),
  ('module.', '_orig_mod.', 'backbone.'),
)


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
  side = backbone.spec.patch_size
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  shapes = jax.eval_shape(backbone.init, jax.random.key(0), image)
  fitted = Pretrained(
    open_weights(path or hub.locate('dino-s8')),
    TABLE,
    shapes['params'],
    hint='give the ViT-S/8 that DINO published, its backbone alone',
  )
  return trees.unflatten(fitted.load())


# ----------------------------------------------------------------------------
# LPIPS, ConvNeXt and Inception.

# A random head's values lie in [0, this); the published ones' means are .1.
_HEAD = 0.2
_GROUPS = range(1, len(vgg.CONVOLUTIONS) + 1)


def _vgg_rows() -> list[Rule]:
  """torchvision's list of layers: a convolution, a relu, …, a pooling."""
  rows, layer = [], 0
  for group, count in enumerate(vgg.CONVOLUTIONS, 1):
    for n in range(1, count + 1):
      rows += naming.dense(
        f'features.{layer}', f'conv{group}_{n}', transform='conv'
      )
      layer += 2
    layer += 1
  return rows


def _convnext_rows() -> list[Rule]:
  """torchvision's layers: what halves the resolution, blocks, and so on."""
  rows = naming.dense('features.0.0', 'embed', transform='conv')
  rows += naming.norm('features.0.1', 'norm1')
  for level in range(1, 5):
    if level > 1:
      down = f'features.{2 * level - 2}'
      rows += naming.norm(f'{down}.0', f'norm{level}')
      rows += naming.dense(f'{down}.1', f'down{level}', transform='conv')
    block, ours = f'features.{2 * level - 1}.{{i}}', f'blocks{level}'
    rows += naming.dense(
      f'{block}.block.0', f'{ours}/depthwise', transform='conv'
    )
    rows += naming.norm(f'{block}.block.2', f'{ours}/norm')
    rows += naming.dense(f'{block}.block.3', f'{ours}/fc1')
    rows += naming.dense(f'{block}.block.5', f'{ours}/fc2')
    rows.append(Rule(f'{block}.layer_scale', f'{ours}/scale', 'channels'))
  rows += naming.norm('classifier.0', 'norm')
  return rows + naming.dense('classifier.2', 'head')


def _inception_rows() -> list[Rule]:
  """A convolution without bias and its batch norm, in the names published."""
  rows = []
  for ours in inception.convolutions():
    theirs = ours.replace('/', '.')
    rows.append(Rule(f'{theirs}.conv.weight', f'{ours}/conv/kernel', 'conv'))
    rows += naming.norm(f'{theirs}.bn', ours)
    rows += [
      Rule(f'{theirs}.bn.running_{name}', f'{ours}/{name}')
      for name in ('mean', 'var')
    ]
  return rows


VGG16_TABLE = Table(
  (
    *_vgg_rows(),
    ignore(r'classifier\..*', 'the classifier: LPIPS reads convolutions'),
  )
)
HEADS_TABLE = Table(
  tuple(
    Rule(f'lin{n - 1}.model.1.weight', f'tap{n}', 'batched channels')
    for n in _GROUPS
  )
)
CONVNEXT_TABLE = Table(tuple(_convnext_rows()))
INCEPTION_TABLE = Table(
  (
    *_inception_rows(),
    ignore(r'.*\.num_batches_tracked', 'how long its statistics were taken'),
    ignore(r'fc\..*', 'the classifier: features come before it'),
  )
)

# A loss or a figure: its parts, each a row of `hub.FILES` and how it is read.
PARTS = {
  'lpips': {
    'net': ('vgg16', VGG16_TABLE),
    'heads': ('lpips-vgg', HEADS_TABLE),
  },
  'convnext': {'net': ('convnext-small', CONVNEXT_TABLE)},
  'rfid': {'net': ('inception', INCEPTION_TABLE)},
}


def _random_lpips(key: Any, widths: tuple[int, ...] = vgg.WIDTHS) -> Tree:
  key, net_key = jax.random.split(key)
  image = jnp.zeros((1, vgg.MIN_SIDE, vgg.MIN_SIDE, 3))
  net = vgg.VGG16(widths).init(net_key, image)['params']
  heads = {
    f'tap{n}': jax.random.uniform(
      jax.random.fold_in(key, n), (width,), maxval=_HEAD
    )
    for n, width in enumerate(widths, 1)
  }
  return {'net': net, 'heads': heads}


def _random_convnext(key: Any, **sizes: Any) -> Tree:
  image = jnp.zeros((1, 32, 32, 3))
  return {'net': ConvNeXt(**sizes).init(key, image)['params']}


def _random_inception(key: Any) -> Tree:
  image = jnp.zeros((1, 32, 32, 3))
  return {'net': inception.InceptionV3().init(key, image)['params']}


_RANDOM = {
  'lpips': _random_lpips,
  'convnext': _random_convnext,
  'rfid': _random_inception,
}


def random(term: str, key: Any, **sizes: Any) -> Tree:
  """A term's arrays, f32, drawn from `key`; pure.

  Random features still tell images apart, but worse; a run on them is to be
  named so.

  Args:
    term: "lpips", "convnext" or "rfid".
    key: a JAX key.
    **sizes: other sizes than the published network's: `widths` of LPIPS's
      VGG16; `depths`, `widths` and `classes` of ConvNeXt.
  """
  return choose(_RANDOM, term, 'loss or figure with a network')(key, **sizes)


def files_of(
  term: str, files: Mapping[str, str | pathlib.Path] | None = None
) -> dict[str, pathlib.Path]:
  """{row of `weights.hub.FILES`: the file that `load` reads}; as there.

  Raises:
    UserError: a file that is not here, with the command that brings it.
  """
  found = {}
  parts = choose(PARTS, term, 'loss or figure with a network')
  for part, (name, _) in parts.items():
    path = (files or {}).get(name)
    if path is None and part == 'heads':
      path = installed_heads()
    found[name] = pathlib.Path(path or hub.locate(name))
  return found


def load(
  term: str,
  files: Mapping[str, str | pathlib.Path] | None = None,
  **sizes: Any,
) -> Tree:
  """A term's arrays, f32 NumPy, out of the published files.

  Args:
    term: "lpips", "convnext" or "rfid".
    files: {row of `weights.hub.FILES`: a file to take in its place}.
    **sizes: as in `random`, for files of other sizes.

  Raises:
    UserError: a file that is not here (with the command that brings it),
      damaged, or of another network.
  """
  found = files_of(term, files)
  target = jax.eval_shape(
    functools.partial(random, term, **sizes), jax.random.key(0)
  )
  tree = {}
  for part, (name, table) in PARTS[term].items():
    path = found[name]
    hint = f'download the published one with: {hub.command(name)}'
    leaves = Pretrained(open_weights(path), table, target[part], hint).load()
    tree[part] = trees.unflatten(leaves)
    if part == 'heads' and any((w < 0).any() for w in leaves.values()):
      raise UserError(
        f'{path} has negative weights, which are invalid for LPIPS heads; use '
        'the published file'
      )
  return tree


def installed_heads() -> pathlib.Path | None:
  """The heads inside an installed `lpips`, if they are the published ones."""
  try:
    spec = importlib.util.find_spec('lpips')
  except ValueError:  # a module without a spec stands in its place
    return None
  for folder in (spec and spec.submodule_search_locations) or ():
    path = pathlib.Path(folder) / 'weights' / 'v0.1' / 'vgg.pth'
    want = hub.FILES['lpips-vgg'].sha256
    if path.is_file() and hub.digest(path) == want:
      return path
  return None
