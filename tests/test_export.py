"""Tokenizers on disk: round trips, fingerprints, damage."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vqrae_jax
from tests import test_stability as stability
from tests import tiny
from vqrae_jax import export, sharding
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees

KINDS = [*tiny.QUANTIZERS, 'none']


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


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_opened_is_what_was_saved(kind, saved):
  tokenizer, variables = made(kind)
  path = saved(kind)
  opened, opened_variables = vqrae_jax.load_tokenizer(path)
  assert opened == tokenizer
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


def test_the_baked_table_computes_the_same(saved):
  tokenizer, variables = made('simvq-cosine')
  _, opened = vqrae_jax.load_tokenizer(saved('simvq-cosine'))
  run = jax.jit(functools.partial(vqrae_jax.reconstruct, tokenizer))
  before, after = (run(v, tiny.images(3)) for v in (variables, opened))
  np.testing.assert_array_equal(
    before.quantizer.indices, after.quantizer.indices
  )
  np.testing.assert_allclose(before.images, after.images, atol=1e-5)


@pytest.mark.parametrize('kind', ('vq-ema', 'simvq-l2', 'simvq-cosine'))
def test_the_table_is_baked(kind, saved):
  tokenizer, variables = made(kind)
  leaves = load_file(saved(kind) / export.WEIGHTS)
  want = tokenizer.apply(variables, method='baked_codebook')['codes']
  np.testing.assert_allclose(
    leaves['codebook/quantizer/codes'], want, atol=1e-6
  )
  assert not any(n.endswith(('counts', 'sums')) for n in leaves)
  _, opened = vqrae_jax.load_tokenizer(saved(kind))
  program = jax.make_jaxpr(
    functools.partial(vqrae_jax.decode_from_indices, tokenizer)
  )(opened, np.zeros((1, 4, 4), np.int32))
  table = f'f32[{tokenizer.codebook_size},'
  dots = [e for e in program.jaxpr.eqns if e.primitive.name == 'dot_general']
  assert not any(table in str(e) for e in dots)


def test_run_options_change_neither_file_nor_fingerprint(tmp_path):
  _, variables = made('fsq-cosmos')
  prints = {
    export.save_tokenizer(
      vqrae_jax.build_tokenizer(
        tiny.model('fsq-cosmos', 1, post_quant=dict(kernel=3), **options)
      ),
      variables,
      tmp_path / f'{i}',
    )
    for i, options in enumerate(
      ({}, dict(dtype='bfloat16'), dict(scan=False, remat=True))
    )
  }
  assert len(prints) == 1
  tokenizer, _ = vqrae_jax.load_tokenizer(tmp_path / '0', dtype='bfloat16')
  assert tokenizer.encoder_spec.vit.dtype == 'bfloat16'
  assert tokenizer.quantizer.dtype == 'bfloat16'


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


@pytest.mark.parametrize(
  'layout',
  [pytest.param(n, marks=pytest.mark.slow) for n in ('dp', 'fsdp')]
  + ['fsdp+tp'],
)
def test_opens_on_any_devices(layout, saved):
  """Variables laid on eight devices give the indices of one."""
  tokenizer, variables = vqrae_jax.load_tokenizer(saved('simvq-cosine'))
  images = tiny.images(8)
  encode = functools.partial(vqrae_jax.encode_to_indices, tokenizer)
  want = jax.jit(encode)(variables, images)
  mesh = sharding.make_mesh(layout, tensor=2 if 'tp' in layout else 1)
  with jax.set_mesh(mesh):
    placed = jax.device_put(variables, sharding.shardings_for(variables, mesh))
    found = jax.jit(encode)(
      placed, sharding.place_batch({'x': images}, mesh)['x']
    )
  margin, scale = stability.margins(tokenizer, variables, images)
  moved = (np.asarray(found) != np.asarray(want)).ravel()
  assert not (moved & (margin > 1e-4 * scale)).any()


def edited(name, change):
  """(path) -> None: the bytes of a file, changed; None removes it."""

  def edit(path):
    data = change((path / name).read_bytes())
    (path / name).unlink() if data is None else (path / name).write_bytes(data)

  return edit


def releaved(change):
  """(path) -> None: the leaves of the weights, changed."""

  def edit(path):
    leaves = load_file(path / export.WEIGHTS)
    change(leaves)
    save_file(leaves, path / export.WEIGHTS)

  return edit


CONFIG = functools.partial(edited, export.CONFIG)
WEIGHTS = functools.partial(edited, export.WEIGHTS)
BIAS = 'params/decoder/head/bias'


@pytest.mark.parametrize(
  'damage, words',
  [
    (shutil.rmtree, 'no tokenizer at'),
    (CONFIG(lambda b: None), r'config\.json'),
    (WEIGHTS(lambda b: None), r'model\.safetensors'),
    (CONFIG(lambda b: b'{'), r'config\.json is damaged'),
    (CONFIG(lambda b: b'[]'), r'config\.json is damaged'),
    (CONFIG(lambda b: b'[' * 100_000), r'config\.json is damaged'),
    (CONFIG(lambda b: b'\xff\xfe{}'), r'config\.json is damaged'),
    (
      CONFIG(lambda b: b.replace(b'_version": 1', b'_version": 9')),
      'format version 9',
    ),
    (CONFIG(lambda b: b.replace(b'"levels"', b'"levles"')), '"levels"'),
    (WEIGHTS(lambda b: b[:-100]), 'cannot be read'),
    (WEIGHTS(lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:]), 'fingerprint'),
    (releaved(lambda leaves: leaves.pop(BIAS)), f'missing {BIAS}'),
    (releaved(lambda x: x.update({f'{BIAS}s': x[BIAS]})), f'unknown {BIAS}s'),
    (
      releaved(lambda x: x.update({BIAS: x[BIAS][:-1].copy()})),
      r'head/bias is \(47,\), not \(48,\)',
    ),
  ],
)
def test_damage_is_named(damage, words, saved):
  path = saved('fsq-cosmos')
  damage(path)
  with pytest.raises(vqrae_jax.UserError, match=words):
    vqrae_jax.load_tokenizer(path)


@pytest.mark.parametrize(
  'name, text', [('thesis.txt', 'mine'), ('config.json', '{"model_type": "x"}')]
)
def test_a_folder_of_others_is_not_replaced(name, text, tmp_path):
  (tmp_path / name).write_text(text)
  with pytest.raises(vqrae_jax.UserError, match='is not replaced'):
    export.save_tokenizer(*made('fsq-cosmos'), tmp_path)
  assert (tmp_path / name).read_text() == text


def test_a_tokenizer_with_other_files_is_not_replaced(saved):
  path = saved('fsq-cosmos')
  (path / 'notes.txt').write_text('mine')
  with pytest.raises(vqrae_jax.UserError, match=r'notes\.txt'):
    export.save_tokenizer(*made('fsq-cosmos'), path)


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


def test_names_on_disk_are_the_leaves_stacked(saved):
  leaves = load_file(saved('fsq-cosmos') / export.WEIGHTS)
  _, variables = made('fsq-cosmos')
  assert set(leaves) == set(trees.flatten(variables))
  name = 'params/encoder/transformer/blocks/mlp/fc1/kernel'
  assert leaves[name].shape == (1, 32, 48)


def test_a_checkpoint_of_pytorch_is_to_be_converted(tmp_path):
  (tmp_path / 'm.pt').write_bytes(b'PK')
  with pytest.raises(UserError, match=r'convert .*vqrae_torch:.*m\.pt'):
    export.load_tokenizer(tmp_path / 'm.pt')
