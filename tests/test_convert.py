"""Checkpoints of the PyTorch project to tokenizers and back.

Parity with `tests/torch_vqrae.py`, bitwise round trips of every quantizer's
form, and the command line's errors. Its reports are compared by their words.
"""

import re

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import vqrae_jax
from tests import tiny, torch_vqrae
from tests.weights import torch_rae
from vqrae_jax import convert, export, quantizers, weights
from vqrae_jax.errors import UserError
from vqrae_jax.pretrained import vqrae_torch

# What no file tells: as a config has it.
CONFIG = """
import ml_collections

VIT = dict(width=32, depth=2, mlp_dim=48, num_heads=4, patch_size=4,
           grid=(4, 4))


def get_config(name='{quantizer}'):
  config = ml_collections.ConfigDict()
  config.model = dict(
    encoder=dict(vit=VIT | dict(act='gelu_tanh'), output_norm='plain'),
    quantizer=dict(name=name),
    decoder=dict(vit=VIT | dict(
      norm_eps=1e-12, posemb='{posemb}', num_prefix_tokens=1,
      prefix_has_posemb={learned})),
  )
  return config
"""


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').mkdir()
  for name, posemb in (('fixed', 'sincos2d'), ('loaded', 'learned')):
    text = CONFIG.format(
      quantizer='vq', posemb=posemb, learned=posemb == 'learned'
    )
    (tmp_path / 'configs' / f'{name}.py').write_text(text)
  return tmp_path


def converted(form, config='loaded', dress=lambda s: s, more=()):
  """(state dict, tokenizer, variables) of a form, through the command."""
  state = torch_vqrae.state_dict(form)
  torch.save(dress(state), 'w.pt')
  name = form.split('-')[0]
  convert.main(
    [
      '--source=vqrae_torch:w.pt',
      f'--config=configs/{config}.py:{name}',
      '--out=ours',
      *more,
    ]
  )
  return state, *vqrae_jax.load_tokenizer('ours')


def photographs():
  return tiny.images(3).astype(np.float32) / 255


@pytest.mark.parametrize('form', torch_vqrae.FORMS)
def test_parity_and_the_way_back(form, capsys):
  more = ['--quantizer=bound="clip"'] if form == 'fsq-clip' else []
  state, tokenizer, variables = converted(form, more=more)
  images = photographs()
  want, indices = torch_vqrae.reconstruct(state, images, form)
  have = vqrae_jax.encode_to_indices(
    tokenizer, variables, images, precision='canonical'
  )
  np.testing.assert_array_equal(have, indices)
  assert len(np.unique(have)) > 4
  painted = vqrae_jax.decode_from_indices(
    tokenizer, variables, have, precision='canonical'
  )
  off = np.abs(np.asarray(painted) - np.clip(want, 0, 1)).max()
  assert off <= 1e-5  # measured: below 1e-6

  convert.main(['--source=./ours', '--to=torch', '--out=back.safetensors'])
  back = load_file('back.safetensors')
  assert back.keys() == state.keys()
  for key, value in state.items():
    assert back[key].dtype == value.numpy().dtype, key
    assert back[key].shape == value.shape, key
    assert back[key].tobytes() == value.numpy().tobytes(), key
  said = capsys.readouterr().out
  spec = tokenizer.quantizer.post_quant
  if form.endswith('conv'):
    code = form == 'fsq-code-conv'
    want = (
      (1, 'code') if code else (3, 'code' if form[:2] == 'vq' else 'latent')
    )
    assert (spec.kernel, spec.space) == want
  else:
    assert spec is None
  assert "the file's quantizer: " in said and 'keys matched' in said
  counts = re.search(r'back again: (\d+) of (\d+)', said)
  assert counts[1] == counts[2]


def test_the_average_is_preferred_and_fixed_positions_are_compared(capsys):
  def dress(state):
    zeros = {k: v * 0 for k, v in state.items()}
    return dict(step=9, epoch=1, model=zeros, ema=state)

  state, tokenizer, variables = converted('simvq-cosine', 'fixed', dress)
  said = capsys.readouterr().out
  assert 'took "ema"' in said
  assert 'decoder.decoder_pos_embed: fixed sin-cos positions' in said
  assert 'cosine (it has a temperature)' in said and 'legacy form' in said
  assert 'skipped quantizer.l2_norm_scale: a positive factor' in said
  images = photographs()
  want, _ = torch_vqrae.reconstruct(state, images, 'simvq-cosine')
  have = vqrae_jax.reconstruct(tokenizer, variables, images).images
  assert np.abs(np.asarray(have) - want).max() < 1e-3


def test_wrappers_and_heads_are_left_behind(capsys):
  def dress(state):
    more = {'encoder.model.head.probe': torch.ones(1, 1, 32)}
    more['encoder.model.post_layernorm.weight'] = torch.ones(32)
    return {f'module.{k}': v for k, v in (state | more).items()}

  converted('vq', dress=dress)
  said = capsys.readouterr().out
  assert 'the pooling head' in said and "the final norm's affine" in said


def test_what_the_file_cannot_tell_is_given():
  fields = '--quantizer=distance="cosine",code_scale="unit"'
  _, tokenizer, _ = converted('simvq-l2', more=[fields])
  assert tokenizer.quantizer.code_scale == 'unit'


@pytest.mark.parametrize('config', ('fixed', 'loaded'))
def test_a_decoder_alone(config, capsys):
  state = torch_rae.state_dict(latent=32)
  torch.save(dict(model=state), 'd.pt')
  argv = [f'--config=configs/{config}.py', '--out=d.safetensors']
  convert.main(['--source=rae:d.pt', *argv])
  back = load_file('d.safetensors')
  assert back.keys() == state.keys()
  for key, value in state.items():
    if config == 'fixed' and key == 'decoder_pos_embed':
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


@pytest.mark.parametrize(
  'state, update',
  [
    # The project's VectorQuantizer, and what a training file may lack.
    (('embedding', 'ema_cluster_size', 'ema_w'), 'ema'),
    (('embedding',), 'ema'),
    # An `nn.Embedding`, as a table that gradients move is written back.
    (('embedding.weight',), 'gradient'),
  ],
)
def test_spellings_of_a_table(state, update):
  shapes = dict.fromkeys(('embedding', 'embedding.weight', 'ema_w'), (48, 32))
  arrays = {
    f'quantizer.{k}': np.ones(shapes.get(k, (48,)), np.float32) for k in state
  }
  source = weights.arrays('w.pt', arrays)
  form = vqrae_torch.detect(source, 32, 'fsq')
  assert form.name == 'vq' and form.fields['update'] == update
  fields = dict(name='vq') | form.fields
  q = quantizers.build(fields, 32, 'float32')
  place = 'codebook' if update == 'ema' else 'params'
  leaf = f'{place}/quantizer/codes'
  target = {leaf: jax.ShapeDtypeStruct((48, 32), np.float32)}
  table = vqrae_torch.quantizer_table(q)
  fitted = weights.Pretrained(source, table, target)
  assert set(fitted.ignored) == set(arrays) - {next(iter(arrays))}
  back = weights.export(table, fitted.load())
  back |= vqrae_torch.fresh_state(q, back)
  assert set(back) >= set(arrays)


@pytest.mark.parametrize('word', ('codebook', 'codebook.weight', 'embed'))
def test_spellings_that_the_project_never_had(word):
  """ "quantizer.codebook" is FSQ's grid there, no table of VQ's."""
  source = weights.arrays('w.pt', {f'quantizer.{word}': np.ones((48, 32))})
  with pytest.raises(UserError, match=f'these keys: quantizer.{word};'):
    vqrae_torch.detect(source, 32, 'vq')


WHOLE = '--source=vqrae_torch:w.pt --config=configs/loaded.py:vq --out=ours'
BAD = [
  ('', 'flag --source is missing'),
  ('--source=rae:w.pt', 'flag --out is missing'),
  ('--source=vqrae_torch:no.pt --out=ours', 'there is no such file'),
  ('--source=vqrae_torch:w.pt --out=ours', 'flag --config is missing'),
  ('--source=torch:w.pt --out=ours', 'unknown scheme "torch:"'),
  ('--source=hf:a --out=ours', '"hf:a" is no hub id; write hf:ORG/NAME'),
  ('--source=siglip-base --out=ours', 'did you mean "siglip-base-patch16-'),
  ('--source=./no --out=ours', 'no encoder at no: there is no such file'),
  ('--source=./taken --out=ours', 'taken has no config.json'),
  ('--source=./w.pt --out=ours', 'which does not say what it holds'),
  ('--source=./w.pt --out=ours --row=dino', 'did you mean "dinov2-'),
  ('--source=./w.pt --out=ours --row=dinov2-base', 'w.pt does not fit'),
  ('--source=./half.pt --out=ours --row=dinov2-base', 'no key that tells'),
  ('--source=dinov2-base --out=ours --row=dinov2-large', 'names what dinov2-b'),
  ('--source=./w.pt --out=ours --dtype=float16', 'did you mean "bfloat16"'),
  ('--source=./w.pt --out=ours --config=configs/loaded.py', '--config does no'),
  ('--source=./w.pt --out=ours --quantizer=a=1', '--quantizer does not go wi'),
  ('--source=./w.pt --out=taken', 'taken exists and is not replaced'),
  ('--source=./w.pt --out=ours.pt', 'ours.pt must be a directory'),
  ('--source=./w.pt --out=w.pt/a/b', 'w.pt is a file'),
  (WHOLE + ' --row=dinov2-base', '--row does not go with .* no encoder alone'),
  (WHOLE + ' --dtype=bfloat16', '--dtype does not go with this source'),
  ('--source=./taken --to=torch --out=b.safetensors --row=x', '--row does no'),
  (WHOLE + ' --to=jax', '--to=jax must be ours or torch'),
  (WHOLE + ' --quantizer=levels', 'must be field=value'),
  (WHOLE + ' --quantizer=num_codes=3', 'num_codes=3, and w.pt has 48'),
  (WHOLE + ' --quantizer=num_code=3', 'did you mean "num_codes"'),
  (WHOLE + ' --config.model.decoder.vit.depth=3', 'missing in it: decoder.'),
  (WHOLE + ' --config.model.decoder.vit.dpth=3', 'did you mean "depth"'),
  (WHOLE + ' --config.model.encoder.vit.depth=1', 'encoder.layers.1'),
  (WHOLE + ' --config.model.encoder.output_norm=affine', 'post_layernorm'),
  (WHOLE.replace('=ours', '=taken'), 'taken exists and is not replaced'),
  (WHOLE.replace('w.pt', 'odd.pt'), 'quantizer.strange'),
  (WHOLE.replace('w.pt', 'attn.pt'), 'attention projector'),
  (WHOLE.replace('w.pt', 'extra.pt'), 'unknown to the model: quantizer.more'),
  (WHOLE.replace('w.pt', 'nan.pt'), 'NaN'),
  (WHOLE.replace('w.pt', 'cut.pt'), 'damaged'),
  (WHOLE.replace('vqrae_torch:w.pt', 'rae:w.pt'), 'must end in .safetensors'),
  (WHOLE.replace('w.pt', 'd.pt'), 'holds no "encoder." keys'),
  ('--source=rae:half.pt --out=s.npz', 'no "mean" and "var"'),
  ('--source=./taken --to=torch --out=b.safetensors', 'is no tokenizer'),
  ('--source=rae:w.pt --to=torch --out=b.safetensors', 'directory of a'),
  ('--source=./x --to=torch --out=b.pt', 'must end in .safetensors'),
  ('--source=./x --to=torch --out=no/b.safetensors', 'there is no folder no'),
  ('--surce=x', 'did you mean "source"'),
]  # fmt: skip


@pytest.fixture(scope='module')
def bad_files(tmp_path_factory):
  place = tmp_path_factory.mktemp('bad')
  good = torch_vqrae.state_dict('vq')

  def save(name, **more):
    torch.save(good | more, place / f'{name}.pt')

  save('w')
  save('extra', **{'quantizer.more': torch.ones(2)})
  save('nan', **{'quantizer.embedding': good['quantizer.embedding'] * np.nan})
  save('attn', **{'fsq_projection.transformer.x': torch.ones(2)})
  plain = {k: v for k, v in good.items() if not k.startswith('quantizer.')}
  torch.save(plain | {'quantizer.strange': torch.ones(2)}, place / 'odd.pt')
  torch.save(torch_rae.state_dict(latent=32), place / 'd.pt')
  torch.save({'mean': torch.ones(2)}, place / 'half.pt')
  data = (place / 'w.pt').read_bytes()
  (place / 'cut.pt').write_bytes(data[: len(data) // 2])
  return place


def names(folder):
  return sorted(
    str(p) for p in folder.rglob('*') if '__pycache__' not in str(p)
  )


@pytest.mark.parametrize('argv, words', BAD)
def test_bad_input_is_one_line_and_writes_nothing(
  argv, words, bad_files, there
):
  for path in bad_files.iterdir():
    (there / path.name).symlink_to(path)
  (there / 'taken').mkdir()
  (there / 'taken' / 'mine.txt').write_text('mine')
  before = names(there)
  with pytest.raises(UserError, match=words) as error:
    convert.main(argv.split())
  assert '\n' not in str(error.value)
  assert before == names(there)


@pytest.mark.parametrize(
  'model, words',
  [
    (tiny.model('fsq-cosmos'), 'convention="centered" only'),
    (tiny.model('simvq-l2'), 'no projections around SimVQ'),
    (
      tiny.model('simvq-l2', code_dim=32, projection=False),
      'quantizer.normalize=False only',
    ),
    (
      tiny.model('simvq-cosine', code_dim=32, projection=False),
      'code_scale="unit" or "none" only',
    ),
  ],
)
def test_what_has_no_form_there_does_not_go_back(model, words, there):
  export.save_tokenizer(*tiny.built(model), there / 'mine')
  with pytest.raises(UserError, match=words):
    convert.main(['--source=./mine', '--to=torch', '--out=b.safetensors'])
  assert not (there / 'b.safetensors').exists()


def test_dinov2_goes_there_and_back(there):
  """No reference: the tables alone, both ways, with registers."""
  text = CONFIG.format(quantizer='vq', posemb='learned', learned=True)
  more = (
    'layer_scale=1.0, num_prefix_tokens=3, num_registers=2, '
    'prefix_has_posemb=True'
  )
  text = text.replace("act='gelu_tanh'", more)
  (there / 'configs' / 'dino.py').write_text(text)
  scope: dict = {}
  exec(text, scope)
  config = scope['get_config']().model.to_dict()
  tokenizer, variables = tiny.built(config)
  variables['params']['encoder'] = jax.tree.map(
    lambda x: x + 0.1 * np.random.default_rng(0).normal(size=x.shape),
    variables['params']['encoder'],
  )
  export.save_tokenizer(tokenizer, variables, there / 'mine')
  convert.main(['--source=./mine', '--to=torch', '--out=b.safetensors'])
  assert 'encoder.encoder.embeddings.register_tokens' in load_file(
    'b.safetensors'
  )
  convert.main(
    ['--source=vqrae_torch:b.safetensors', '--config=configs/dino.py:vq',
     '--out=again']
  )  # fmt: skip
  one, two = (load_file(f'{d}/model.safetensors') for d in ('mine', 'again'))
  assert one.keys() == two.keys()
  assert all(one[k].tobytes() == two[k].tobytes() for k in one)


def test_help_has_an_example(capsys):
  with pytest.raises(SystemExit) as stop:
    convert.main(['--help'])
  assert stop.value.code == 0
  assert 'example:\n  python -m vqrae_jax.convert --' in capsys.readouterr().out
