"""Encoders that `convert` wrote: every family, its report, damage."""

import json
import re
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vqrae_jax
from tests.encoders import references
from tests.encoders.conftest import COMMIT
from tests.encoders.references import model, saved
from tests.encoders.test_parity_tiny import check_equal, check_parity
from vqrae_jax import convert, export
from vqrae_jax.errors import UserError
from vqrae_jax.pretrained import encoders as pretrained


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


def test_a_hub_id_keeps_its_commit(cached, run):
  cached('someone/tiny', saved('siglip').iterdir())
  out, report = run('hf:someone/tiny@main')
  assert f'revision: {COMMIT}' in report and parity(report) <= 1e-5
  config = json.loads((out / 'config.json').read_text())
  assert config['source'] == 'hf:someone/tiny@main'
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
    vqrae_jax.load_encoder(str(s), param_dtype='bfloat16')
    for s in (out, saved('siglip'))
  )
  check_equal(have, want)


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


@pytest.mark.parametrize(
  'name, value, words',
  [
    ('PARITY_LIMIT', 1e-12, 'parity with transformers'),
    ('write_safetensors', mock.Mock(side_effect=UserError('full')), 'full'),
  ],
)
def test_failing_leaves_nothing(name, value, words, tmp_path, monkeypatch, run):
  """Too far from the reference, and a disk that is full."""
  monkeypatch.setattr(convert, name, value)
  with pytest.raises(UserError, match=words):
    run(saved('siglip'))
  assert not [*tmp_path.glob('*/*')]


def test_it_is_neither_replaced_nor_converted_again(ours, tmp_path):
  with pytest.raises(UserError, match='not replaced'):
    export.check_target(ours)
  with pytest.raises(UserError, match='load_encoder'):
    convert.main([f'--source={ours}', f'--out={tmp_path}/again'])


@pytest.mark.parametrize(
  'edit, key',
  [
    (lambda c: c.update(format_version=9), 'version 9'),
    (lambda c: c.update(encoder=3), '"encoder'),
    (lambda c: c.update(revision=3), 'revision=3'),
    (lambda c: c['encoder'].pop('resize'), 'encoder.resize'),
    (lambda c: c['encoder']['vit'].update(dtype='bfloat16'), 'vit.dtype'),
    (lambda c: c['encoder']['vit'].update(width='x'), "width='x'"),
    (lambda c: c['encoder']['vit'].update(depth=3), r'/.*\(2, .*\(3, '),
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
