"""Every family and key format against transformers, at a tiny size.

The native grid, and one that shrinks it in one direction and widens it in the
other. Other key formats give the same leaves, which needs no second reference.
"""

import json

import jax
import numpy as np
import pytest

import vqrae_jax
from tests.encoders import references
from tests.encoders.conftest import model
from vqrae_jax.ops import trees

torch = pytest.importorskip('torch')
safetensors_torch = pytest.importorskip('safetensors.torch')
save_file = safetensors_torch.save_file

NATIVE, WIDE = (24, 24), (16, 32)


def check_parity(kind, encoder, variables, output_norm='affine', shape=NATIVE):
  x = np.random.default_rng(0).random((2, *shape, 3), np.float32)
  want = references.latents(kind, model(kind), x, 4, output_norm)
  with jax.default_matmul_precision('highest'):
    have = np.asarray(jax.jit(encoder.apply)(variables, x))
  assert have.shape == want.shape
  error = references.error(have, want)
  assert error <= 1e-5, f'{kind} at {shape}, "{output_norm}": {error:.2e}'


def check_equal(one, other):
  """Two (encoder, variables) have the same leaves, bit for bit."""
  have, want = trees.flatten(one[1]), trees.flatten(other[1])
  assert have.keys() == want.keys()
  for name, leaf in have.items():
    assert leaf.dtype == want[name].dtype
    assert leaf.sharding == want[name].sharding, name
    assert np.asarray(leaf).tobytes() == np.asarray(want[name]).tobytes(), name


@pytest.mark.parametrize('kind', references.KINDS)
def test_parity(kind, saved):
  encoder, variables = vqrae_jax.load_encoder(str(saved(kind)))
  for shape in (NATIVE, WIDE):
    check_parity(kind, encoder, variables, shape=shape)


@pytest.mark.parametrize('output_norm', ('plain', 'none'))
@pytest.mark.parametrize('kind', ('siglip', 'mae', 'internvit-6b'))
def test_other_output_norms(kind, output_norm, saved):
  loaded = vqrae_jax.load_encoder(str(saved(kind)), output_norm)
  check_parity(kind, *loaded, output_norm)


@pytest.mark.parametrize('kind', ('internvit-300m', 'internvit-6b'))
def test_internvit_under_its_authors_names(kind, saved, tmp_path):
  theirs = model(kind).config
  config = dict(
    model_type='intern_vit_6b',
    hidden_size=theirs.hidden_size,
    num_hidden_layers=theirs.num_hidden_layers,
    num_attention_heads=theirs.num_attention_heads,
    intermediate_size=theirs.intermediate_size,
    norm_type=theirs.norm_type,
    qkv_bias=theirs.attention_bias,
    qk_normalization=theirs.use_qk_norm,
    image_size=24,
    patch_size=4,
  )
  state = references.original_names(model(kind))
  around = {f'vision_model.{k}': v for k, v in state.items()}
  around |= {'language_model.a': torch.ones(2), 'mlp1.0.weight': torch.ones(2)}
  chat = dict(model_type='internvl_chat', vision_config=config)
  want = vqrae_jax.load_encoder(str(saved(kind)))
  for arrays, described in ((state, config), (around, chat)):
    (tmp_path / 'config.json').write_text(json.dumps(described))
    save_file(arrays, tmp_path / 'model.safetensors')
    have = vqrae_jax.load_encoder(str(tmp_path))
    assert have[0].spec == want[0].spec
    check_equal(have, want)


@pytest.mark.parametrize('output_norm', ('affine', 'none'))
@pytest.mark.parametrize('stacked', (False, True))
def test_big_vision(stacked, output_norm, tiny_row, saved, tmp_path):
  path = tmp_path / 'siglip.npz'
  np.savez(path, **references.big_vision(model('siglip'), stacked))
  have = vqrae_jax.load_encoder(str(path), output_norm, row='tiny')
  check_equal(have, vqrae_jax.load_encoder(str(saved('siglip')), output_norm))


@pytest.mark.parametrize(
  'prefix', ('vision_model.', 'module.vision_tower.vision_model.')
)
def test_a_file_with_prefixes(prefix, tiny_row, saved, tmp_path):
  state = {f'{prefix}{k}': v for k, v in model('siglip').state_dict().items()}
  state['text_model.head.weight'] = torch.ones(2)
  state['logit_scale'] = torch.ones(1)
  torch.save(state, tmp_path / 'siglip.pt')
  have = vqrae_jax.load_encoder(str(tmp_path / 'siglip.pt'), row='tiny')
  check_equal(have, vqrae_jax.load_encoder(str(saved('siglip'))))


def test_mae_with_its_pretraining_decoder(saved, tmp_path):
  import transformers

  full = transformers.ViTMAEForPreTraining(model('mae').config)
  full.vit.load_state_dict(model('mae').state_dict())
  full.save_pretrained(tmp_path)
  have = vqrae_jax.load_encoder(str(tmp_path))
  check_equal(have, vqrae_jax.load_encoder(str(saved('mae'))))


def test_siglip_with_its_text_tower(saved, tmp_path):
  import transformers

  text = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=50,
    max_position_embeddings=8,
  )
  vision = model('siglip').config.to_dict()
  config = transformers.SiglipConfig(text_config=text, vision_config=vision)
  full = transformers.SiglipModel(config)
  full.vision_model.load_state_dict(model('siglip').state_dict())
  full.save_pretrained(tmp_path)
  pixels = dict(resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
  (tmp_path / 'preprocessor_config.json').write_text(json.dumps(pixels))
  have = vqrae_jax.load_encoder(str(tmp_path))
  assert have[0].spec.resize == 'bilinear'
  check_equal(have, vqrae_jax.load_encoder(str(saved('siglip'))))


def test_the_tests_can_fail(saved):
  """With SwiGLU's halves exchanged: the first is the gate."""
  kind = 'dinov2-swiglu'
  encoder, variables = vqrae_jax.load_encoder(str(saved(kind)))
  mlp = variables['params']['transformer']['blocks']['mlp']
  mlp['fc1'], mlp['gate'] = mlp['gate'], mlp['fc1']
  with pytest.raises(AssertionError, match=kind):
    check_parity(kind, encoder, variables)
