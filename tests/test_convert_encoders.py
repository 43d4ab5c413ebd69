"""Whole models of the PyTorch project around every family of encoders.

The encoder is transformers' own with random weights, under the names of its
files; quantizer and decoder are `tests/torch_vqrae.py`'s. Reconstruction
parity, and every array back to the last bit.
"""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import vqrae_jax
from tests import tiny, torch_vqrae
from tests.encoders import references
from vqrae_jax import convert
from vqrae_jax.errors import UserError
from vqrae_jax.pretrained import vqrae_torch
from vqrae_jax.specs import EncoderSpec, PixelNorm, ViTSpec

SIZES = dict(width=32, depth=2, heads=4, mlp=48, pixels=16, patch=4)
PIXELS = references.IMAGENET
CLS = dict(num_prefix_tokens=1, prefix_has_posemb=True)
INTERN = CLS | dict(layer_scale=0.1)
LARGE = dict(norm='rms', qkv_bias=False, qk_norm=True)
GIANT = dict(layer_scale=1.0, act='swiglu', mlp_dim=88, prefix_has_posemb=True)

# (transformers' model, its final norm, the ViT's fields, the encoder's)
CASES = {
  'mae': ('mae', 'plain', CLS | dict(norm_eps=1e-12), {}),
  'internvit-300m': (
    'internvit-300m', 'plain', INTERN, dict(final_norm=False)
  ),
  'internvit-6b': (
    'internvit-6b', 'affine', INTERN | LARGE, dict(final_norm=False)
  ),
  'dinov2-giant': (
    'dinov2-swiglu', 'affine', GIANT | dict(num_prefix_tokens=1), {}
  ),
  'dinov2-giant-registers': (
    'dinov2-registers-swiglu',
    'plain',
    GIANT | dict(num_prefix_tokens=5, num_registers=4),
    dict(posemb_antialias=True),
  ),
}  # fmt: skip
HOMES = {'dinov2': 'encoder.encoder.', 'mae': 'encoder.model.'}


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def write_config(vit, encoder, output_norm):
  vit = tiny.VIT | vit
  painter = tiny.VIT | tiny.DECODER
  painter |= dict(posemb='learned', prefix_has_posemb=True)
  model = dict(
    encoder=dict(
      vit=vit, pixel_norm=PIXELS, output_norm=output_norm, **encoder
    ),
    quantizer=dict(name='vq'),
    decoder=dict(vit=painter),
  )
  text = (
    'import ml_collections\n\n\ndef get_config():\n'
    f'  return ml_collections.ConfigDict(dict(model={model!r}))\n'
  )
  with open('c.py', 'w') as file:
    file.write(text)


def in_a_file(model, folder) -> dict:
  """{name in transformers' file: array}, which is not its name in memory."""
  model.save_pretrained(folder)
  arrays = load_file(folder / 'model.safetensors')
  return {k: torch.from_numpy(x) for k, x in arrays.items()}


def home_of(kind):
  return HOMES.get(kind.split('-')[0], 'encoder.model.')


def there_and_back(case, folder, original=False):
  kind, output_norm, vit, encoder = CASES[case]
  model = references.make(kind, **SIZES)
  names = in_a_file(model, folder / 'hub')
  if output_norm == 'plain':  # the project's "wNorm"
    last = f'{references.KINDS[kind].norm}.'
    names = {k: x for k, x in names.items() if not k.startswith(last)}
  home = home_of(kind)
  theirs = {home + k: x for k, x in names.items()}
  state = torch_vqrae.state_dict('vq', encoder=theirs)
  given = state
  if original:
    given = {k: x for k, x in state.items() if k not in theirs}
    renamed = references.original_names(model)
    given |= {home + k: x for k, x in renamed.items()}
  torch.save(dict(model=given), 'w.pt')
  write_config(vit, encoder, output_norm)
  convert.main(['--source=vqrae_torch:w.pt', '--config=c.py', '--out=ours'])

  images = tiny.images(3).astype(np.float32) / 255
  latents = references.latents(kind, model, images, 4, output_norm)
  latents = torch.from_numpy(latents.reshape(3, -1, 32))
  want, indices = torch_vqrae.reconstruct(
    state, images, 'vq', latents, PIXELS['mean'], PIXELS['std']
  )
  tokenizer, variables = vqrae_jax.load_tokenizer('ours')
  have = vqrae_jax.encode_to_indices(
    tokenizer, variables, images, precision='canonical'
  )
  np.testing.assert_array_equal(have, indices)
  assert len(np.unique(have)) > 4
  painted = vqrae_jax.decode_from_indices(
    tokenizer, variables, have, precision='canonical'
  )
  off = np.abs(np.asarray(painted) - np.clip(want, 0, 1)).max()
  assert off <= 1e-5

  convert.main(['--source=./ours', '--to=torch', '--out=back.safetensors'])
  back = load_file('back.safetensors')
  assert back.keys() == state.keys()
  for key, value in state.items():
    if key.endswith('.mask_token'):
      assert back[key].shape == value.shape and not back[key].any()
    else:
      assert back[key].tobytes() == value.numpy().tobytes(), key


@pytest.mark.parametrize('case', CASES)
def test_there_and_back(case, there):
  there_and_back(case, there)


def test_internvit_under_its_authors_names(there):
  """q, k and v in one array; on the way back the names of transformers."""
  there_and_back('internvit-300m', there, original=True)


def test_an_encoder_of_another_family(there, capsys):
  """The line says whose names the file has."""
  model = references.make('mae', **SIZES)
  theirs = in_a_file(model, there / 'hub')
  theirs = {f'encoder.model.{k}': x for k, x in theirs.items()}
  torch.save(torch_vqrae.state_dict('vq', encoder=theirs), 'w.pt')
  argv = ['--source=vqrae_torch:w.pt', '--config=c.py', '--out=ours']
  for vit, encoder in (({}, {}), (INTERN, dict(final_norm=False))):
    write_config(vit, encoder, 'affine')
    with pytest.raises(UserError, match='it has the names of ViT-MAE') as e:
      convert.main(argv)
    assert '\n' not in str(e.value)
  strange = {'encoder.model.stem.weight': torch.ones(2)}
  torch.save(torch_vqrae.state_dict('vq', encoder=strange), 'w.pt')
  with pytest.raises(UserError, match='no key that tells an encoder'):
    convert.main(argv)
  assert not (there / 'ours').exists()


def spec(vit, **fields):
  vit = ViTSpec(**(tiny.VIT | vit))
  return EncoderSpec(vit=vit, pixel_norm=PixelNorm(**PIXELS), **fields)


@pytest.mark.parametrize(
  'vit, fields, family',
  [
    ({}, {}, 'SigLIP'),
    (CLS, {}, 'ViT-MAE'),
    (CLS | dict(layer_scale=1.0), {}, 'DINOv2'),
    (CLS | dict(layer_scale=1.0), dict(final_norm=False), 'InternViT'),
    (GIANT | dict(num_prefix_tokens=5, num_registers=4), {}, 'DINOv2'),
    (INTERN | LARGE, dict(final_norm=False), 'InternViT'),
    (INTERN | LARGE, {}, None),
    (LARGE, {}, None),
    (CLS, dict(final_norm=False), None),
    (dict(num_prefix_tokens=1), {}, None),
    (CLS | dict(num_prefix_tokens=3, num_registers=2), {}, None),
    (dict(posemb='sincos2d'), {}, None),
  ],
)
def test_the_spec_tells_the_family(vit, fields, family):
  if family is not None:
    assert vqrae_torch._family(spec(vit, **fields)) == family
    return
  with pytest.raises(UserError, match='SigLIP, DINOv2, ViT-MAE, InternViT'):
    vqrae_torch.export_encoder({}, spec(vit, **fields))


def test_every_published_row_has_a_family():
  from vqrae_jax import encoders
  from vqrae_jax.specs import build_spec

  words = {
    'siglip': 'SigLIP', 'siglip2': 'SigLIP', 'dinov2': 'DINOv2',
    'vit': 'ViT-MAE', 'internvit': 'InternViT',
  }  # fmt: skip
  for name, row in encoders.ENCODERS.items():
    found = vqrae_torch._family(build_spec(EncoderSpec, row, name))
    assert found == words[name.split('-')[0]], name
