"""Checkpoints of the PyTorch project to tokenizers and back.

Encoders are transformers' with random weights, quantizers and decoders those
of `tests/torch_vqrae.py`. Quantizers are compared by themselves, pixels once
for each pixel norm; every array comes back bit for bit.
"""

import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import vqrae_jax
from tests import tiny, torch_vqrae
from tests.encoders import references
from tests.encoders.references import model, saved
from tests.weights import torch_rae
from vqrae_jax import convert, encoders, quantizers
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import vqrae_torch
from vqrae_jax.specs import EncoderSpec, PixelNorm, ViTSpec, build_spec
from vqrae_jax.weights import files

torch = pytest.importorskip('torch')
safetensors_torch = pytest.importorskip('safetensors.torch')

CLS = dict(num_prefix_tokens=1, prefix_has_posemb=True)
INTERN = CLS | dict(layer_scale=0.1)
LARGE = dict(norm='rms', qkv_bias=False, qk_norm=True)
GIANT = dict(layer_scale=1.0, act='swiglu', mlp_dim=88, prefix_has_posemb=True)
REGISTERS = GIANT | dict(num_prefix_tokens=5, num_registers=4)
NO_NORM = dict(final_norm=False)
SIGLIP = dict(act='gelu_tanh')

# kind of reference: (output_norm, the ViT's fields, the encoder's)
ENCODERS = {
  'siglip': ('plain', SIGLIP, {}),
  'mae': ('plain', CLS | dict(norm_eps=1e-12), {}),
  'internvit-300m': ('plain', INTERN, NO_NORM),
  'internvit-6b': ('affine', INTERN | LARGE, NO_NORM),
  'dinov2-swiglu': ('affine', GIANT | dict(num_prefix_tokens=1), {}),
  'dinov2-registers-swiglu': (
    'plain', REGISTERS, dict(posemb_antialias=True)
  ),
}  # fmt: skip


def state_of(form='vq', kind='siglip', original=False):
  """A state dict of the project's model around an encoder of the hub."""
  state = safetensors_torch.load_file(saved(kind) / 'model.safetensors')
  if original:
    state = references.original_names(model(kind))
  left_out = ('head.',)
  if ENCODERS[kind][0] == 'plain':  # the project's "wNorm"
    left_out += (f'{references.KINDS[kind].norm}.',)
  home = 'encoder.encoder.' if 'dinov2' in kind else 'encoder.model.'
  kept = {home + k: x for k, x in state.items() if not k.startswith(left_out)}
  return torch_vqrae.state_dict(form, kept)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def write_config(kind='siglip', quantizer='vq', **decoder):
  """c.py: what no file contains. "siglip" keeps the default pixel norm."""
  output_norm, vit, encoder = ENCODERS[kind]
  if kind != 'siglip':
    encoder = encoder | dict(pixel_norm=references.IMAGENET)
  learned = dict(posemb='learned', prefix_has_posemb=True)
  config = dict(
    encoder=dict(vit=tiny.VIT | vit, output_norm=output_norm, **encoder),
    quantizer=dict(name=quantizer),
    decoder=dict(vit=tiny.VIT | tiny.DECODER | learned | decoder),
  )
  with open('c.py', 'w') as file:
    file.write(
      'import ml_collections\n\n\ndef get_config():\n'
      f'  return ml_collections.ConfigDict(dict(model={config!r}))\n'
    )
  return config


def convert_file(state, *more):
  """(tokenizer, variables) of a state dict, through the command."""
  torch.save(state, 'w.pt')
  argv = ['--source=vqrae_torch:w.pt', '--config=c.py', '--out=ours', *more]
  convert.main(argv)
  return vqrae_jax.load_tokenizer('ours')


def check_way_back(state):
  convert.main(['--source=./ours', '--to=torch', '--out=back.safetensors'])
  back = load_file('back.safetensors')
  assert back.keys() == state.keys()
  for key, value in state.items():
    want = value.numpy()
    if key.endswith('.mask_token'):
      want = np.zeros_like(want)
    assert (back[key].dtype, back[key].shape) == (want.dtype, want.shape), key
    assert back[key].tobytes() == want.tobytes(), key


def images():
  return tiny.images(3).astype(np.float32) / 255


def latents_of(kind):
  x = references.latents(kind, model(kind), images(), 4, ENCODERS[kind][0])
  return torch.from_numpy(x.reshape(3, -1, 32))


@pytest.mark.parametrize('form', torch_vqrae.FORMS)
def test_parity_and_the_way_back(form, capsys):
  """Every quantizer by itself, on random latents."""
  write_config(quantizer=form.split('-')[0])
  state = state_of(form)
  more = ['--quantizer=bound="clip"'] if form == 'fsq-clip' else []
  tokenizer, variables = convert_file(state, *more)
  report = capsys.readouterr().out
  z = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
  with torch.no_grad():
    z_q, indices = torch_vqrae.quantize(state, z, form)
  q, grid = tokenizer.quantizer, (3, 4, 4)
  quantizer_only = {
    name: leaves['quantizer']
    for name, leaves in variables.items()
    if 'quantizer' in leaves
  }
  with jax.default_matmul_precision('highest'):
    out = jax.jit(q.apply)(quantizer_only, z.numpy().reshape(*grid, 32))
  np.testing.assert_array_equal(out.indices, indices.reshape(grid))
  assert len(np.unique(out.indices)) > 4
  want = z_q.numpy().reshape(out.z_q.shape)
  np.testing.assert_allclose(out.z_q, want, atol=1e-5)
  check_way_back(state)
  spaces = {'vq-conv': (3, 'code'), 'fsq-code-conv': (1, 'code')}
  spaces['fsq-latent-conv'] = (3, 'latent')
  spec = q.post_quant and (q.post_quant.kernel, q.post_quant.space)
  assert spec == spaces.get(form)
  assert "the file's quantizer: " in report and 'keys matched' in report
  counts = re.search(r'round trip: (\d+) of (\d+)', report)
  assert counts[1] == counts[2]


@pytest.mark.parametrize('kind', ('siglip', 'mae'))
def test_parity_of_pixels(kind):
  """Both pixel norms; quantizer and decoder are the same for all encoders."""
  write_config(kind)
  state = state_of('vq-conv', kind)
  tokenizer, variables = convert_file(state)
  with torch.no_grad():
    z_q, indices = torch_vqrae.quantize(state, latents_of(kind), 'vq-conv')
  norm = references.KINDS[kind].pixels
  want = torch_vqrae.decode(state, z_q, norm['mean'], norm['std'])
  have = vqrae_jax.encode_to_indices(
    tokenizer, variables, images(), precision='canonical'
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
  output_norm = ENCODERS[kind][0]
  _, want = vqrae_jax.load_encoder(str(saved(kind)), output_norm)
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
  for words in ('"ema"', 'decoder.decoder_pos_embed', 'cosine', 'legacy form',
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


@pytest.mark.parametrize('posemb', ('sincos2d', 'learned'))
def test_a_decoder_alone(posemb, capsys):
  state = torch_rae.state_dict(latent=32)
  torch.save(dict(model=state), 'd.pt')
  write_config(posemb=posemb, prefix_has_posemb=posemb == 'learned')
  argv = ['--source=rae:d.pt', '--config=c.py', '--out=d.safetensors']
  convert.main(argv)
  back = load_file('d.safetensors')
  assert back.keys() == state.keys()
  for key, value in state.items():
    if posemb == 'sincos2d' and key == 'decoder_pos_embed':
      np.testing.assert_allclose(back[key], value.numpy(), atol=1e-6)
      continue
    assert back[key].tobytes() == value.numpy().tobytes(), key
  assert '--config.init.decoder=rae:d.safetensors' in capsys.readouterr().out


def test_statistics_of_latents():
  stats = dict(mean=torch.randn(32, 4, 4), var=torch.rand(32, 4, 4))
  torch.save(stats, 's.pt')
  convert.main(['--source=rae:s.pt', '--out=s.npz'])
  with np.load('s.npz') as back:
    for key, value in stats.items():
      assert back[key].tobytes() == value.numpy().tobytes()


@pytest.mark.parametrize('word', ('codebook', 'codebook.weight', 'embed'))
def test_spellings_that_the_project_never_had(word):
  """ "quantizer.codebook" is FSQ's grid there, not a table of VQ's."""
  source = files.arrays('w.pt', {f'quantizer.{word}': np.ones((48, 32))})
  with pytest.raises(UserError, match=f'quantizer.{word};'):
    vqrae_torch.detect(source, 32, 'vq')


MODEL = '--source=vqrae_torch:w.pt --config=c.py --out=ours'
ENCODER = '--source=./w.pt --out=ours'
BAD = [
  ('', '--source'),
  ('--source=rae:w.pt', '--out'),
  ('--source=vqrae_torch:no.pt --out=ours', 'no.pt'),
  ('--source=vqrae_torch:w.pt --out=ours', '--config'),
  (ENCODER, 'w.pt .*config.json'),
  (ENCODER + ' --row=dinov2-base', 'w.pt does not fit'),
  ('--source=dinov2-base --out=ours --row=dinov2-large', '--row=dinov2-large'),
  (ENCODER + ' --dtype=float16', 'did you mean "bfloat16"'),
  (ENCODER + ' --config=c.py', '--config'),
  (ENCODER + ' --quantizer=a=1', '--quantizer'),
  ('--source=./w.pt --out=taken', '--out=taken'),
  ('--source=./w.pt --out=ours.pt', '--out=ours.pt'),
  ('--source=./w.pt --out=w.pt/a/b', '--out=w.pt/a/b'),
  (MODEL + ' --row=dinov2-base', '--row'),
  (MODEL + ' --dtype=bfloat16', '--dtype'),
  ('--source=./taken --to=torch --out=b.safetensors --row=x', '--row'),
  (MODEL + ' --to=jax', '--to=jax'),
  (MODEL + ' --quantizer=levels', '--quantizer=levels'),
  (MODEL + ' --quantizer=num_codes=3', 'num_codes=3.* 48'),
  (MODEL + ' --quantizer=num_code=3', 'did you mean "num_codes"'),
  (MODEL + ' --config.model.decoder.vit.depth=3', 'missing .*decoder.'),
  (MODEL + ' --config.model.decoder.vit.dpth=3', 'did you mean "depth"'),
  (MODEL + ' --config.model.encoder.vit.depth=1', 'encoder.layers.1'),
  (MODEL + ' --config.model.encoder.output_norm=affine', 'post_layernorm'),
  (MODEL.replace('=ours', '=taken'), 'taken'),
  (MODEL.replace('w.pt', 'odd.pt'), 'quantizer.strange'),
  (MODEL.replace('w.pt', 'attn.pt'), 'attention projector'),
  (MODEL.replace('w.pt', 'extra.pt'), 'quantizer.more'),
  (MODEL.replace('w.pt', 'nan.pt'), 'NaN'),
  (MODEL.replace('w.pt', 'mae.pt'), 'ViT-MAE'),
  (MODEL.replace('w.pt', 'stem.pt'), 'stem.pt.*SigLIP'),
  (MODEL.replace('vqrae_torch:w.pt', 'rae:w.pt'), '.safetensors'),
  (MODEL.replace('w.pt', 'd.pt'), '"encoder."'),
  ('--source=rae:half.pt --out=s.npz', '"mean" and "var"'),
  ('--source=./taken --to=torch --out=b.safetensors', 'taken'),
  ('--source=rae:w.pt --to=torch --out=b.safetensors', '--to=torch'),
  ('--source=./x --to=torch --out=b.pt', '.safetensors'),
  ('--source=./x --to=torch --out=no/b.safetensors', 'no folder no'),
  ('--surce=x', 'did you mean "source"'),
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
    odd=no_quantizer | {'quantizer.strange': ones},
    d=torch_rae.state_dict(latent=32),
    half={'mean': ones},
    mae=state_of(kind='mae'),
    stem=torch_vqrae.state_dict('vq', {'encoder.model.stem.weight': ones}),
  ).items():
    torch.save(state, folder / f'{name}.pt')
  return folder


def names(folder):
  return sorted(
    str(p) for p in folder.rglob('*') if '__pycache__' not in str(p)
  )


@pytest.mark.parametrize('argv, words', BAD)
def test_bad_input_is_one_line_and_writes_nothing(
  argv, words, bad_files, folder
):
  write_config()
  for path in bad_files.iterdir():
    (folder / path.name).symlink_to(path)
  (folder / 'taken').mkdir()
  (folder / 'taken' / 'mine.txt').write_text('mine')
  before = names(folder)
  with pytest.raises(UserError, match=words) as error:
    convert.main(argv.split())
  assert '\n' not in str(error.value)
  assert before == names(folder)


SIMVQ = dict(code_dim=32, projection=False)


@pytest.mark.parametrize(
  'kind, fields, key',
  [
    ('fsq-cosmos', {}, 'quantizer.convention'),
    ('simvq-l2', {}, 'quantizer.projection'),
    ('simvq-l2', SIMVQ, 'quantizer.normalize'),
    ('simvq-cosine', SIMVQ, 'quantizer.code_scale'),
  ],
)
def test_quantizers_that_the_project_does_not_have(kind, fields, key):
  quantizer = quantizers.build(tiny.quantizer(kind, **fields), 32, 'float32')
  with pytest.raises(UserError, match=key):
    vqrae_torch.quantizer_table(quantizer)


def family(vit, **fields):
  norm, vit = PixelNorm(**references.HALF), ViTSpec(**(tiny.VIT | vit))
  return vqrae_torch.encoder_family(EncoderSpec(vit, norm, **fields))


@pytest.mark.parametrize(
  'vit, fields',
  [
    (INTERN | LARGE, {}),
    (LARGE, {}),
    (CLS, NO_NORM),
    (dict(num_prefix_tokens=1), {}),
    (CLS | dict(num_prefix_tokens=3, num_registers=2), {}),
    (dict(posemb='sincos2d'), {}),
  ],
)
def test_encoders_that_the_project_does_not_have(vit, fields):
  with pytest.raises(UserError, match='SigLIP, DINOv2, ViT-MAE, InternViT'):
    family(vit, **fields)


def test_every_row_of_the_table_has_a_family():
  families = dict(vit='ViT-MAE', dinov2='DINOv2', internvit='InternViT')
  for name, row in encoders.ENCODERS.items():
    found = vqrae_torch.encoder_family(build_spec(EncoderSpec, row, name))
    assert found == families.get(name.split('-')[0], 'SigLIP'), name
