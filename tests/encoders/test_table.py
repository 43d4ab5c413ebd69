"""The table of encoders: exact sizes, and every family's numbers at work."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import make_encoder_params as golden
from tests.golden import make_encoders_doc
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.ops import trees

# A row of each kind of arithmetic, and its reference (`references.py`).
KINDS = {
  'siglip-large-patch16-384': 'siglip',
  'siglip-so400m-patch14-384': 'siglip',
  'siglip2-base-patch32-256': 'siglip',
  'siglip2-so400m-patch16-naflex': 'naflex',
  'dinov2-base': 'dinov2',
  'dinov2-with-registers-giant': 'dinov2-registers-swiglu',
  'vit-mae-huge': 'mae',
  'internvit-300m-448px': 'internvit-300m',
  'internvit-6b-448px-v2_5': 'internvit-6b',
}


def test_counts_are_the_golden_ones():
  """A row without a count fails too."""
  assert golden.counts() == json.loads(golden.PATH.read_text())


def test_docs_encoders_md_agrees_with_the_tables():
  renew = 'renew it: python -m tests.golden.make_encoders_doc'
  path = make_encoders_doc.PATH
  assert path.read_text(encoding='utf8') == make_encoders_doc.page(), renew


@pytest.mark.parametrize('name', [n for n in KINDS if 'naflex' not in n])
def test_counts_are_those_of_the_pytorch_modules(name):
  """Built on torch's meta device: shapes, no memory."""
  torch = pytest.importorskip('torch')
  pytest.importorskip('transformers')
  from tests.encoders import references

  spec = golden.encoder(name).spec
  vit = spec.vit
  with torch.device('meta'):
    model = references.build(
      KINDS[name],
      width=vit.width,
      depth=vit.depth,
      heads=vit.num_heads,
      mlp=vit.mlp_dim,
      patch=vit.patch_size,
      pixels=vit.grid[0] * vit.patch_size,
    )
  assert model.config.layer_norm_eps == vit.norm_eps
  act = dict(gelu_tanh='gelu_pytorch_tanh').get(vit.act, 'gelu')
  assert model.config.hidden_act == act
  if 'dinov2' in name:
    assert model.config.layerscale_value == vit.layer_scale
  unused = ('head.', 'embeddings.mask_token')
  sizes = {n: p.numel() for n, p in model.named_parameters()}
  want = sum(n for key, n in sizes.items() if not key.startswith(unused))
  assert golden.count(name) == want


def shrunk(name):
  """The row's arithmetic at a tiny size, over a 4 x 4 grid."""
  size = dict(width=32, depth=2, num_heads=4, mlp_dim=48, patch_size=4)
  return golden.encoder(name, vit=size | dict(grid=(4, 4)))


def test_any_size_of_image_runs_and_its_remainders_are_cropped():
  model = shrunk('dinov2-with-registers-giant')
  images = np.random.default_rng(0).random((2, 11, 30, 3), np.float32)
  cropped = images[:, :8, :28]
  variables = jax.jit(model.init)(jax.random.key(0), cropped)
  out = jax.jit(model.apply)(variables, images)
  assert out.shape == (2, 2, 7, 32) and np.std(out) > 0
  want = jax.jit(model.apply)(variables, cropped)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_a_family_without_a_final_norm():
  """InternViT publishes none: "affine" is the identity, "plain" LayerNorm."""
  spec = shrunk('internvit-6b-448px-v2_5').spec
  assert not spec.final_norm
  images = np.random.default_rng(0).random((1, 16, 16, 3), np.float32)
  variables = jax.jit(Encoder(spec).init)(jax.random.key(0), images)
  assert 'norm' not in variables['params']
  out = {}
  for norm in ('affine', 'plain', 'none'):
    encoder = Encoder(dataclasses.replace(spec, output_norm=norm))
    out[norm] = jax.jit(encoder.apply)(variables, images)
  np.testing.assert_array_equal(out['affine'], out['none'])
  np.testing.assert_allclose(out['plain'].mean(-1), 0, atol=1e-5)


def test_registers_come_after_the_cls_token_and_have_no_position():
  model = shrunk('dinov2-with-registers-base')
  images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  embed = trees.flatten(variables['params'])
  assert embed['embed/prefix'].shape == (1, 32)
  assert embed['embed/prefix_positions'].shape == (1, 32)
  assert embed['embed/registers'].shape == (4, 32)
  assert embed['embed/positions'].size == 4 * 4 * 32
