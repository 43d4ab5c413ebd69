"""The table of encoders: exact sizes, and every family's numbers at work."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import make_encoder_params as golden
from vqrae_jax.encoders import ENCODERS
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.ops import trees

# A row of each kind of arithmetic.
KINDS = (
  'siglip-large-patch16-384',
  'siglip-so400m-patch14-384',
  'siglip2-base-patch32-256',
  'siglip2-so400m-patch16-naflex',
  'dinov2-base',
  'dinov2-with-registers-giant',
  'vit-mae-huge',
  'internvit-300m-448px',
  'internvit-6b-448px-v2_5',
)


def test_counts_are_the_golden_ones():
  """A name without a count fails too: each row is written down once."""
  assert golden.counts() == json.loads(golden.PATH.read_text())


def _siglip(name, spec):
  from transformers import SiglipVisionConfig, SiglipVisionModel

  vit = spec.vit
  config = SiglipVisionConfig(
    hidden_size=vit.width,
    intermediate_size=vit.mlp_dim,
    num_hidden_layers=vit.depth,
    num_attention_heads=vit.num_heads,
    patch_size=vit.patch_size,
    image_size=int(name.rsplit('-', 1)[1]),
    vision_use_head=False,
  )
  assert config.layer_norm_eps == vit.norm_eps
  assert config.hidden_act == 'gelu_pytorch_tanh'
  return SiglipVisionModel(config), ()


def _dinov2(name, spec):
  import transformers as t

  vit = spec.vit
  kind = 'Dinov2WithRegisters' if vit.num_registers else 'Dinov2'
  more = {'num_register_tokens': 4} if vit.num_registers else {}
  config = getattr(t, f'{kind}Config')(
    hidden_size=vit.width,
    num_hidden_layers=vit.depth,
    num_attention_heads=vit.num_heads,
    patch_size=14,
    image_size=518,
    use_swiglu_ffn=name.endswith('giant'),
    **more,
  )
  assert config.layer_norm_eps == vit.norm_eps
  assert config.layerscale_value == vit.layer_scale
  assert config.hidden_act == 'gelu'
  return getattr(t, f'{kind}Model')(config), ('embeddings.mask_token',)


def _mae(name, spec):
  from transformers import ViTMAEConfig, ViTMAEModel

  vit = spec.vit
  config = ViTMAEConfig(
    hidden_size=vit.width,
    intermediate_size=vit.mlp_dim,
    num_hidden_layers=vit.depth,
    num_attention_heads=vit.num_heads,
    patch_size=vit.patch_size,
  )
  assert config.layer_norm_eps == vit.norm_eps
  assert config.hidden_act == 'gelu'
  return ViTMAEModel(config), ()


def _internvit(name, spec):
  from transformers import InternVLVisionConfig, InternVLVisionModel

  vit = spec.vit
  config = InternVLVisionConfig(
    hidden_size=vit.width,
    intermediate_size=vit.mlp_dim,
    num_hidden_layers=vit.depth,
    num_attention_heads=vit.num_heads,
    attention_bias=vit.qkv_bias,
    use_qk_norm=vit.qk_norm,
    norm_type={'layer': 'layer_norm', 'rms': 'rms_norm'}[vit.norm],
    image_size=(448, 448),
  )
  assert config.layer_norm_eps == vit.norm_eps
  assert config.hidden_act == 'gelu'
  return InternVLVisionModel(config), ()


BUILDERS = {
  'siglip': _siglip,
  'siglip2': _siglip,
  'dinov2': _dinov2,
  'vit': _mae,
  'internvit': _internvit,
}


@pytest.mark.parametrize('name', [n for n in KINDS if 'naflex' not in n])
def test_counts_are_those_of_the_pytorch_modules(name):
  """Built on torch's meta device: shapes, no memory."""
  torch = pytest.importorskip('torch')
  pytest.importorskip('transformers')
  spec = golden.encoder(name).spec
  with torch.device('meta'):
    module, unused = BUILDERS[name.split('-')[0]](name, spec)
  sizes = {n: p.numel() for n, p in module.named_parameters()}
  assert set(unused) <= set(sizes)
  want = sum(n for key, n in sizes.items() if key not in unused)
  assert golden.count(name) == want


def shrunk(name):
  """The row's arithmetic at a size a test can run."""
  vit = golden.encoder(name).spec.vit
  return golden.encoder(
    name,
    vit=dict(
      width=32, depth=2, num_heads=4, mlp_dim=48, patch_size=4, grid=(4, 4)
    ),
  ), vit


@pytest.mark.parametrize('name', KINDS)
def test_each_kind_runs_at_its_native_and_at_another_size(name):
  model, full = shrunk(name)
  small = model.spec.vit
  assert (
    dataclasses.replace(
      small,
      **{
        k: getattr(full, k) for k in ('width', 'depth', 'num_heads', 'mlp_dim')
      },
      patch_size=full.patch_size,
      grid=full.grid,
    )
    == full
  )
  rng = np.random.default_rng(0)
  native = rng.random((2, 16, 16, 3), np.float32)
  wide = rng.random((2, 11, 30, 3), np.float32)  # the remainders are cropped
  variables = model.init(jax.random.key(0), native)
  apply = jax.jit(model.apply)
  for images, grid in ((native, (4, 4)), (wide, (2, 7))):
    out = apply(variables, images)
    assert out.shape == (2, *grid, 32)
    assert np.isfinite(out).all() and np.std(out) > 0
  np.testing.assert_array_equal(
    apply(variables, wide), apply(variables, wide[:, :8, :28])
  )


def test_what_each_family_says_of_itself():
  def spec(name):
    return golden.encoder(name).spec

  registers = spec('dinov2-with-registers-base')
  assert registers.vit.grid == (37, 37)
  assert registers.vit.num_prefix_tokens == 5
  assert registers.posemb_antialias
  assert not spec('dinov2-base').posemb_antialias
  assert spec('dinov2-giant').vit.act == 'swiglu'
  assert spec('vit-mae-base').vit.norm_eps == 1e-12
  assert spec('siglip-so400m-patch14-384').vit.grid == (27, 27)
  assert spec('siglip2-base-patch16-256').resize == 'bilinear'
  six = spec('internvit-6b-448px-v2_5')
  assert six.vit.depth == 45 and six.vit.norm == 'rms' and not six.final_norm
  assert spec('internvit-6b-224px').vit.depth == 48
  for name in ENCODERS:
    imagenet = not name.startswith('siglip')
    assert (spec(name).pixel_norm.mean[0] == 0.485) == imagenet


@pytest.mark.parametrize('output_norm', ('affine', 'plain', 'none'))
def test_a_family_without_a_final_norm(output_norm):
  """InternViT publishes none: "affine" is the identity, "plain" LayerNorm."""
  model, _ = shrunk('internvit-6b-448px-v2_5')
  assert not model.spec.final_norm
  images = np.random.default_rng(0).random((1, 16, 16, 3), np.float32)
  variables = model.init(jax.random.key(0), images)
  assert 'norm' not in variables['params']
  other = Encoder(dataclasses.replace(model.spec, output_norm=output_norm))
  found = other.apply(variables, images)
  if output_norm == 'plain':
    np.testing.assert_allclose(found.mean(-1), 0, atol=1e-5)
  else:
    np.testing.assert_array_equal(found, model.apply(variables, images))


def test_registers_come_after_the_cls_token_and_have_no_position():
  model, _ = shrunk('dinov2-with-registers-base')
  images = jnp.zeros((1, 16, 16, 3))
  variables = model.init(jax.random.key(0), images)
  embed = trees.flatten(variables['params'])
  assert embed['embed/prefix'].shape == (1, 32)
  assert embed['embed/prefix_positions'].shape == (1, 32)
  assert embed['embed/registers'].shape == (4, 32)
  assert math.prod(embed['embed/positions'].shape) == 4 * 4 * 32
