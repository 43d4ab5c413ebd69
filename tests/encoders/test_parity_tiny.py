"""Key formats and norms of encoders against transformers, at a tiny size.

Other key formats give the same leaves as the hub's, whose parity
`test_converted.py` has; leaves that are equal need no second reference.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

import vqrae_jax
from tests.encoders import references
from tests.encoders.references import model, saved
from vqrae_jax import convert
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import encoders

torch = pytest.importorskip('torch')
save_file = pytest.importorskip('safetensors.torch').save_file


def check_parity(kind, encoder, variables, output_norm='affine'):
  """Over a grid smaller than the native one in one direction, larger in the
  other; remainders are cropped at the bottom and right."""
  x = np.random.default_rng(0).random((2, 9, 26, 3), np.float32)
  whole = x[:, :8, :24]
  want = references.latents(kind, model(kind), whole, 4, output_norm)
  with jax.default_matmul_precision('highest'):
    have = np.asarray(jax.jit(encoder.apply)(variables, x))
  assert have.shape == want.shape
  assert references.error(have, want) <= 1e-5


def check_equal(one, other):
  """Two (encoder, variables) have the same leaves, bit for bit."""
  have, want = trees.flatten(one[1]), trees.flatten(other[1])
  assert have.keys() == want.keys()
  for name, leaf in have.items():
    assert leaf.dtype == want[name].dtype
    assert leaf.sharding == want[name].sharding, name
    assert np.asarray(leaf).tobytes() == np.asarray(want[name]).tobytes(), name


@pytest.mark.parametrize('output_norm', ('plain', 'none'))
@pytest.mark.parametrize(
  'kind', ('siglip', 'mae', 'internvit-6b', 'dinov3', 'clip')
)
def test_other_output_norms(kind, output_norm):
  loaded = vqrae_jax.load_encoder(str(saved(kind)), output_norm)
  check_parity(kind, *loaded, output_norm)


@pytest.mark.parametrize('kind', ('internvit-300m', 'internvit-6b'))
def test_internvit_under_its_authors_names(kind, tmp_path):
  theirs = model(kind).config
  config = dict(model_type='intern_vit_6b', image_size=16, patch_size=4)
  for name in ('hidden_size', 'num_hidden_layers', 'num_attention_heads',
               'intermediate_size', 'norm_type'):  # fmt: skip
    config[name] = getattr(theirs, name)
  config['qkv_bias'] = theirs.attention_bias
  config['qk_normalization'] = theirs.use_qk_norm
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
def test_big_vision(stacked, output_norm, tiny_row, tmp_path):
  path = tmp_path / 'siglip.npz'
  np.savez(path, **references.big_vision(model('siglip'), stacked))
  have = vqrae_jax.load_encoder(str(path), output_norm, row='tiny')
  want = vqrae_jax.load_encoder(str(saved('siglip')), output_norm)
  check_equal(have, want)


@pytest.mark.parametrize(
  'prefix', ('vision_model.', 'module.vision_tower.vision_model.')
)
def test_siglip_with_its_text_tower(prefix, tiny_row, copy):
  state = {f'{prefix}{k}': v for k, v in model('siglip').state_dict().items()}
  state['text_model.head.weight'] = torch.ones(2)
  state['logit_scale'] = torch.ones(1)
  want = vqrae_jax.load_encoder(str(saved('siglip')))
  torch.save(state, copy / 'siglip.pt')
  check_equal(vqrae_jax.load_encoder(str(copy / 'siglip.pt'), row='tiny'), want)
  save_file(state, copy / 'model.safetensors')
  config = json.loads((copy / 'config.json').read_text())
  config = dict(model_type='siglip', vision_config=config)
  (copy / 'config.json').write_text(json.dumps(config))
  pixels = dict(resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
  (copy / 'preprocessor_config.json').write_text(json.dumps(pixels))
  have = vqrae_jax.load_encoder(str(copy))
  assert have[0].spec.resize == 'bilinear'
  check_equal(have, want)
  # And with a classifier, and pixels as other processors describe them.
  state['classifier.weight'] = torch.ones(2)
  save_file(state, copy / 'model.safetensors')
  for pixels, mean, std in (
    (dict(image_mean=0.25, image_std=0.5, resample=None), 0.25, 0.5),
    (dict(do_normalize=False, rescale_factor=0.00392157), 0.0, 1.0),
  ):
    (copy / 'preprocessor_config.json').write_text(json.dumps(pixels))
    spec = vqrae_jax.load_encoder(str(copy))[0].spec
    assert spec.pixel_norm.mean == (mean,) * 3
    assert spec.pixel_norm.std == (std,) * 3
  for pixels in (dict(rescale_factor=1 / 127.5), dict(do_rescale=False)):
    (copy / 'preprocessor_config.json').write_text(json.dumps(pixels))
    with pytest.raises(UserError, match='preprocessor_config.*1/255'):
      vqrae_jax.load_encoder(str(copy))


def test_clip_with_its_text_tower(tmp_path):
  """As published: the prefix, both towers' heads, a list of position numbers;
  and a wrapper's prefix beside none of them."""
  alone = model('clip')
  state = {f'vision_model.{k}': v for k, v in alone.state_dict().items()}
  wrapped = {f'module.vision_tower.{k}': v for k, v in state.items()}
  state['vision_model.embeddings.position_ids'] = torch.arange(17)[None]
  for name in ('text_model.embeddings.position_embedding.weight',
               'visual_projection.weight', 'text_projection.weight',
               'logit_scale'):  # fmt: skip
    state[name] = torch.ones(2)
  described = alone.config.to_dict()
  around = dict(model_type='clip', vision_config=described)
  want = vqrae_jax.load_encoder(str(saved('clip')))
  for arrays, config in ((state, around), (wrapped, described)):
    (tmp_path / 'config.json').write_text(json.dumps(config))
    save_file(arrays, tmp_path / 'model.safetensors')
    have = vqrae_jax.load_encoder(str(tmp_path))
    assert have[0].spec == want[0].spec
    check_equal(have, want)


def test_dinov3_without_registers(tmp_path):
  """Their file holds an empty array."""
  import transformers

  kind = next(k for k in references.KINDS if k.startswith('dinov3'))
  config = model(kind).config.to_dict() | dict(num_register_tokens=0)
  config = transformers.DINOv3ViTConfig(**config)
  transformers.DINOv3ViTModel(config).save_pretrained(tmp_path)
  encoder, _ = vqrae_jax.load_encoder(str(tmp_path))
  assert encoder.spec.vit.num_registers == 0


def test_mae_with_its_pretraining_decoder(tmp_path):
  import transformers

  full = transformers.ViTMAEForPreTraining(model('mae').config)
  full.vit.load_state_dict(model('mae').state_dict())
  full.save_pretrained(tmp_path)
  have = vqrae_jax.load_encoder(str(tmp_path))
  check_equal(have, vqrae_jax.load_encoder(str(saved('mae'))))


@pytest.mark.parametrize('stacked', (False, True))
def test_the_first_blocks_of_other_files(stacked, tiny_row, tmp_path):
  """big_vision's files, one of which stacks its blocks, and converted ones."""
  path, folder = tmp_path / 'siglip.npz', str(saved('siglip'))
  np.savez(path, **references.big_vision(model('siglip'), stacked))
  convert.convert_encoder(folder, tmp_path / 'converted', None, 'float32')
  sources = (
    (folder, None),
    (str(path), 'tiny'),
    (str(tmp_path / 'converted'), None),
  )
  found = [encoders.find_encoder(*source) for source in sources]
  spec = dataclasses.replace(encoders.spec_of(found[0]), layers=(0,))
  want, *others = (encoders.fit_encoder(f, spec) for f in found)
  for other in others:
    for name in want.target:
      np.testing.assert_array_equal(want.read(name), other.read(name))
