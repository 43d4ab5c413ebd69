"""What an earlier version wrote opens and gives what it gave then."""

import pathlib
import re
import runpy

import jax
import numpy as np
import pytest

import vqrae_jax
from vqrae_jax import export
from vqrae_jax.export import bundle
from vqrae_jax.ops import trees
from vqrae_jax.tokens import FORMATS, open_dump

ROOT = pathlib.Path(__file__).resolve().parent
VERSIONS = sorted(path.name for path in (ROOT / 'golden').glob('v*'))


@pytest.fixture(params=VERSIONS)
def folder(request):
  return ROOT / 'golden' / request.param


@pytest.fixture
def expected(folder):
  """(images, their indices, pixels) as they were when it was written."""
  with np.load(folder / 'expected.npz') as file:
    return file['images'], file['indices'], file['pixels']


def check(encode, decode, expected):
  """Indices exactly; pixels as near as another CPU computes them."""
  images, indices, pixels = expected
  np.testing.assert_array_equal(encode(images), indices)
  np.testing.assert_allclose(decode(indices), pixels, atol=1e-5)


def test_a_tokenizer(folder, expected):
  tokenizer, variables = vqrae_jax.load_tokenizer(folder / 'tokenizer')

  def of(function):
    program = jax.jit(function, static_argnums=0)
    return lambda x: program(tokenizer, variables, x)

  check(
    of(vqrae_jax.encode_to_indices),
    of(vqrae_jax.decode_from_indices),
    expected,
  )


def test_a_bundle(folder, expected):
  """By its own loader, after its hashes."""
  *_, card = bundle.load_bundle(folder / 'bundle')
  load = runpy.run_path(str(folder / 'bundle' / 'load.py'))['load']
  check(*load(), expected)
  _, variables = vqrae_jax.load_tokenizer(folder / 'tokenizer')
  with np.load(folder / 'bundle' / bundle.VARIABLES) as file:
    assert {*file} == {*trees.flatten(variables)}
  _, indices, pixels = expected
  for name, x in (('indices', indices), ('decoded', pixels)):
    low, high = card[name]['range']
    assert card[name]['dtype'] == str(x.dtype)
    assert card[name]['shape'][1:] == [*x.shape[1:]]
    assert low <= x.min() and x.max() <= high


@pytest.mark.parametrize('name', FORMATS)
def test_a_dump(folder, expected, name):
  if extra := dict(parquet='pyarrow', hdf5='h5py').get(name):
    pytest.importorskip(extra)
  tokenizer, variables = vqrae_jax.load_tokenizer(folder / 'tokenizer')
  fingerprint = export.fingerprint_of(tokenizer, variables)
  rows = [*open_dump(folder / 'tokens' / name, fingerprint)]
  _, indices, _ = expected
  for view, want in enumerate((indices, tokenizer.codebook_size - 1 - indices)):
    found = np.stack([row['tokens'] for row in rows[view::2]])
    np.testing.assert_array_equal(found, want)
  assert [row['label'] for row in rows] == [0, 0, 1, 1, 2, 2]
  assert [row['key'] for row in rows[::2]] == ['0.png', '1.png', '2.png']


def test_the_recipe_of_the_fingerprint(folder, monkeypatch, tmp_path, capsys):
  """As docs/formats.md writes it, without this package."""
  text = (ROOT.parent / 'docs' / 'formats.md').read_text()
  (code,) = re.findall(r'```python\n(.*?)```', text, re.S)
  named = tmp_path / re.search(r"Path\('(.*?)'\)", code)[1]
  named.parent.mkdir(parents=True)
  named.symlink_to(folder / 'tokenizer')
  monkeypatch.chdir(tmp_path)
  exec(code, {})
  want = bundle.read_json(folder / 'bundle' / bundle.CARD)['fingerprint']
  assert capsys.readouterr().out.split() == [want, 'True']
