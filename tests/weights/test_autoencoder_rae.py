"""diffusers' `AutoencoderRAE`, saved by diffusers, against ours, both ways."""

import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import vqrae_jax
from tests.encoders.references import randomise
from tests.weights.files import equal, error_of
from vqrae_jax import convert, encoders, export
from vqrae_jax.models.tokenizer import build_tokenizer, variable_shapes
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import autoencoder_rae, vqrae_torch
from vqrae_jax.specs import merge_sections
from vqrae_jax.weights import files

torch = pytest.importorskip('torch')

D = 128  # two heads
# encoder_type: patch, side in tokens. RAE's positions are those of 16 alone.
KINDS = {'dinov2': (14, 16), 'siglip2': (16, 4), 'mae': (16, 6)}
DECODER = dict(
  decoder_hidden_size=64,
  decoder_num_hidden_layers=2,
  decoder_num_attention_heads=4,
  decoder_intermediate_size=96,
  patch_size=4,
)


@pytest.fixture(scope='module')
def rae():
  """The module of diffusers, imported where it is used: it is slow to."""
  name = 'diffusers.models.autoencoders.autoencoder_rae'
  found = pytest.importorskip(
    name, reason='diffusers cannot be imported', exc_type=ImportError
  )

  class Siglip(torch.nn.Module):
    """As before transformers dropped what 0.42 looks for in it."""

    def __init__(self, config):
      super().__init__()
      self.vision_model = self.cls(config)

    def forward(self, *args, **options):
      return self.vision_model(*args, **options)

  Siglip.cls = found.SiglipVisionModel
  with pytest.MonkeyPatch.context() as patch:
    if not hasattr(found.SiglipVisionModel, 'vision_model'):
      patch.setattr(found, 'SiglipVisionModel', Siglip)
    yield found


def sizes(kind):
  patch, n = KINDS[kind]
  return DECODER | dict(
    encoder_type=kind,
    encoder_hidden_size=D,
    encoder_num_hidden_layers=2,
    encoder_patch_size=patch,
    encoder_input_size=patch * n,
  )


def relative(have, want):
  want = want.numpy()
  return np.linalg.norm(np.moveaxis(have, -1, 1) - want) / np.linalg.norm(want)


@pytest.mark.parametrize('kind', KINDS)
def test_parity_and_the_way_back(kind, rae, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  n = KINDS[kind][1]
  rng = torch.Generator().manual_seed(1)
  model = rae.AutoencoderRAE(
    **sizes(kind),
    latents_mean=torch.randn(D, n, n, generator=rng),
    latents_std=torch.rand(D, n, n, generator=rng) + 0.2,
    encoder_norm_mean=[0.5, 0.4, 0.3] if kind == 'siglip2' else None,
    noise_tau=0.8,
  )
  randomise(model).save_pretrained('theirs', max_shard_size='1MB')
  assert pathlib.Path(f'theirs/{autoencoder_rae.WEIGHTS}.index.json').is_file()
  convert.main(['--source=./theirs', '--out=ours'])
  assert '--config.noise_tau=0.8' in capsys.readouterr().out
  tokenizer, variables = vqrae_jax.load_tokenizer('ours')
  images = torch.rand(1, 3, 4 * n, 4 * n, generator=rng)
  with torch.no_grad():
    codes = model.encode(images).latent
    decoded, passed = model.decode(codes).sample, model(images).sample

  @jax.jit
  def encode(images):
    return tokenizer.apply(
      variables, images, method=lambda t, x: t.latents.normalise(t.encode(x))
    )

  @jax.jit
  def decode(codes):
    return tokenizer.apply(variables, codes, method='decode_codes')[0]

  with jax.default_matmul_precision('highest'):
    have = encode(images.permute(0, 2, 3, 1).numpy())
    assert relative(have, codes) < 1e-5
    assert relative(decode(have), passed) < 1e-5
    assert relative(decode(codes.permute(0, 2, 3, 1).numpy()), decoded) < 1e-5

  convert.main(['--source=./ours', '--to=diffusers', '--out=back'])
  back = rae.AutoencoderRAE.from_pretrained('back').state_dict()
  state = model.state_dict()
  assert back.keys() == state.keys()
  for key, value in state.items():
    if key.endswith('mask_token') or '.head.' in key:
      assert not back[key].any()
    elif key == '_latents_std':  # + 1e-5 - 1e-5
      torch.testing.assert_close(back[key], value, rtol=1e-6, atol=0)
    else:
      assert torch.equal(back[key], value), key
  convert.main(['--source=./back', '--out=again'])
  equal(*(load_file(f'{x}/model.safetensors') for x in ('again', 'ours')))


MODELS = {
  'dinov2': ('dinov2_with_registers', 518),
  'siglip2': ('siglip_vision_model', 256),
  'mae': ('vit_mae', 224),
}


def ours(kind='dinov2', **changes):
  """A tokenizer of ours that the class has, but for the changes."""
  name, pixels = MODELS[kind]
  section = encoders.fields_of(
    dict(
      model_type=name,
      hidden_size=D,
      num_hidden_layers=2,
      num_attention_heads=2,
      image_size=pixels,
      patch_size=KINDS[kind][0],
    ),
    '',
  )
  decoder = dict(width=64, depth=2, num_heads=4, mlp_dim=96, patch_size=4)
  model = dict(
    encoder=section | dict(output_norm='plain', resize='torch_bicubic'),
    quantizer=dict(name='none'),
    decoder=dict(name='B', vit=decoder),
    latents=dict(norm='channel'),
  )
  return build_tokenizer(merge_sections(model, changes))


def random_leaves(tokenizer):
  rng = np.random.default_rng(0)
  return {
    name: rng.random(leaf.shape, np.float32) + 0.1
    for name, leaf in variable_shapes(tokenizer).items()
  }


@pytest.mark.parametrize('norm', ('none', 'channel', 'position'))
def test_ours_there_and_back(norm, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  grid = (16, 16) if norm == 'position' else None
  tokenizer = ours(latents=dict(norm=norm, grid=grid))
  leaves = random_leaves(tokenizer)
  before = export.save_tokenizer(tokenizer, trees.unflatten(leaves), 'ours')
  convert.main(['--source=./ours', '--to=diffusers', '--out=theirs'])
  words = error_of(convert.main, ['--source=./theirs', '--out=a', '--row=x'])
  assert '--row' in words and 'AutoencoderRAE' in words
  convert.main(['--source=./theirs', '--out=again'])
  assert (
    json.loads(pathlib.Path('again/config.json').read_text())['fingerprint']
    == before
  )


def opened(kind='dinov2', state=None, **changes):
  """(tokenizer, {leaf: array}) of the tokenizer above, in a file of diffusers
  and with a config that differ by these."""
  tokenizer = ours(kind)
  leaves = random_leaves(tokenizer)
  variables = trees.unflatten(leaves)
  config, arrays = autoencoder_rae.to_diffusers(tokenizer, variables)
  source = files.arrays('w.safetensors', (state or (lambda x: x))(arrays))
  found, fits, statistics = autoencoder_rae.read(
    config | changes, 'config.json', source
  )
  return found, vqrae_torch.load(fits) | statistics


ATTENTION = {
  f'attention.{n[0]}_proj': f'attention.attention.{n}'
  for n in ('query', 'key', 'value')
}
ATTENTION |= {'attention.o_proj': 'attention.output.dense'}
# What transformers 5 calls otherwise than 4, or SigLIP's otherwise in 5.23.
RENAMED = {
  'dinov2': ATTENTION,
  'siglip2': {'vision_model.': ''},
  'mae': ATTENTION
  | {
    'encoder.layers.': 'encoder.encoder.layer.',
    'mlp.fc1': 'intermediate.dense',
    'mlp.fc2': 'output.dense',
  },
}


@pytest.mark.parametrize('kind', KINDS)
def test_names_of_other_versions(kind):
  def renamed(state):
    for new, old in RENAMED[kind].items():
      before = state
      state = {key.replace(new, old): x for key, x in before.items()}
      assert state.keys() != before.keys()
    return state

  _, leaves = opened(kind, renamed)
  equal(leaves, random_leaves(ours(kind)))


# The shapes that torch spreads over latents, of n*n or [n n] tokens.
FORMS = {
  'none': ((1,), True),
  'number': ((1,), True),
  'channel': ((D, 1, 1), True),
  'position': ((1, D, 16, 16), True),
  'rows': ((16, 1), True),
  'tokens by channel': ((D,), False),
  'tokens by position': ((256, D), False),
}


@pytest.mark.parametrize('form', FORMS)
def test_statistics(form):
  """z -> scale (z - mean) / (std + 1e-5), from the config of older files."""
  (shape, square), scale = FORMS[form], 1.0 if form == 'none' else 0.7
  rng = np.random.default_rng(0)
  mean, std = (rng.random(shape, np.float32) + 0.2 for _ in range(2))
  if form == 'none':
    mean, std = np.zeros(1, np.float32), np.ones(1, np.float32)
  tokenizer, leaves = opened(
    state=lambda x: {k: v for k, v in x.items() if 'latents' not in k},
    latents_mean=mean.tolist(),
    latents_std=std.tolist(),
    scaling_factor=scale,
    reshape_to_2d=square,
  )
  norm = tokenizer.latents_spec.norm
  if form == 'none':
    assert norm == 'none' and 'codebook/latents/mean' not in leaves
    return
  by_position = form in ('rows', 'position', 'tokens by position')
  assert norm == ('position' if by_position else 'channel')
  z = rng.random((D, 16, 16) if square else (256, D), np.float32)
  want = scale * (z - mean) / (std + 1e-5)
  want = np.moveaxis(want.reshape(D, 16, 16), 0, -1) if square else want
  z = np.moveaxis(z, 0, -1) if square else z
  have = (z.reshape(16, 16, D) - leaves['codebook/latents/mean']) / leaves[
    'codebook/latents/std'
  ]
  np.testing.assert_allclose(
    have, want.reshape(have.shape), rtol=2e-6, atol=1e-6
  )


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(encoder_type='dinov3'), ('encoder_type', 'dinov2')),
    (dict(num_channels=4), ('num_channels=4', '3')),
    (dict(image_size=32), ('image_size=32', '64')),
    (dict(encoder_input_size=230), ('encoder_input_size=230', '224')),
    (dict(encoder_input_size=8), ('encoder_input_size=8', 'must be 14')),
    (dict(encoder_hidden_size=32), ('encoder_hidden_size=32',)),
    (dict(encoder_hidden_size='x'), ("encoder_hidden_size='x'", 'number')),
    (dict(decoder_hidden_size=None), ('decoder_hidden_size=None',)),
    (dict(encoder_num_hidden_layers=1), ('encoder.layer.1.',)),
    (dict(decoder_num_hidden_layers=1), ('decoder_layers.1.',)),
    (dict(decoder_num_attention_heads=3), ('num_heads=3',)),
    (dict(latents_std=[1.0, 2.0]), ('(2,)', 'statistics')),
    (dict(scaling_factor=0), ('latents',)),
    (dict(more=1), ('"more"', '0.42')),
  ],
)
def test_what_is_no_autoencoder_of_ours(changes, words):
  def without_statistics(state):
    return {k: v for k, v in state.items() if 'latents' not in k}

  message = error_of(opened, state=without_statistics, **changes)
  assert all(word in message for word in words), message


def test_other_arrays():
  more = {'quantizer.codes': np.ones(2, np.float32)}
  assert 'quantizer.codes' in error_of(opened, state=lambda x: x | more)
  mean = {'_latents_mean': np.full(1, np.nan, np.float32)}
  assert 'latents' in error_of(opened, state=lambda x: x | mean)


@pytest.mark.parametrize(
  'changes, key',
  [
    (dict(quantizer=dict(name='fsq')), 'quantizer.name='),
    (
      dict(
        quantizer=dict(name='fsq'),
        encoder=dict(output_norm='affine', layers=(0, 1)),
        decoder=dict(vit=dict(act='gelu_tanh')),
      ),
      'quantizer.name=',
    ),
    (dict(quantizer=dict(projection=True)), 'quantizer.projection='),
    (dict(encoder=dict(output_norm='affine')), 'encoder.output_norm='),
    (dict(encoder=dict(resize='bicubic')), 'encoder.resize='),
    (dict(encoder=dict(layers=(0, 1))), 'encoder.layers='),
    (dict(encoder=dict(vit=dict(num_heads=4))), 'encoder.vit.num_heads='),
    (dict(encoder=dict(vit=dict(posemb='rope2d'))), 'encoder.vit.posemb='),
    (dict(decoder=dict(vit=dict(grid=(16, 8)))), 'decoder.vit.grid='),
    (dict(decoder=dict(vit=dict(act='gelu_tanh'))), 'decoder.vit.act='),
    (dict(decoder=dict(vit=dict(posemb='rope2d'))), 'decoder.vit.posemb='),
    (dict(decoder=dict(pixel_norm=dict(mean=(0, 0, 0)))), 'decoder.pixel_norm'),
    (dict(feature_decoder=dict(vit={})), 'feature_decoder'),
  ],
)
def test_what_the_class_does_not_have(changes, key):
  message = error_of(autoencoder_rae.to_diffusers, ours(**changes), {})
  assert key in message and 'AutoencoderRAE' in message, message


@pytest.mark.parametrize(
  'vit',
  [dict(grid=(8, 8)), dict(posemb='learned', prefix_has_posemb=True)],
)
def test_positions_that_the_class_does_not_have(vit):
  tokenizer = ours(decoder=dict(vit=vit))
  variables = trees.unflatten(random_leaves(tokenizer))
  message = error_of(autoencoder_rae.to_diffusers, tokenizer, variables)
  assert f'posemb="{tokenizer.decoder_spec.vit.posemb}"' in message


def test_patches_of_one_size_are_not_resized():
  tokenizer = ours(
    encoder=dict(resize='bicubic'), decoder=dict(vit=dict(patch_size=14))
  )
  variables = trees.unflatten(random_leaves(tokenizer))
  config, _ = autoencoder_rae.to_diffusers(tokenizer, variables)
  assert config['encoder_input_size'] == 224 and config['patch_size'] == 14
