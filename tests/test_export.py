"""Tokenizers on disk: round trips, fingerprints, damage."""

import functools
import hashlib
import json
from unittest import mock

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


def saved(kind, folder):
  export.save_tokenizer(*made(kind), folder / 'tokenizer')
  return folder / 'tokenizer'


@pytest.mark.parametrize(
  'kind', ('vq-ema', 'simvq-cosine', 'residual-vq', 'residual-shared')
)
def test_what_is_opened_is_what_was_saved(kind, tmp_path):
  tokenizer, variables = made(kind)
  path = saved(kind, tmp_path)
  opened, opened_variables = vqrae_jax.load_tokenizer(path)
  assert opened == tokenizer
  before, after = map(trees.flatten, (variables, opened_variables))
  for name in before.keys() & after.keys():
    np.testing.assert_array_equal(after[name], before[name], name)
  where = 'codebook/quantizer/'
  where += 'parts/' if kind in tiny.NESTED else ''
  assert (before.keys() ^ after.keys()) <= {
    f'{where}{n}' for n in ('codes', 'counts', 'sums')
  }
  # The table is baked: no projection of it is left to the decoding.
  (want,) = jax.tree.leaves(tokenizer.apply(variables, method='baked_codebook'))
  np.testing.assert_allclose(after[f'{where}codes'], want, atol=1e-6)
  decode = functools.partial(vqrae_jax.decode_from_indices, opened)
  indices = np.zeros((1, *opened.index_shape(16, 16)), int)
  program = jax.make_jaxpr(decode)(opened_variables, indices)
  dots = [e for e in program.jaxpr.eqns if e.primitive.name == 'dot_general']
  assert not any(f'f32[{opened.codebook_size},' in str(e) for e in dots)
  # Saved again, whatever it runs in: the same bytes.
  again = tmp_path / 'again'
  half, _ = vqrae_jax.load_tokenizer(path, dtype='bfloat16', remat=True)
  assert half.encoder_spec.vit.dtype == half.quantizer.dtype == 'bfloat16'
  first = json.loads((path / export.CONFIG).read_text())
  second = export.save_tokenizer(half, opened_variables, again)
  assert second == first['fingerprint']
  for name in (export.CONFIG, export.WEIGHTS):
    assert (again / name).read_bytes() == (path / name).read_bytes()
  assert {*tmp_path.iterdir()} == {path, again}


def test_the_fingerprint_is_pinned():
  """The recipe is a file format. Renew this only with a new format version.

  The text hashed is spelt out here by hand: canonical JSON, then a line and
  the bytes of each leaf in order of name.
  """
  leaves = {'b': np.array([1.5, -0.0], '<f4'), 'a': np.ones((1, 2), '<f4')}
  text = (
    b'{"k":[1,2],"n":"\\u00e9"}'
    b'\na [1, 2]\n' + b'\x00\x00\x80\x3f' * 2 +
    b'\nb [2]\n' + b'\x00\x00\xc0\x3f' + b'\x00\x00\x00\x80'
  )  # fmt: skip
  found = export.fingerprint({'n': 'é', 'k': [1, 2]}, leaves)
  assert found == hashlib.sha256(text).hexdigest()


def a_flipped_bit(file):
  data = bytearray(file.read_bytes())
  data[-5] ^= 1
  file.write_bytes(data)


def another_name(file):
  leaves = load_file(file)
  leaves['more'] = leaves.pop('params/decoder/head/bias')
  save_file(leaves, file)


@pytest.mark.parametrize(
  'damage, words',
  [
    (a_flipped_bit, 'fingerprint'),
    (another_name, 'missing params/decoder/head/bias.*unknown more'),
  ],
)
def test_damage_is_named(damage, words, tmp_path):
  """More of it in `tests/test_bad_inputs.py`."""
  path = saved('fsq-cosmos', tmp_path)
  damage(path / export.WEIGHTS)
  with pytest.raises(UserError, match=words):
    vqrae_jax.load_tokenizer(path)


@pytest.mark.parametrize('name', ('thesis.txt', 'config.json'))
def test_what_is_no_tokenizer_is_not_replaced(name, tmp_path):
  """A folder of something else, and a tokenizer with something beside it."""
  other, tokenizer = tmp_path / 'other', saved('fsq-cosmos', tmp_path)
  other.mkdir()
  (other / name).write_text('{"model_type": "x"}')
  (tokenizer / 'notes.txt').write_text('mine')
  for path, words in (other, f'{name}|no tokenizer'), (tokenizer, 'notes.txt'):
    with pytest.raises(UserError, match=f'is not replaced: .*({words})'):
      export.save_tokenizer(*made('fsq-cosmos'), path)
  assert (other / name).read_text() == '{"model_type": "x"}'


def test_a_failed_write_leaves_the_old_tokenizer(tmp_path, monkeypatch):
  """And nothing beside it."""
  path = saved('fsq-cosmos', tmp_path)
  before = (path / export.WEIGHTS).read_bytes()
  full = mock.Mock(side_effect=OSError('disk full'))
  monkeypatch.setattr('safetensors.numpy.save_file', full)
  with pytest.raises(OSError, match='disk full'):
    export.save_tokenizer(*made('fsq-cosmos'), path)
  assert (path / export.WEIGHTS).read_bytes() == before
  assert [*tmp_path.iterdir()] == [path]
  vqrae_jax.load_tokenizer(path)


def test_a_link_stays(tmp_path):
  path = saved('fsq-cosmos', tmp_path)
  (link := tmp_path / 'link').symlink_to(path)
  export.save_tokenizer(*made('fsq-cosmos'), link)
  assert link.is_symlink() and {*tmp_path.iterdir()} == {path, link}
  vqrae_jax.load_tokenizer(path)


def test_a_checkpoint_of_pytorch_is_to_be_converted(tmp_path):
  (tmp_path / 'm.pt').write_bytes(b'PK')
  with pytest.raises(UserError, match=r'convert .*vqrae_torch:.*m\.pt'):
    export.load_tokenizer(tmp_path / 'm.pt')
