"""A folder of what a command may be pointed at by mistake."""

import json
import pathlib
import re
import shutil
import sys
from unittest import mock

import jax
import pytest

from tests import runs, tiny
from tests.data import makers
from tests.train import pieces
from vqrae_jax import cli, export, sharding
from vqrae_jax.train import loop

# A key made of a seed, an array laid on a device: single operations, and the
# first of a process compiles them.
SINGLE = {f'jit({n})' for n in (
  '_threefry_seed', 'broadcast_in_dim', 'copy', 'stage',
)}  # fmt: skip


def config():
  """Two steps on three images."""
  return runs.plain(
    'photos',
    model=tiny.model(depth=1),
    losses=tiny.LOSSES['fsq-cosmos'],
    schedules=(('encoder/embed/.*', None), ('.*', dict(lr=1e-3))),
    duration=2,
  )


# The encoder, whose embedding alone is frozen in `config`.
FROZEN = dict(schedules=(('encoder/.*', None), ('.*', dict(lr=1e-3))))
BROKEN = {name: data for name, (data, _) in makers.BROKEN.items()}


def good(folder: pathlib.Path) -> list[str]:
  """Images of every kind that is converted, all below `folder`."""
  made = makers.GOOD | {f'{i}.png': makers.png(i) for i in range(6)}
  for name, data in made.items():
    (folder / name).write_bytes(data)
  return [*made]


def _tokenizers(root, good):
  """Copies of `good`, each with one file replaced."""
  config, weights = good / export.CONFIG, good / export.WEIGHTS
  edits = {
    'no-model': dict(model=3),
    'odd-model': dict(model={'encodr': {}}),
    'newer': dict(format_version=9),
    'encoder': dict(encoder={}),
    'edited': dict(fingerprint=64 * '0'),
    'another-model': dict(model=tiny.model('vq-ema')),
  }
  made = {
    'empty-config': (config, b''),
    'list-config': (config, b'[1, 2]'),
    'cut-weights': (weights, weights.read_bytes()[:-500]),
    'empty-weights': (weights, b''),
  }
  values = json.loads(config.read_text())
  for name, keys in edits.items():
    made[name] = config, json.dumps(values | keys).encode()
  for name, (file, data) in made.items():
    shutil.copytree(good, root / name)
    (root / name / file.name).write_bytes(data)
  shutil.copytree(good, root / 'no-weights')
  (root / 'no-weights' / weights.name).unlink()


def _runs(root):
  run = root / 'run'
  data = dict(source=str(root / 'photos'), image_size=16)
  one = sharding.make_mesh(devices=jax.devices()[:1])
  with mock.patch.object(sharding, 'make_mesh', lambda *_, **__: one):
    loop.train(config() | dict(data=data), run)
  shutil.copytree(run / 'tokenizer', root / 'tokenizer')
  for name in ('torn', 'another', 'headless', 'unbegun', 'blocked'):
    shutil.copytree(run, root / name)
  for path in (root / 'torn' / 'checkpoints').glob('0*/**/*'):
    if path.is_file():
      path.write_bytes(b'')
  pieces.edit_manifests(
    root / 'another', lambda m: m['frozen']['params'].update(sha256='0')
  )
  (root / 'headless' / 'config.json').unlink()
  for name in ('unbegun', 'blocked'):
    shutil.rmtree(root / name / 'checkpoints')
  (root / 'unbegun' / 'checkpoints').mkdir()
  shutil.rmtree(root / 'unbegun' / 'tokenizer')
  (root / 'blocked' / 'checkpoints').write_text('a file')
  (root / 'foreign' / 'tokenizer').mkdir(parents=True)
  (root / 'foreign' / 'tokenizer' / 'tokenizer.json').write_text('{}')
  export.save_tokenizer(*tiny.built(tiny.model('vq-ema')), root / 'other')


def make(root: pathlib.Path) -> pathlib.Path:
  """Fills `root`; returns it."""
  for folder in ('photos', 'hollow', 'bad', 'tok'):
    (root / folder).mkdir(parents=True)
  for i in range(3):
    (root / 'photos' / f'{i}.png').write_bytes(makers.png(i))
  (root / 'dot.png').write_bytes(makers.png(0, 3, 3))
  for name, data in BROKEN.items():
    (root / 'bad' / name).write_bytes(data)
  foreign = [b'a pickle, or what else', makers.example(label=3)]
  makers.array_record(root / 'foreign.array_record', foreign)
  for name, text in {
    'notes.txt': 'words\n',
    'mine.py': 'def get_config(keys=""):\n'
    f'  return {config()!r} | eval(f"dict({{keys}})")\n',
    'broken.py': 'def get_config(:\n',
    'fails.py': 'def get_config():\n  return 1 / 0\n',
    'none.py': 'config = {}\n',
    'list.py': 'def get_config():\n  return [1]\n',
  }.items():
    (root / name).write_text(text)
  _runs(root)
  _tokenizers(root / 'tok', root / 'tokenizer')
  return root


def answer(place, monkeypatch, capsys, main, argv: list[str]) -> str:
  """The error line of a command that must fail cleanly, and write nothing."""
  monkeypatch.chdir(place)
  monkeypatch.setattr(sys, 'argv', ['', *argv])

  def times():
    return {p: p.lstat().st_mtime_ns for p in place.rglob('*') if p.is_file()}

  before = times()
  with pytest.raises(SystemExit) as stop:
    cli.run(main)
  err = capsys.readouterr().err
  *others, last = err.splitlines()
  assert stop.value.code == 2
  assert last.startswith('error: ') and err.endswith('\n')
  assert all(re.match(r'[IW]\d{4} ', line) for line in others), err
  assert times() == before
  return last
