"""The frozen networks of losses and metrics: published files to arrays.

  weights = {'lpips': networks.load('lpips')}          the published networks
  weights = {'lpips': networks.random('lpips', key)}   random weights

A term's arrays are {"net": the parameters of VGG16, ConvNeXt or Inception}; for
LPIPS also {"heads": {"tap1": f32[64], …}}. Files have the keys of torchvision,
of LPIPS's own file (version 0.1) and of pytorch-fid. If the package `lpips` is
installed, its copy of LPIPS's file is read, without importing the package.
"""

import functools
import importlib.util
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vqrae_jax.encoders import naming
from vqrae_jax.errors import UserError, choose
from vqrae_jax.files import digest
from vqrae_jax.nn import inception, vgg
from vqrae_jax.nn.convnext import ConvNeXt
from vqrae_jax.nn.dino import Backbone
from vqrae_jax.ops import trees
from vqrae_jax.types import Tree
from vqrae_jax.weights import hub
from vqrae_jax.weights.files import open_weights
from vqrae_jax.weights.load import Pretrained
from vqrae_jax.weights.rules import Ignore, Rule, Table

# ----------------------------------------------------------------------------
# DINO ViT-S/8 (arXiv 2104.14294) as the discriminator's backbone.
#
# Keys are timm's. The final norm is not used: features are taken before it.
# The biases of attention keys are set to zero, as in RAE's discriminator;
# softmax is invariant to them.

_LAYER = 'blocks.{i}.'
TABLE = Table(
  (
    *naming.convolution('patch_embed.proj'),
    Rule('cls_token', 'embed/prefix', 'batched'),
    naming.positions('pos_embed'),
    *naming.blocks(_LAYER, naming.fc_layers() | {'attn.proj': 'attention/out'}),
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
    Ignore(r'norm\..*', 'the final norm: features are taken before it'),
    Ignore(r'head\..*', 'the head that DINO trained with'),
  ),
  ('module.', '_orig_mod.', 'backbone.'),
)


def load_backbone(
  backbone: Backbone, path: str | pathlib.Path | None = None
) -> Tree:
  """The collection "backbone" from a published file.

  Args:
    backbone: `DinoDiscriminator.backbone`, whose spec must fit the file.
    path: of the file; None for the one that `fetch_weights` downloads.

  Returns:
    Nested f32 NumPy arrays.

  Raises:
    UserError: the file is missing or damaged, or does not fit.
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

# Random heads have values in [0, _HEAD); published ones have a mean of .1.
_HEAD = 0.2
_GROUPS = range(1, len(vgg.CONVOLUTIONS) + 1)


def _vgg_rows() -> list[Rule]:
  """Rows of torchvision's `features`: convolutions, relus and poolings."""
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
  """Rows of torchvision's `features`: downsampling and blocks, alternating."""
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
  """Rows of each convolution, which has no bias, and of its batch norm."""
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
    Ignore(r'classifier\..*', 'the classifier: LPIPS reads convolutions'),
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
    Ignore(r'.*\.num_batches_tracked', 'a count of training batches'),
    Ignore(r'fc\..*', 'the classifier: features come before it'),
  )
)

# {loss or metric: {part: (row of `hub.FILES`, weight table)}}.
PARTS = {
  'lpips': {
    'net': ('vgg16', VGG16_TABLE),
    'heads': ('lpips-vgg', HEADS_TABLE),
  },
  'convnext': {'net': ('convnext-small', CONVNEXT_TABLE)},
  'rfid': {'net': ('inception', INCEPTION_TABLE)},
}
# {loss, metric or discriminator: rows of `hub.FILES`}.
NEEDS = {
  **{t: tuple(row for row, _ in parts.values()) for t, parts in PARTS.items()},
  'dino': ('dino-s8',),
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
  """A term's arrays, f32, drawn from `key`.

  Random features still distinguish images, but less well; report that a run
  used them.

  Args:
    term: "lpips", "convnext" or "rfid".
    key: a JAX key.
    **sizes: sizes other than the published network's: `widths` of LPIPS's
      VGG16; `depths`, `widths` and `classes` of ConvNeXt.

  Raises:
    UserError: an unknown term.
  """
  return choose(_RANDOM, term, 'loss or metric with a network')(key, **sizes)


def files_of(
  terms: Iterable[str], files: Mapping[str, str | pathlib.Path] | None = None
) -> dict[str, dict[str, pathlib.Path]]:
  """{term: {row of `weights.hub.FILES`: the file that `load` reads}}; terms
  and files as there.

  Raises:
    UserError: an unknown term, or a file that is damaged, or any that are
      missing, with the command that downloads them.
  """
  found = {}
  for term in terms:
    parts = choose(PARTS, term, 'loss or metric with a network')
    found[term] = {name: (files or {}).get(name) for name, _ in parts.values()}
    if term == 'lpips' and found[term]['lpips-vgg'] is None:
      found[term]['lpips-vgg'] = installed_heads()
  hub.need(*(n for rows in found.values() for n, p in rows.items() if not p))
  return {
    term: {n: pathlib.Path(p or hub.locate(n)) for n, p in rows.items()}
    for term, rows in found.items()
  }


def load(
  term: str,
  files: Mapping[str, str | pathlib.Path] | None = None,
  **sizes: Any,
) -> Tree:
  """A term's arrays, f32 NumPy, from the published files.

  Args:
    term: "lpips", "convnext" or "rfid".
    files: {row of `weights.hub.FILES`: a file to read in its place}.
    **sizes: as in `random`, for files of other sizes.

  Raises:
    UserError: an unknown term, or a file that is missing (with the command that
      downloads it), damaged, or of another network.
  """
  found = files_of([term], files)[term]
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
  """The heads in an installed `lpips`, if their hash is the published one."""
  try:
    spec = importlib.util.find_spec('lpips')
  except ValueError:  # a module of this name without a spec
    return None
  for folder in (spec and spec.submodule_search_locations) or ():
    path = pathlib.Path(folder) / 'weights' / 'v0.1' / 'vgg.pth'
    want = hub.FILES['lpips-vgg'].sha256
    if path.is_file() and digest(path) == want:
      return path
  return None
