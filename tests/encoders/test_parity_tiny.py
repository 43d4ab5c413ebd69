"""Every family and naming against transformers, at a size a test can run."""

import functools
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vqrae_jax
from tests.encoders import references

SIZES = dict(width=32, depth=2, heads=4, mlp=48, pixels=24, patch=4)
# Native, twice the size, 2:1.
SHAPES = ((24, 24), (48, 48), (16, 32))


@functools.cache
def model(kind):
  return references.make(kind, **SIZES)


@pytest.fixture(scope='module', params=references.KINDS)
def saved(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  model(request.param).save_pretrained(folder)
  return request.param, folder


def images(h, w, seed=0):
  return np.random.default_rng(seed).random((2, h, w, 3), np.float32)


def holds(kind, encoder, variables, output_norm='affine', shapes=SHAPES):
  apply = jax.jit(encoder.apply)
  for h, w in shapes:
    x = images(h, w)
    want = references.latents(kind, model(kind), x, 4, output_norm)
    with jax.default_matmul_precision('highest'):
      have = np.asarray(apply(variables, x))
    assert have.shape == want.shape
    off = references.error(have, want)
    assert off <= 1e-5, f'{kind} at {h}x{w}, "{output_norm}": {off:.2e}'


@pytest.mark.parametrize('output_norm', ('affine', 'plain', 'none'))
def test_parity(saved, output_norm):
  kind, folder = saved
  encoder, variables = vqrae_jax.load_encoder(str(folder), output_norm)
  shapes = SHAPES if output_norm == 'affine' else SHAPES[:1]
  holds(kind, encoder, variables, output_norm, shapes)


@pytest.mark.parametrize('kind', ('internvit-300m', 'internvit-6b'))
def test_internvit_under_its_authors_names(kind, tmp_path):
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
    hidden_act='gelu',
    layer_norm_eps=1e-6,
  )
  state = references.original_names(model(kind))
  (tmp_path / 'config.json').write_text(json.dumps(config))
  save_file(state, tmp_path / 'model.safetensors')
  holds(kind, *vqrae_jax.load_encoder(str(tmp_path)))

  # The whole chat model, its encoder under "vision_model.".
  whole = {f'vision_model.{k}': v for k, v in state.items()}
  whole |= {'language_model.a': torch.ones(2), 'mlp1.0.weight': torch.ones(2)}
  save_file(whole, tmp_path / 'model.safetensors')
  config = dict(model_type='internvl_chat', vision_config=config)
  (tmp_path / 'config.json').write_text(json.dumps(config))
  holds(kind, *vqrae_jax.load_encoder(str(tmp_path)), shapes=SHAPES[:1])


@pytest.mark.parametrize('output_norm', ('affine', 'none'))
@pytest.mark.parametrize('stacked', (False, True))
def test_big_vision(stacked, output_norm, tiny_row, tmp_path):
  path = tmp_path / 'siglip.npz'
  np.savez(path, **references.big_vision(model('siglip'), stacked))
  loaded = vqrae_jax.load_encoder(str(path), output_norm, row='tiny')
  holds('siglip', *loaded, output_norm, SHAPES[:2])


@pytest.mark.parametrize(
  'prefix', ('vision_model.', 'module.vision_tower.vision_model.')
)
def test_a_file_with_prefixes(prefix, tiny_row, tmp_path):
  state = {f'{prefix}{k}': v for k, v in model('siglip').state_dict().items()}
  state['text_model.head.weight'] = torch.ones(2)
  state['logit_scale'] = torch.ones(1)
  torch.save(state, tmp_path / 'siglip.pt')
  loaded = vqrae_jax.load_encoder(str(tmp_path / 'siglip.pt'), row='tiny')
  holds('siglip', *loaded, shapes=SHAPES[:1])


def test_mae_of_the_whole_pretraining(tmp_path):
  import transformers

  whole = transformers.ViTMAEForPreTraining(model('mae').config)
  whole.vit.load_state_dict(model('mae').state_dict())
  whole.save_pretrained(tmp_path)
  holds('mae', *vqrae_jax.load_encoder(str(tmp_path)), shapes=SHAPES[:1])


def test_siglip_with_its_text_tower(tmp_path):
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
  whole = transformers.SiglipModel(config)
  whole.vision_model.load_state_dict(model('siglip').state_dict())
  whole.save_pretrained(tmp_path)
  pixels = dict(resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
  (tmp_path / 'preprocessor_config.json').write_text(json.dumps(pixels))
  encoder, variables = vqrae_jax.load_encoder(str(tmp_path))
  assert encoder.spec.resize == 'bilinear'
  holds('siglip', encoder, variables, shapes=SHAPES[:1])


def test_the_tests_can_fail(tmp_path):
  """SwiGLU's halves exchanged are far off: the first is the gate."""
  kind = 'dinov2-swiglu'
  model(kind).save_pretrained(tmp_path)
  encoder, variables = vqrae_jax.load_encoder(str(tmp_path))
  mlp = variables['params']['transformer']['blocks']['mlp']
  mlp['fc1'], mlp['gate'] = mlp['gate'], mlp['fc1']
  with pytest.raises(AssertionError, match='dinov2-swiglu at 24x24'):
    holds(kind, encoder, variables)
