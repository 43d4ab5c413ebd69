"""`examples/maskgit` and `examples/ar` on a dump with structure, and
`examples/onnx_export.py` on stand-ins."""

import json
import pathlib
import runpy
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

from tests import runs, tiny
from vqrae_jax import export
from vqrae_jax.errors import UserError, read_json
from vqrae_jax.tokens import Shard, Writer

CODES, CLASSES, EACH, SHARDS = 8, 2, 120, 2  # of the tokenizer's 64 codes
EXAMPLES = runs.ROOT / 'examples'
MAINS = {
  name: runpy.run_path(EXAMPLES / name / 'train.py')['main']
  for name in ('maskgit', 'ar')
}
both = pytest.mark.parametrize('name', MAINS)


@pytest.fixture(scope='module')
def here(tmp_path_factory):
  """A tokenizer, and a dump of images that each are of one code alone, one of
  the codes of their class: even ones and odd ones."""
  root = tmp_path_factory.mktemp('examples')
  tokenizer = tiny.built(tiny.model('vq-ema', depth=1))
  export.save_tokenizer(*tokenizer, root / 'tok')
  shape = tokenizer[0].index_shape(16, 16)
  config = dict(
    fingerprint=read_json(root / 'tok' / 'config.json')['fingerprint'],
    format='array_record',
    shard_count=SHARDS,
    codebook_size=tokenizer[0].codebook_size,
    index_shape=shape,
    image_size=(16, 16),
    flip=True,
  )
  writer = Writer(root / 'tokens', config)
  for number in range(SHARDS):
    codes = np.random.default_rng(number).integers(0, CODES, EACH)
    shard = Shard(
      number,
      [f'{number}/{i}' for i in range(EACH)],
      [int(code) % CLASSES for code in codes],
      [*range(EACH)],
      [[[0.0, 0.0, 16.0, 16.0]]] * EACH,
    )
    tokens = np.broadcast_to(
      codes[:, None, None, None].astype(np.int32), (EACH, 2, *shape)
    )
    writer.write(shard, tokens, f'shard {number}')
  assert writer.finish()
  return root


def run(name, here, out, *argv):
  """(losses.json, samples.npy) of a run."""
  MAINS[name]([
    f'--tokens={here / "tokens"}', f'--tokenizer={here / "tok"}',
    f'--out={out}', '--width=64', '--batch_size=16', *argv,
  ])  # fmt: skip
  return json.loads((out / 'losses.json').read_text()), np.load(
    out / 'samples.npy'
  )


@both
def test_a_few_steps(name, here, tmp_path, capsys):
  few = ['--sample_steps=3'] if name == 'maskgit' else []
  found, samples = run(
    name, here, tmp_path, '--depth=1', '--steps=30', '--lr=3e-3', *few
  )
  rows = found['steps']
  assert [row['step'] for row in rows] == [*range(3, 31, 3)]
  assert np.isfinite([[row['loss'], row['held_out']] for row in rows]).all()
  assert rows[0]['loss'] == pytest.approx(np.log(64), abs=0.1)
  assert rows[-1]['loss'] < rows[0]['loss'] - 0.5
  assert rows[-1]['held_out'] < rows[0]['held_out'] - 0.5
  # All codes of the dump are about as frequent, at each position.
  assert found['uniform'] == pytest.approx(np.log(64))
  for order0 in (found['order0'], found['order0_position']):
    assert np.log(CODES) - 0.05 < order0 <= np.log(CODES)
  each = len(samples) // CLASSES
  assert samples.shape == (CLASSES * each, 4, 4)
  assert samples.min() >= 0 and samples.max() < 64
  with Image.open(tmp_path / 'samples.png') as picture:
    assert picture.size == (16 * each, 16 * CLASSES)
  assert 'order0' in capsys.readouterr().out


@both
def test_what_is_wrong_is_one_line(name, here, tmp_path):
  for argv, word in (
    ((), '--tokens'),
    ((f'--tokens={here}', f'--tokenizer={here / "tok"}', '--out=o'), 'no dump'),
    (('--tokens=a', '--tokenizer=b', '--out=o', '--width=100'), 'width'),
  ):
    with pytest.raises(UserError, match=word):
      MAINS[name]([*argv])
  another = tmp_path / 'another'
  export.save_tokenizer(
    *tiny.built(tiny.model('vq-ema', depth=1), seed=2), another
  )
  with pytest.raises(UserError, match='another tokenizer'):
    MAINS[name]([
      f'--tokens={here / "tokens"}', f'--tokenizer={another}',
      f'--out={tmp_path / "out"}',
    ])  # fmt: skip


@pytest.mark.slow
@both
def test_samples_have_the_structure(name, here, tmp_path):
  # One token in the first step of sampling, the surest ones after it.
  cool = ['--temperature=0.5'] if name == 'maskgit' else []
  found, samples = run(
    name, here, tmp_path, '--depth=2', '--steps=600', '--guidance=1.5', *cool
  )
  # Of an image one token is free, among the codes of its class; in random
  # order all tokens but the first are known.
  exact = np.log(CODES / CLASSES) / 16
  last = found['steps'][-1]['held_out']
  assert exact - 0.03 < last < exact + 0.06 < found['order0'] / 4
  rows = samples.reshape(CLASSES, -1, 16)
  alike = (rows == rows[..., :1]).all(-1)
  right = rows[..., 0] % CLASSES == np.arange(CLASSES)[:, None]
  assert (alike & right & (rows[..., 0] < CODES)).mean() >= 0.9
  assert all(len(np.unique(codes)) > 1 for codes in rows[..., 0])


@pytest.mark.parametrize('kind', ('vq-ema', 'simvq-cosine'))
def test_onnx_without_its_packages(kind, tmp_path, monkeypatch, capsys):
  """What is converted has no loop and gives the same, at any batch."""

  def to_onnx(function, shapes, model_name):
    exported = jax.export.export(jax.jit(function))(*shapes)
    assert 'while' not in exported.mlir_module()
    return types.SimpleNamespace(SerializeToString=exported.serialize)

  def session(path, *_, **__):
    data = bytearray(pathlib.Path(path).read_bytes())
    call = jax.jit(jax.export.deserialize(data).call)
    return types.SimpleNamespace(
      get_inputs=lambda: [types.SimpleNamespace(name='x')],
      run=lambda _, inputs: [np.asarray(call(inputs['x']))],
    )

  converter = types.SimpleNamespace(to_onnx=to_onnx)
  runtime = types.SimpleNamespace(
    SessionOptions=types.SimpleNamespace, InferenceSession=session
  )
  monkeypatch.setitem(sys.modules, 'jax2onnx', converter)
  monkeypatch.setitem(sys.modules, 'onnxruntime', runtime)
  main = runpy.run_path(str(EXAMPLES / 'onnx_export.py'))['main']
  export.save_tokenizer(*tiny.built(tiny.model(kind)), tmp_path / 'tok')
  main(str(tmp_path / 'tok'), str(tmp_path / 'out'))
  out = capsys.readouterr().out
  assert 'batch 1: 100.00%' in out and 'batch 3: 100.00%' in out
