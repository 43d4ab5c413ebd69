"""Encoders that `convert` stored: every family, its report, damage."""

import errno
import functools
import json
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vqrae_jax
from tests import tiny
from tests.encoders import references
from tests.encoders.conftest import COMMIT, cached
from vqrae_jax import convert, encoders, export, sharding
from vqrae_jax import convert as store_encoder
from vqrae_jax.encoders import converted, siglip
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import encoders as pretrained
from vqrae_jax.specs import EncoderSpec, build_spec
from vqrae_jax.train import initialize
from vqrae_jax.train.config import InitSpec

SIZES = dict(width=32, depth=2, heads=4, mlp=48, pixels=24, patch=4)


@functools.cache
def model(kind):
  return references.make(kind, **SIZES)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A tiny SigLIP as `save_pretrained` writes it."""
  path = tmp_path_factory.mktemp('siglip')
  model('siglip').save_pretrained(path)
  return path


@pytest.fixture(scope='module')
def kept(folder, tmp_path_factory):
  """The same, stored."""
  path = tmp_path_factory.mktemp('stored') / 'siglip'
  store_encoder.store_encoder(str(folder), path)
  return path


@pytest.fixture
def copy(kept, tmp_path):
  """The same, to be spoiled."""
  for path in kept.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path


def same(one, other):
  """Both (encoder, variables) are one, to the last bit and the same places."""
  assert one[0].spec == other[0].spec
  have, want = trees.flatten(one[1]), trees.flatten(other[1])
  assert have.keys() == want.keys()
  for name, leaf in have.items():
    assert leaf.dtype == want[name].dtype
    assert leaf.sharding == want[name].sharding, name
    assert np.asarray(leaf).tobytes() == np.asarray(want[name]).tobytes(), name


def far(said):
  """The parity figure of a report."""
  found = re.search(
    r'^parity with transformers [\d.]+: (\S+) \(relative, f32, one image of '
    r'24 px\)$',
    said,
    re.M,
  )
  assert found, said
  return float(found[1])


@pytest.mark.parametrize('kind', references.KINDS)
def test_every_family(kind, tmp_path, capsys):
  source, out = str(tmp_path / 'theirs'), str(tmp_path / 'deep' / 'ours')
  model(kind).save_pretrained(source)
  capsys.readouterr()
  convert.main([f'--source={source}', f'--out={out}'])
  said, err = capsys.readouterr()
  assert 'LOAD REPORT' not in err and 'UNEXPECTED' not in err
  keys = len(load_file(f'{source}/model.safetensors'))
  leaves = len(load_file(f'{out}/model.safetensors'))
  counts = re.search(
    rf'encoder: (\d+) keys matched, {leaves} leaves filled, (\d+) keys skip',
    said,
  )
  matched, skipped = map(int, counts.groups())
  assert matched + skipped == keys
  assert bool(skipped) == ('  skipped ' in said)
  assert (
    f'back again: {matched} of {matched} arrays equal bit for bit\n' in said
  )
  assert far(said) <= 1e-5  # measured: below 4e-7

  for mesh in (None, sharding.make_mesh('fsdp')):
    same(*(vqrae_jax.load_encoder(s, mesh=mesh) for s in (out, source)))


@pytest.mark.parametrize('output_norm', ('plain', 'none'))
def test_other_norms_types_and_layouts(output_norm, kept, folder):
  options = dict(
    output_norm=output_norm,
    mesh=sharding.make_mesh('fsdp+tp', tensor=2),
    param_dtype='bfloat16',
    dtype='bfloat16',
    remat=True,
  )
  same(*(vqrae_jax.load_encoder(str(s), **options) for s in (kept, folder)))


def test_config_json_is_the_spec_without_how_it_runs(kept, folder):
  told = json.loads((kept / 'config.json').read_text())
  assert told.keys() == {'format_version', 'source', 'encoder'}
  assert told['source'] == str(folder)
  assert not {'output_norm'} & told['encoder'].keys()
  assert not {'scan', 'remat', 'dtype'} & told['encoder']['vit'].keys()
  assert told['encoder']['resize'] == 'bicubic'
  for name, row in encoders.ENCODERS.items():
    spec = build_spec(EncoderSpec, row, name)
    config = dict(format_version=1, encoder=converted.describe(spec))
    config = json.loads(json.dumps(config))
    fields = converted.fields(config, name)
    assert build_spec(EncoderSpec, fields, name) == spec


def test_a_hub_id_leaves_its_commit(cache, folder, tmp_path, capsys):
  cached(cache, 'someone/tiny', {p.name: p for p in folder.iterdir()})
  out = tmp_path / 'ours'
  convert.main(['--source=hf:someone/tiny@main', f'--out={out}'])
  said = capsys.readouterr().out
  assert f'revision: {COMMIT}' in said and far(said) <= 1e-5
  told = json.loads((out / 'config.json').read_text())
  assert told['source'] == 'hf:someone/tiny@main'
  assert (
    told['revision'] == pretrained.find_encoder(str(out)).revision == COMMIT
  )


@pytest.mark.parametrize('ending', ('npz', 'safetensors'))
def test_a_lone_file_and_its_row(ending, tiny_row, folder, tmp_path, capsys):
  file, out = tmp_path / f'siglip.{ending}', tmp_path / 'ours'
  if ending == 'npz':
    np.savez(file, **references.big_vision(model('siglip')))
  else:
    file.write_bytes((folder / 'model.safetensors').read_bytes())
  convert.main([f'--source={file}', '--row=tiny', f'--out={out}'])
  said = capsys.readouterr().out
  assert 'parity with PyTorch: not measured, the source is a lone file' in said
  assert 'licence: a licence' in said and 'row: tiny' in said
  counts = re.search(r'back again: (\d+) of (\d+) arrays', said)
  assert counts[1] == counts[2]
  same(vqrae_jax.load_encoder(str(out)), vqrae_jax.load_encoder(str(folder)))


def test_in_bfloat16(folder, tmp_path, capsys):
  out = str(tmp_path / 'ours')
  convert.main([f'--source={folder}', f'--out={out}', '--dtype=bfloat16'])
  said = capsys.readouterr().out
  assert '37 of 37 arrays equal bit for bit once rounded to bfloat16' in said
  assert far(said) <= 1e-5  # of the port, before rounding
  have = trees.flatten(vqrae_jax.load_encoder(out)[1])
  for name, leaf in trees.flatten(
    vqrae_jax.load_encoder(str(folder))[1]
  ).items():
    rounded = leaf.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(have[name], rounded)


def not_measured(said):
  return re.search(r'^parity with PyTorch: not measured, (.*)$', said, re.M)[1]


@pytest.mark.parametrize('name', ('torch', 'transformers'))
def test_without_a_reference(name, folder, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, name, None)
  convert.main([f'--source={folder}', f'--out={tmp_path}/ours'])
  assert not_measured(capsys.readouterr().out) == f'{name} is not installed'
  assert (tmp_path / 'ours' / 'model.safetensors').is_file()


def test_what_transformers_does_not_read(folder, tmp_path, capsys):
  """Never measured against weights that it drew itself."""
  state = load_file(folder / 'model.safetensors')
  for at, change, words in (
    ('a', lambda k: f'module.{k}', 'does not find 37 .*embeddings.patch_emb'),
    ('b', lambda k: k, 'has no model.safetensors'),
  ):
    (tmp_path / at).mkdir()
    told = (folder / 'config.json').read_text()
    (tmp_path / at / 'config.json').write_text(told)
    file = 'model.safetensors' if at == 'a' else 'weights.safetensors'
    save_file({change(k): v for k, v in state.items()}, tmp_path / at / file)
    convert.main([f'--source={tmp_path}/{at}', f'--out={tmp_path}/ours-{at}'])
    assert re.search(words, not_measured(capsys.readouterr().out))


def test_internvit_under_its_authors_names(tmp_path, capsys):
  theirs = model('internvit-6b').config
  config = dict(
    model_type='intern_vit_6b',
    hidden_size=theirs.hidden_size,
    num_hidden_layers=theirs.num_hidden_layers,
    num_attention_heads=theirs.num_attention_heads,
    intermediate_size=theirs.intermediate_size,
    image_size=24,
    patch_size=4,
  )
  state = references.original_names(model('internvit-6b'))
  (tmp_path / 'config.json').write_text(json.dumps(config))
  state = {k: v.numpy() for k, v in state.items()}
  save_file(state, tmp_path / 'model.safetensors')
  convert.main([f'--source={tmp_path}', f'--out={tmp_path}/ours'])
  said = capsys.readouterr().out
  assert 'transformers itself has no model "intern_vit_6b"' in said
  n = len(state)
  assert f'back again: {n} of {n} arrays equal bit for bit\n' in said
  have, want = (
    vqrae_jax.load_encoder(str(p)) for p in (tmp_path / 'ours', tmp_path)
  )
  same(have, want)


def test_too_far_from_the_reference(folder, tmp_path, monkeypatch, capsys):
  def misread(config):
    fields = siglip.fields(config)
    return fields | dict(vit=fields['vit'] | dict(norm_eps=0.1))

  monkeypatch.setitem(encoders.MODEL_TYPES, 'siglip_vision_model', misread)
  with pytest.raises(UserError) as caught:
    convert.main([f'--source={folder}', f'--out={tmp_path}/ours'])
  assert re.search(
    r'parity with transformers .*24 px\): this is too much, above 1e-04; do '
    'not use the result: nothing was written',
    str(caught.value),
  )
  assert not list(tmp_path.iterdir())


def test_a_source_that_is_damaged(folder, tmp_path):
  state = load_file(folder / 'model.safetensors')
  state['post_layernorm.bias'][3] = np.nan
  (tmp_path / 'config.json').write_bytes((folder / 'config.json').read_bytes())
  save_file(state, tmp_path / 'model.safetensors')
  with pytest.raises(UserError, match='post_layernorm.bias holds 1 values'):
    convert.main([f'--source={tmp_path}', f'--out={tmp_path}/ours'])
  assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
  def full(path, shapes, read):
    path.write_bytes(b'some of it')
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(store_encoder, 'write_safetensors', full)
  with pytest.raises(OSError, match='No space'):
    convert.main([f'--source={folder}', f'--out={tmp_path}/ours'])
  assert not list(tmp_path.iterdir())


def test_a_run_begins_with_it(kept, folder):
  config = tiny.model()
  vit = tiny.VIT | dict(act='gelu_tanh', grid=(6, 6))
  config['encoder'] = dict(vit=vit, output_norm='plain')
  tokenizer = vqrae_jax.build_tokenizer(config)
  have, want = (
    initialize.given_leaves(tokenizer, None, InitSpec(encoder=str(p))).leaves
    for p in (kept, folder)
  )
  assert have.keys() == want.keys()
  for name, leaf in have.items():
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(want[name]))
  config['encoder']['vit'] = vit | dict(depth=3)
  with pytest.raises(UserError, match='is not the model: it has vit.depth=2'):
    initialize.given_leaves(
      vqrae_jax.build_tokenizer(config), None, InitSpec(encoder=str(kept))
    )


def test_a_tokenizer_is_no_encoder_and_an_encoder_no_tokenizer(kept, tmp_path):
  told = dict(format_version=1, fingerprint='', model=tiny.model())
  (tmp_path / 'config.json').write_text(json.dumps(told))
  with pytest.raises(UserError, match='is a tokenizer; load_tokenizer opens'):
    vqrae_jax.load_encoder(str(tmp_path))
  with pytest.raises(UserError, match='is an encoder alone; load_encoder op'):
    vqrae_jax.load_tokenizer(kept)
  with pytest.raises(UserError, match='exists and is not replaced'):
    export.check_target(kept)
  with pytest.raises(UserError, match='is converted already; load_encoder'):
    convert.main([f'--source={kept}', f'--out={tmp_path}/again'])


def edited(**keys):
  def edit(told):
    told.update(keys)

  return edit


def in_vit(**keys):
  def edit(told):
    told['encoder']['vit'].update(keys)

  return edit


@pytest.mark.parametrize(
  'edit, words',
  [
    (edited(format_version=9), 'has format version 9 of encoders, .* reads 1'),
    (edited(encoder=3), 'damaged: "encoder" is no section with a "vit"'),
    (edited(encoder={}), 'damaged: "encoder" is no section with a "vit"'),
    (edited(revision=3), 'damaged: revision=3'),
    (in_vit(dtype='bfloat16'), 'section "vit" has a key "dtype"'),
    (in_vit(width='x'), "width='x' must be of type int"),
    (in_vit(depth=3), 'blocks/.* is \\(2, .* the model wants \\(3, '),
    (in_vit(qk_norm=True), 'missing in it: .*query_norm/scale'),
    (in_vit(qkv_bias=False), 'unknown to the model: .*query/bias'),
    (lambda told: told['encoder'].pop('resize'), 'has no key "resize"'),
    (lambda told: told['encoder']['vit'].pop('depth'), 'has no key "depth"'),
    (lambda told: told.pop('encoder'), 'is a tokenizer; load_tokenizer opens'),
  ],
)
def test_a_damaged_config(edit, words, copy):
  told = json.loads((copy / 'config.json').read_text())
  edit(told)
  (copy / 'config.json').write_text(json.dumps(told))
  with pytest.raises(UserError, match=words) as caught:
    vqrae_jax.load_encoder(str(copy))
  assert '\n' not in str(caught.value)


def test_damaged_leaves(copy):
  path = copy / 'model.safetensors'
  whole = load_file(path)
  nan = whole['norm/scale'] * np.float32(np.nan)
  for change, words in (
    ({'norm/scale': None}, 'missing in it: norm/scale'),
    ({'more': nan}, 'unknown to the model: more'),
    ({'norm/scale': nan[:9]}, r'norm/scale is \(9,\), the model wants \(32,\)'),
    ({'norm/scale': nan}, 'norm/scale holds 32 values that are NaN'),
    (dict.fromkeys(whole), 'missing in it: embed/positions'),
  ):
    state = {k: v for k, v in (whole | change).items() if v is not None}
    save_file(state, path)
    with pytest.raises(UserError, match=words):
      vqrae_jax.load_encoder(str(copy))
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match='truncated or damaged'):
    vqrae_jax.load_encoder(str(copy))
  path.unlink()
  with pytest.raises(UserError, match='no weights in'):
    vqrae_jax.load_encoder(str(copy))
