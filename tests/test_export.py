"""Tokenizers on disk: round trips, fingerprints, damage."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vqrae_jax
from tests import tiny
from vqrae_jax import export
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees


@functools.cache
def made(kind):
  return tiny.built(tiny.model(kind, depth=1, post_quant=dict(kernel=3)))


@pytest.fixture
def saved(tmp_path):
  def save(kind):
    tokenizer, variables = made(kind)
    export.save_tokenizer(tokenizer, variables, tmp_path / 'tokenizer')
    return tmp_path / 'tokenizer'

  return save


@pytest.mark.parametrize('kind', ('vq-ema', 'simvq-cosine'))
def test_what_is_opened_is_what_was_saved(kind, saved):
  tokenizer, variables = made(kind)
  path = saved(kind)
  opened, opened_variables = vqrae_jax.load_tokenizer(path)
  assert opened == tokenizer
  half, _ = vqrae_jax.load_tokenizer(path, dtype='bfloat16')
  assert half.encoder_spec.vit.dtype == half.quantizer.dtype == 'bfloat16'
  before, after = map(trees.flatten, (variables, opened_variables))
  for name in before.keys() & after.keys():
    np.testing.assert_array_equal(after[name], before[name], name)
  assert (before.keys() ^ after.keys()) <= {
    f'codebook/quantizer/{n}' for n in ('codes', 'counts', 'sums')
  }
  # Saved again: the same bytes.
  again = path.with_name('again')
  first = json.loads((path / 'config.json').read_text())
  second = export.save_tokenizer(opened, opened_variables, again)
  assert second == first['fingerprint']
  assert (again / export.WEIGHTS).read_bytes() == (
    path / export.WEIGHTS
  ).read_bytes()
  assert {p.name for p in path.parent.iterdir()} == {'tokenizer', 'again'}


@pytest.mark.parametrize('kind', ('vq-ema', 'simvq-cosine'))
def test_the_table_is_baked(kind, saved):
  """No projection of it is left to the decoding."""
  tokenizer, variables = made(kind)
  _, opened = vqrae_jax.load_tokenizer(saved(kind))
  want = tokenizer.apply(variables, method='baked_codebook')['codes']
  tables = opened['codebook']['quantizer']
  np.testing.assert_allclose(tables['codes'], want, atol=1e-6)
  decode = functools.partial(vqrae_jax.decode_from_indices, tokenizer)
  program = jax.make_jaxpr(decode)(opened, np.zeros((1, 4, 4), np.int32))
  dots = [e for e in program.jaxpr.eqns if e.primitive.name == 'dot_general']
  assert not any(f'f32[{tokenizer.codebook_size},' in str(e) for e in dots)


def test_run_options_change_neither_file_nor_fingerprint(tmp_path):
  _, variables = made('fsq-cosmos')
  prints = set()
  for options in ({}, dict(dtype='bfloat16'), dict(scan=False, remat=True)):
    model = tiny.model('fsq-cosmos', 1, post_quant=dict(kernel=3), **options)
    tokenizer = vqrae_jax.build_tokenizer(model)
    prints.add(export.save_tokenizer(tokenizer, variables, tmp_path / 'x'))
  assert len(prints) == 1


def test_the_fingerprint_is_pinned():
  """The recipe is a file format. Renew this only with a new format version.

  The text hashed is spelt out here by hand: canonical JSON, then a line and
  the bytes of each leaf in order of name.
  """
  import hashlib

  leaves = {'b': np.array([1.5, -0.0], '<f4'), 'a': np.ones((1, 2), '<f4')}
  text = (
    b'{"k":[1,2],"n":"\\u00e9"}'
    b'\na [1, 2]\n' + b'\x00\x00\x80\x3f' * 2 +
    b'\nb [2]\n' + b'\x00\x00\xc0\x3f' + b'\x00\x00\x00\x80'
  )  # fmt: skip
  found = export.fingerprint({'n': 'é', 'k': [1, 2]}, leaves)
  assert found == hashlib.sha256(text).hexdigest()
  assert found.startswith('fe55ac5c4ddf1d2c')


def weights(change):
  """(path) -> None: the leaves of the weights, changed."""

  def edit(path):
    leaves = load_file(path / export.WEIGHTS)
    change(leaves)
    save_file(leaves, path / export.WEIGHTS)

  return edit


def a_flipped_bit(path):
  data = bytearray((path / export.WEIGHTS).read_bytes())
  data[-5] ^= 1
  (path / export.WEIGHTS).write_bytes(data)


BIAS = 'params/decoder/head/bias'


@pytest.mark.parametrize(
  'damage, words',
  [
    (lambda p: (p / export.CONFIG).write_text('[' * 100_000), 'is damaged'),
    (a_flipped_bit, 'fingerprint'),
    (weights(lambda leaves: leaves.pop(BIAS)), f'missing {BIAS}'),
    (weights(lambda x: x.update({f'{BIAS}s': x[BIAS]})), f'unknown {BIAS}s'),
    (
      weights(lambda x: x.update({BIAS: x[BIAS][:-1].copy()})),
      r'head/bias is \(47,\), not \(48,\)',
    ),
  ],
)
def test_damage_is_named(damage, words, saved):
  """More of it in `tests/test_bad_inputs.py`."""
  path = saved('fsq-cosmos')
  damage(path)
  with pytest.raises(vqrae_jax.UserError, match=words):
    vqrae_jax.load_tokenizer(path)


@pytest.mark.parametrize(
  'name, text', [('thesis.txt', 'mine'), ('config.json', '{"model_type": "x"}')]
)
def test_what_is_no_tokenizer_is_not_replaced(name, text, saved, tmp_path):
  """A folder of something else, and a tokenizer with something beside it."""
  other, tokenizer = tmp_path / 'other', saved('fsq-cosmos')
  other.mkdir()
  (other / name).write_text(text)
  (tokenizer / 'notes.txt').write_text('mine')
  for path, words in (other, f'{name}|no tokenizer'), (tokenizer, 'notes.txt'):
    with pytest.raises(UserError, match=f'is not replaced: .*({words})'):
      export.save_tokenizer(*made('fsq-cosmos'), path)
  assert (other / name).read_text() == text


def test_a_failed_write_leaves_the_old_tokenizer(saved, monkeypatch):
  path = saved('fsq-cosmos')
  before = (path / export.WEIGHTS).read_bytes()
  tokenizer, variables = made('fsq-cosmos')

  def full(*_):
    raise OSError('disk full')

  monkeypatch.setattr('safetensors.numpy.save_file', full)
  with pytest.raises(OSError, match='disk full'):
    export.save_tokenizer(tokenizer, variables, path)
  assert (path / export.WEIGHTS).read_bytes() == before
  vqrae_jax.load_tokenizer(path)


def test_a_checkpoint_of_pytorch_is_to_be_converted(tmp_path):
  (tmp_path / 'm.pt').write_bytes(b'PK')
  with pytest.raises(UserError, match=r'convert .*vqrae_torch:.*m\.pt'):
    export.load_tokenizer(tmp_path / 'm.pt')
