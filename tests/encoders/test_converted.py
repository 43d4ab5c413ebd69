"""Encoders that `convert` wrote: every family, its report, damage."""

import errno
import json
import re
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vqrae_jax
from tests import tiny
from tests.encoders import references
from tests.encoders.conftest import COMMIT
from tests.encoders.references import model, saved
from tests.encoders.test_parity_tiny import check_equal, check_parity
from vqrae_jax import convert, encoders, export
from vqrae_jax.encoders import converted
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import encoders as pretrained
from vqrae_jax.specs import EncoderSpec, build_spec


@pytest.fixture
def run(tmp_path, capsys):
  """(source, flags) -> (the folder that `convert` wrote, what it printed)."""
  out = tmp_path / 'deep' / 'ours'

  def run(source, *flags):
    capsys.readouterr()
    convert.main([f'--source={source}', f'--out={out}', *flags])
    return out, capsys.readouterr().out

  return run


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
  """A tiny SigLIP, converted."""
  path = tmp_path_factory.mktemp('converted') / 'siglip'
  convert.convert_encoder(str(saved('siglip')), path)
  return path


def parity(report):
  found = re.search(r'^parity with transformers [\d.]+: (\S+) ', report, re.M)
  assert found, report
  return float(found[1])


def roundtrip(report):
  """The counts of arrays: (equal, all)."""
  return re.search(r'^round trip: (\d+) of (\d+) ', report, re.M).groups()


@pytest.mark.parametrize('kind', references.KINDS)
def test_every_family(kind, run):
  source = saved(kind)
  out, report = run(source)
  keys = len(load_file(source / 'model.safetensors'))
  leaves = len(load_file(out / 'model.safetensors'))
  counts = re.search(
    rf'encoder: (\d+) keys matched, {leaves} leaves filled, (\d+) keys skip',
    report,
  )
  matched, skipped = counts.groups()
  assert int(matched) + int(skipped) == keys
  assert (skipped != '0') == ('  skipped ' in report)
  assert roundtrip(report) == (matched, matched)
  assert parity(report) <= 1e-5  # measured: below 4e-7
  have, want = (vqrae_jax.load_encoder(str(s)) for s in (out, source))
  assert have[0].spec == want[0].spec
  check_equal(have, want)
  check_parity(kind, *have)


def test_config_json_is_the_spec_without_run_options(ours):
  config = json.loads((ours / 'config.json').read_text())
  assert config.keys() == {'format_version', 'source', 'encoder'}
  assert config['source'] == str(saved('siglip'))
  assert 'output_norm' not in config['encoder']
  assert not {'scan', 'remat', 'dtype'} & config['encoder']['vit'].keys()
  for name, row in encoders.ENCODERS.items():
    spec = build_spec(EncoderSpec, row, name)
    config = dict(format_version=1, encoder=converted.describe(spec))
    fields = converted.fields(json.loads(json.dumps(config)), name)
    assert build_spec(EncoderSpec, fields, name) == spec


def test_a_hub_id_keeps_its_commit(cached, run):
  cached('someone/tiny', saved('siglip').iterdir())
  out, report = run('hf:someone/tiny@main')
  assert f'revision: {COMMIT}' in report and parity(report) <= 1e-5
  assert json.loads((out / 'config.json').read_text())['revision'] == COMMIT
  assert pretrained.find_encoder(str(out)).revision == COMMIT


def test_a_single_file_and_its_row(tiny_row, tmp_path, run):
  file = tmp_path / 'siglip.npz'
  np.savez(file, **references.big_vision(model('siglip')))
  out, report = run(file, '--row=tiny')
  assert 'not measured' in report
  assert 'licence: a licence' in report and 'row: tiny' in report
  equal, total = roundtrip(report)
  assert equal == total
  have, want = (vqrae_jax.load_encoder(str(s)) for s in (out, saved('siglip')))
  check_equal(have, want)


def test_in_bfloat16(run):
  out, report = run(saved('siglip'), '--dtype=bfloat16')
  assert roundtrip(report) == ('37', '37') and 'bfloat16' in report
  assert parity(report) <= 1e-5  # before rounding
  have, want = (
    trees.flatten(vqrae_jax.load_encoder(str(s))[1])
    for s in (out, saved('siglip'))
  )
  for name, leaf in want.items():
    rounded = leaf.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(have[name], rounded)


@pytest.mark.parametrize('name', ('torch', 'transformers'))
def test_without_a_reference(name, monkeypatch, run):
  monkeypatch.setitem(sys.modules, name, None)
  out, report = run(saved('siglip'))
  assert f'not measured, {name} is not installed' in report
  assert (out / 'model.safetensors').is_file()


def test_weights_that_transformers_does_not_find(copy, run):
  """Never measured against weights that transformers drew itself."""
  file = copy / 'model.safetensors'
  save_file({f'module.{k}': v for k, v in load_file(file).items()}, file)
  _, report = run(copy)
  assert re.search('not measured, .* 37 .*embeddings.patch_emb', report)


def test_too_far_from_the_reference(tmp_path, monkeypatch, run):
  monkeypatch.setattr(convert, 'PARITY_LIMIT', 1e-12)
  with pytest.raises(UserError, match='parity with transformers'):
    run(saved('siglip'))
  assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, run):
  def full(file, shapes, read):
    file.write(b'a part of it')
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(convert, 'write_safetensors', full)
  with pytest.raises(OSError, match='No space'):
    run(saved('siglip'))
  assert not list((tmp_path / 'deep').iterdir())


def test_tokenizers_and_encoders_are_told_apart(ours, tmp_path):
  config = dict(format_version=1, fingerprint='', model=tiny.model())
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match='load_tokenizer'):
    vqrae_jax.load_encoder(str(tmp_path))
  with pytest.raises(UserError, match='load_encoder'):
    vqrae_jax.load_tokenizer(ours)
  with pytest.raises(UserError, match='not replaced'):
    export.check_target(ours)
  with pytest.raises(UserError, match='load_encoder'):
    convert.main([f'--source={ours}', f'--out={tmp_path}/again'])
  (tmp_path / 'config.json').write_text('[' * 100_000)
  (tmp_path / 'model.safetensors').touch()
  assert not export.is_tokenizer(tmp_path)
  with pytest.raises(UserError, match='config.json'):
    vqrae_jax.load_tokenizer(tmp_path)


def top(**keys):
  return lambda config: config.update(keys)


def in_vit(**keys):
  return lambda config: config['encoder']['vit'].update(keys)


@pytest.mark.parametrize(
  'edit, key',
  [
    (top(format_version=9), 'version 9'),
    (top(encoder=3), '"encoder'),
    (top(encoder={}), '"encoder'),
    (top(revision=3), 'revision=3'),
    (in_vit(dtype='bfloat16'), 'vit.dtype'),
    (in_vit(width='x'), "width='x'"),
    (in_vit(depth=3), r'blocks/.*\(2, .*\(3, '),
    (in_vit(qk_norm=True), 'query_norm/scale'),
    (in_vit(qkv_bias=False), 'query/bias'),
    (lambda config: config['encoder'].pop('resize'), 'encoder.resize'),
    (lambda config: config['encoder']['vit'].pop('depth'), 'vit.depth'),
    (lambda config: config.pop('encoder'), 'load_tokenizer'),
  ],
)
def test_a_damaged_config(edit, key, ours, tmp_path):
  damaged = shutil.copytree(ours, tmp_path / 'damaged')
  config = json.loads((damaged / 'config.json').read_text())
  edit(config)
  (damaged / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match=key) as caught:
    vqrae_jax.load_encoder(str(damaged))
  assert '\n' not in str(caught.value)


def test_damaged_leaves(ours, tmp_path):
  damaged = shutil.copytree(ours, tmp_path / 'damaged')
  state = load_file(damaged / 'model.safetensors')
  state['more'] = state.pop('norm/scale')
  save_file(state, damaged / 'model.safetensors')
  with pytest.raises(UserError, match='norm/scale.*more'):
    vqrae_jax.load_encoder(str(damaged))
