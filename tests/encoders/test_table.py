"""The table of encoders: exact sizes, and every family's numbers at work."""

import json

import jax
import numpy as np
import pytest

from tests.golden import make_encoder_params as golden
from tests.golden import make_encoders_doc

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


def test_any_size_of_image_runs_and_its_remainders_are_cropped():
  size = dict(width=32, depth=2, num_heads=4, mlp_dim=48, patch_size=4)
  size |= dict(grid=(4, 4))
  model = golden.encoder('dinov2-with-registers-giant', vit=size)
  images = np.random.default_rng(0).random((2, 11, 30, 3), np.float32)
  cropped = images[:, :8, :28]
  variables = jax.jit(model.init)(jax.random.key(0), cropped)
  out = jax.jit(model.apply)(variables, images)
  assert out.shape == (2, 2, 7, 32) and np.std(out) > 0
  want = jax.jit(model.apply)(variables, cropped)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
