"""Checkpoints of the PyTorch project to tokenizers and back.

Encoders are transformers' with random weights, quantizers and decoders those
of `tests/torch_vqrae.py`. Quantizers are compared by themselves, pixels once
for each pixel norm; every array comes back bit for bit.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import vqrae_jax
from tests import tiny, torch_vqrae
from tests.encoders import references
from tests.encoders.references import model, saved
from tests.golden import make_encoder_params as golden
from tests.weights import torch_rae
from tests.weights.files import error_of
from vqrae_jax import convert, encoders, quantizers
from vqrae_jax.errors import UserError
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import vqrae_torch
from vqrae_jax.specs import EncoderSpec, build_spec, merge_sections
from vqrae_jax.weights.files import WeightFile

torch = pytest.importorskip('torch')
safetensors_torch = pytest.importorskip('safetensors.torch')

# kind of reference: output_norm; "plain" is the project's "wNorm".
ENCODERS = {
  'siglip': 'plain',
  'mae': 'plain',
  'internvit-300m': 'plain',
  'internvit-6b': 'affine',
  'dinov2-swiglu': 'affine',
  'dinov2-registers-swiglu': 'plain',
}
IMAGES = tiny.images(3) / np.float32(255)


def state_of(form='vq', kind='siglip', original=False):
  """A state dict of the project's model around an encoder of the hub."""
  state = safetensors_torch.load_file(saved(kind) / 'model.safetensors')
  if original:
    state = references.original_names(model(kind))
  left_out = ('head.',)
  if ENCODERS[kind] == 'plain':
    left_out += (f'{references.KINDS[kind].norm}.',)
  home = 'encoder.encoder.' if 'dinov2' in kind else 'encoder.model.'
  kept = {home + k: x for k, x in state.items() if not k.startswith(left_out)}
  return torch_vqrae.state_dict(form, kept)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def described(kind):
  """The config's section of an encoder of the hub."""
  config = json.loads((saved(kind) / 'config.json').read_text())
  return encoders.fields_of(config, kind)


def write_config(kind='siglip', quantizer='vq', **decoder):
  """c.py: what no file contains."""
  learned = dict(posemb='learned', prefix_has_posemb=True)
  model = dict(
    encoder=described(kind) | dict(output_norm=ENCODERS[kind]),
    quantizer=dict(name=quantizer),
    decoder=dict(vit=tiny.VIT | tiny.DECODER | learned | decoder),
  )
  text = f'def get_config():\n  return {dict(model=model)!r}\n'
  pathlib.Path('c.py').write_text(text)


def convert_file(state, *more):
  """(tokenizer, variables) of a state dict, through the command."""
  torch.save(state, 'w.pt')
  argv = ['--source=vqrae_torch:w.pt', '--config=c.py', '--out=ours', *more]
  convert.main(argv)
  return vqrae_jax.load_tokenizer('ours')


def check_file(path, state):
  """It holds the state dict, bit for bit; DINOv2's mask token is zeros."""
  found = load_file(path)
  assert found.keys() == state.keys()
  for key, want in state.items():
    have, want = found[key], want.numpy()
    if key.endswith('.mask_token'):
      want = np.zeros_like(want)
    assert (have.dtype, have.shape) == (want.dtype, want.shape), key
    assert have.tobytes() == want.tobytes(), key


def check_way_back(state):
  convert.main(['--source=./ours', '--to=torch', '--out=back.safetensors'])
  check_file('back.safetensors', state)


@pytest.mark.parametrize('form', torch_vqrae.FORMS)
def test_parity_and_the_way_back(form):
  """Every quantizer by itself, on random latents."""
  write_config(quantizer=form.split('-')[0])
  state = state_of(form)
  tokenizer, variables = convert_file(state)
  z = torch.randn(3, 4, 4, 32, generator=torch.Generator().manual_seed(0))
  with torch.no_grad():
    z_q, indices = torch_vqrae.quantize(state, z.flatten(1, 2), form)
  run = functools.partial(tokenizer.apply, method=lambda t, z: t.quantizer(z))
  with jax.default_matmul_precision('highest'):
    out = jax.jit(run)(variables, z.numpy())
  np.testing.assert_array_equal(out.indices.reshape(3, -1), indices)
  assert len(np.unique(indices)) > 4
  np.testing.assert_allclose(out.z_q, z_q.reshape(z.shape), atol=1e-5)
  check_way_back(state)


@pytest.mark.parametrize('kind', ('siglip', 'mae'))
def test_parity_of_pixels(kind):
  """Both pixel norms; quantizer and decoder are the same for all encoders."""
  write_config(kind)
  state = state_of('vq-conv', kind)
  tokenizer, variables = convert_file(state)
  latents = references.latents(kind, model(kind), IMAGES, 4, ENCODERS[kind])
  z = torch.from_numpy(latents.reshape(3, -1, 32))
  with torch.no_grad():
    z_q, indices = torch_vqrae.quantize(state, z, 'vq-conv')
  norm = references.KINDS[kind].pixels
  want = torch_vqrae.decode(state, z_q, norm['mean'], norm['std'])
  have = vqrae_jax.encode_to_indices(
    tokenizer, variables, IMAGES, precision='canonical'
  )
  np.testing.assert_array_equal(have, indices.reshape(have.shape))
  pixels = vqrae_jax.decode_from_indices(
    tokenizer, variables, have, precision='canonical'
  )
  # measured: below 1e-6
  np.testing.assert_allclose(pixels, np.clip(want, 0, 1), atol=1e-5)


@pytest.mark.parametrize(
  'kind, original',
  [(k, False) for k in ENCODERS if k != 'siglip'] + [('internvit-300m', True)],
)
def test_every_encoder_and_the_way_back(kind, original):
  """The leaves are those of the hub's files, whose parity has its own tests.

  InternViT goes back under the names of transformers, q, k and v apart.
  """
  write_config(kind)
  _, variables = convert_file(state_of('vq', kind, original))
  _, want = vqrae_jax.load_encoder(str(saved(kind)), ENCODERS[kind])
  have = trees.flatten(variables['params']['encoder'])
  want = trees.flatten(want['params'])
  assert have.keys() == want.keys()
  for name, leaf in want.items():
    np.testing.assert_array_equal(have[name], leaf, err_msg=name)
  check_way_back(state_of('vq', kind))


def test_the_average_is_preferred_and_fixed_positions_are_compared(capsys):
  """Wrappers and heads are skipped, and the EMA's counts may be missing."""
  state = state_of('simvq-cosine')
  zeros = {k: v * 0 for k, v in state.items()}
  ema = {k: v for k, v in state.items() if 'ema_cluster' not in k}
  ema['encoder.model.head.probe'] = torch.ones(1, 1, 32)
  ema = {f'module.{k}': v for k, v in ema.items()}
  write_config(quantizer='simvq', posemb='sincos2d', prefix_has_posemb=False)
  convert_file(dict(step=9, epoch=1, model=zeros, ema=ema))
  report = capsys.readouterr().out
  for words in ('"ema"', 'decoder.decoder_pos_embed', 'cosine', 'round trip',
                'skipped quantizer.l2_norm_scale', 'head.probe'):  # fmt: skip
    assert words in report
  have = load_file('ours/model.safetensors')
  want = state['encoder.model.encoder.layers.1.mlp.fc1.bias']
  name = 'params/encoder/transformer/blocks/mlp/fc1/bias'
  np.testing.assert_array_equal(have[name][1], want)


def test_fields_that_the_file_does_not_tell():
  write_config(quantizer='simvq')
  fields = '--quantizer=distance="cosine",code_scale="unit"'
  tokenizer, _ = convert_file(state_of('simvq-l2'), fields)
  assert tokenizer.quantizer.code_scale == 'unit'


def test_trained_positions_are_read_off_the_file(capsys):
  """Whatever the config says; and images are resized as RAE does."""
  state = state_of()
  state['decoder.decoder_pos_embed'] = state['decoder.decoder_pos_embed'] + 0.5
  write_config(posemb='sincos2d', prefix_has_posemb=False)
  tokenizer, variables = convert_file(state)
  assert 'trained' in capsys.readouterr().out
  positions = variables['params']['decoder']['embed']['positions']
  want = state['decoder.decoder_pos_embed'][0, 1:]
  np.testing.assert_array_equal(positions.reshape(want.shape), want)
  check_way_back(state)
  assert tokenizer.encoder_spec.resize == 'torch_bicubic'
  x = np.random.default_rng(0).random((1, 24, 16, 3), np.float32)
  want = torch.nn.functional.interpolate(
    torch.tensor(x).permute(0, 3, 1, 2), (30, 20), mode='bicubic'
  ).permute(0, 2, 3, 1)
  vit = tiny.VIT | dict(patch_size=5)
  model = tiny.model() | dict(encoder=dict(vit=vit, resize='torch_bicubic'))
  tokenizer, variables = tiny.built(model)
  found, resized = (
    tokenizer.apply(variables, images, method=method)
    for images, method in (
      (x, 'read'),
      (want.numpy(), lambda t, x: t.encoder(x)),
    )
  )
  np.testing.assert_allclose(found, resized, rtol=1e-4, atol=1e-5)


def test_a_decoder_alone(capsys):
  state = torch_rae.state_dict(latent=32)
  torch.save(dict(model=state), 'd.pt')
  write_config()
  convert.main(['--source=rae:d.pt', '--config=c.py', '--out=d.safetensors'])
  check_file('d.safetensors', state)
  assert '--config.init.decoder=rae:d.safetensors' in capsys.readouterr().out


def test_statistics_of_latents():
  stats = dict(mean=torch.randn(32, 4, 4), var=torch.rand(32, 4, 4))
  torch.save(stats, 's.pt')
  convert.main(['--source=rae:s.pt', '--out=s.npz'])
  with np.load('s.npz') as back:
    for key, value in stats.items():
      assert back[key].tobytes() == value.numpy().tobytes()


MODEL = '--source=vqrae_torch:w.pt --config=c.py --out=ours'
ENCODER = '--source=./w.pt --out=ours'
BAD = [
  ('', '--source'),
  ('--source=vqrae_torch:w.pt --out=ours', '--config'),
  ('--source=dinov2-base --out=ours --row=dinov2-large', '--row=dinov2-large'),
  (ENCODER + ' --dtype=float16', '--dtype=float16.*bfloat16'),
  (ENCODER + ' --config=c.py', '--config'),
  ('--source=./w.pt --out=taken', '--out=taken'),
  ('--source=./w.pt --out=ours.pt', '--out=ours.pt'),
  ('--source=./w.pt --out=w.pt/a/b', '--out=w.pt/a/b'),
  (MODEL + ' --dtype=bfloat16', '--dtype'),
  ('--source=./taken --to=torch --out=b.safetensors --row=x', '--row'),
  (MODEL + ' --to=jax', '--to=jax'),
  (MODEL + ' --quantizer=levels', '--quantizer=levels'),
  (MODEL + ' --quantizer=**{}', '--quantizer='),
  (MODEL + ' --quantizer=a=' + 9999 * '-' + '1', '--quantizer='),
  (MODEL + ' --quantizer=num_codes=3', 'num_codes=3.* 48'),
  (MODEL + ' --quantizer=num_code=3', 'did you mean "num_codes"'),
  (MODEL + ' --config.model.encoder.vit.depth=1', 'encoder.layers.1'),
  (MODEL + ' --config.model.encoder.output_norm=affine', 'post_layernorm'),
  (MODEL.replace('=ours', '=taken'), 'taken'),
  (MODEL.replace('w.pt', 'odd.pt'), 'quantizer.codebook;'),
  (MODEL.replace('w.pt', 'flat.pt'), r'quantizer.embedding has shape \[1, '),
  (MODEL.replace('w.pt', 'buffer.pt'), 'quantizer.embedding.weight is missing'),
  (MODEL.replace('w.pt', 'levels.pt'), 'quantizer.scales'),
  (MODEL.replace('w.pt', 'attn.pt'), 'attention projector'),
  (MODEL.replace('w.pt', 'extra.pt'), 'quantizer.more'),
  (MODEL.replace('w.pt', 'nan.pt'), 'NaN'),
  (MODEL.replace('w.pt', 'mae.pt'), 'ViT-MAE'),
  (MODEL.replace('w.pt', 'd.pt'), '"encoder."'),
  ('--source=./taken --to=torch --out=b.safetensors', 'taken'),
  ('--source=rae:w.pt --to=torch --out=b.safetensors', '--to=torch'),
  ('--source=./x --to=torch --out=b.pt', '.safetensors'),
  ('--source=./x --to=torch --out=b.safetensors --config=c.py', '--config'),
  ('--source=./x --to=diffusers --out=b --quantizer=a=3', '--quantizer'),
  ('--source=rae:d.pt --config=c.py --out=o --quantizer=a=3', '--quantizer'),
  ('--source=./w.pt --out=gs://b/ours', 'gs://b/ours is a URL'),
  (MODEL.replace('=ours', '=gs://b/ours'), 'gs://b/ours is a URL'),
  ('--source=./x --to=torch --out=no/b.safetensors', 'no folder no'),
]  # fmt: skip


@pytest.fixture(scope='module')
def bad_files(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bad')
  good = state_of()
  table, ones = good['quantizer.embedding'], torch.ones(2)
  no_quantizer = {k: v for k, v in good.items() if 'quantizer.' not in k}
  for name, state in dict(
    w=good,
    extra=good | {'quantizer.more': ones},
    nan=good | {'quantizer.embedding': table * np.nan},
    attn=good | {'fsq_projection.transformer.x': ones},
    flat=good | {'quantizer.embedding': table[None]},
    buffer=good | {'quantizer.embedding_proj.weight': torch.ones(2, 2)},
    levels=no_quantizer
    | {'fsq_projection.weight': ones, 'quantizer.scales': ones * np.nan},
    odd=no_quantizer | {'quantizer.codebook': table},  # FSQ's grid there
    d=torch_rae.state_dict(latent=32),
    mae=state_of(kind='mae'),
  ).items():
    torch.save(state, folder / f'{name}.pt')
  return folder


@pytest.mark.parametrize('argv, words', BAD)
def test_bad_input_writes_nothing(argv, words, bad_files, tmp_path):
  write_config()
  for path in bad_files.iterdir():
    (tmp_path / path.name).symlink_to(path)
  (tmp_path / 'taken').mkdir()
  (tmp_path / 'taken' / 'mine.txt').write_text('mine')
  before = {*tmp_path.rglob('*')}
  with pytest.raises(UserError, match=words) as error:
    convert.main(argv.split())
  assert '\n' not in str(error.value)
  assert {*tmp_path.rglob('*')} == before


SIMVQ = dict(code_dim=32, projection=False)


@pytest.mark.parametrize(
  'kind, fields, key',
  [
    ('fsq-cosmos', {}, 'quantizer.convention'),
    ('fsq-centered', dict(bound='clip'), 'quantizer.levels='),
    ('simvq-l2', {}, 'quantizer.projection'),
    ('simvq-l2', SIMVQ, 'quantizer.normalize'),
    ('simvq-cosine', SIMVQ, 'quantizer.code_scale'),
    # As wide as the latents, without projections, as the project's are.
    ('lfq', dict(bits=30, projection=False), 'quantizer.name="lfq"'),
  ],
)
def test_quantizers_that_the_project_does_not_have(kind, fields, key):
  quantizer = quantizers.build(tiny.quantizer(kind, **fields), 32, 'float32')
  with pytest.raises(UserError, match=key):
    vqrae_torch.quantizer_table(quantizer)


@pytest.mark.parametrize(
  'kind, changes',
  [
    ('siglip', dict(vit=dict(posemb='sincos2d'))),
    ('siglip', dict(vit=dict(norm='rms'))),
    ('siglip', dict(vit=dict(qkv_bias='qv'))),
    ('mae', dict(vit=dict(posemb='rope2d'))),
    ('mae', dict(vit=dict(embed_norm=True))),
    ('mae', dict(vit=dict(prefix_has_posemb=False))),
    ('mae', dict(vit=dict(num_prefix_tokens=3, num_registers=2))),
    ('mae', dict(final_norm=False)),
    ('internvit-6b', dict(final_norm=True)),
  ],
)
def test_encoders_that_the_project_does_not_have(kind, changes):
  section = merge_sections(described(kind), changes)
  with pytest.raises(UserError, match='SigLIP, DINOv2, ViT-MAE, InternViT'):
    vqrae_torch.encoder_family(build_spec(EncoderSpec, section, kind))


def test_a_bound_that_the_project_does_not_have_is_not_written():
  with pytest.raises(UserError, match='quantizer.bound="tanh"'):
    vqrae_torch.to_torch(build_tokenizer(tiny.model('fsq-centered')), {})


@pytest.mark.parametrize(
  'changes, key',
  [
    (dict(encoder=dict(vit=dict(patch_size=5))), 'encoder.resize='),
    (dict(encoder=dict(output_norm='none')), 'encoder.output_norm='),
    (dict(feature_decoder={}), 'feature_decoder'),
    (dict(decoder=dict(pixel_norm=dict(mean=(0, 0, 0)))), 'decoder.pixel_norm'),
    (dict(latents=dict(norm='channel')), 'latents.norm='),
    (dict(quantizer=dict(projection=True, code_dim=8)), '32, not 8'),
  ],
)
def test_what_else_the_project_does_not_have(changes, key):
  """What would be written would give other indices or images there."""
  model = dict(
    encoder=described('siglip'),
    quantizer=dict(name='vq', num_codes=8),
    decoder=dict(vit=tiny.VIT | tiny.DECODER),
  )
  vqrae_torch.check_counterpart(build_tokenizer(model))
  tokenizer = build_tokenizer(merge_sections(model, changes))
  assert key in error_of(vqrae_torch.to_torch, tokenizer, {})


def test_a_file_of_two_models_is_refused():
  keys = 'encoder.x', 'module.encoder.x', 'decoder.x'
  file = WeightFile('a.pt', dict.fromkeys(keys, np.zeros(1)))
  assert 'encoder.x more than once' in error_of(vqrae_torch.split, file)


def test_every_row_of_the_table_has_a_family():
  """But those that the project never had."""
  families = dict(vit='ViT-MAE', dinov2='DINOv2', internvit='InternViT')
  families |= dict(siglip='SigLIP', siglip2='SigLIP')
  for name in encoders.ENCODERS:
    family, spec = families.get(name.split('-')[0]), golden.spec_of(name)
    if family is None:
      assert name.startswith(('dinov3-', 'clip-')), name
      assert 'no counterpart' in error_of(vqrae_torch.encoder_family, spec)
    else:
      assert vqrae_torch.encoder_family(spec) == family, name
