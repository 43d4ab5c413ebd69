"""A dump on disk: workers, kills, damage, and reading it."""

import dataclasses
import json
import multiprocessing
import pathlib
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import grain
import numpy as np
import pytest

from tests import tiny
from vqrae_jax.errors import UserError
from vqrae_jax.tokens import Shard, Writer, dump, open_dump

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYOUT = dict(
  codebook_size=9, index_shape=(2, 3), image_size=(16, 16), flip=True, offset=1
)
SHARDS, IMAGES = 6, 4


def config(**keys):
  own = dict(fingerprint='f' * 64, format='array_record', shard_count=SHARDS)
  return own | LAYOUT | dict(data='here', versions={}) | keys


def content(number):
  """(images of a shard of which one was skipped, their indices)."""
  kept = [i for i in range(IMAGES) if i != number % IMAGES]
  rng = np.random.default_rng(number)
  shard = Shard(
    number,
    [f'{number}/{i}.png' for i in kept],
    [i if i else None for i in kept],
    kept,
    [[[0.0, 0.0, 20.0, 20.0]]] * len(kept),
    number * IMAGES,
  )
  return shard, rng.integers(0, 9, (len(kept), 2, 2, 3), dtype=np.int32)


def write(writer, numbers=range(SHARDS)):
  for number in numbers:
    skipped = [(f'{number}/{number % IMAGES}.png', 'damaged')]
    writer.write(*content(number), f'shard {number}', skipped)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp('dump') / 'tokens'
  writer = Writer(folder, config())
  write(writer)
  assert writer.finish() is not None
  return folder


def test_rows_are_views_of_images(finished):
  dump = open_dump(finished, 'f' * 64)
  rows = list(dump)
  assert len(rows) == len(dump) == dump.info['rows'] == SHARDS * 3 * 2
  want = [content(i) for i in range(SHARDS)]
  np.testing.assert_array_equal(
    [row['tokens'] for row in rows],
    np.concatenate([tokens for _, tokens in want]).reshape(-1, 2, 3),
  )
  keys = [key for shard, _ in want for key in shard.keys]
  assert [row['key'] for row in rows] == list(np.repeat(keys, 2))
  labels = [x or -1 for shard, _ in want for x in shard.labels]
  assert [row['label'] for row in rows] == list(np.repeat(labels, 2))
  assert [row['view'] for row in rows] == [0, 1] * 3 * SHARDS
  assert dump[-1]['key'] == keys[-1]
  with pytest.raises(IndexError):
    dump[len(dump)]
  with pytest.raises(IndexError, match=f'of {SHARDS}'):
    dump.shard(SHARDS)
  with pytest.raises(TypeError, match='integer'):
    dump[0:2]
  assert dump.info['tokens'] == len(dump) * 6
  assert dump.info['skipped'][2] == ['shard 2', '2/2.png', 'damaged']


def test_grain_reads_it_in_any_order(finished):
  dump = pickle.loads(pickle.dumps(open_dump(finished)))
  data = grain.MapDataset.source(dump).shuffle(seed=1).batch(6)
  batches = list(data)
  assert batches[0]['tokens'].shape == (6, 2, 3)
  keys = np.concatenate([batch['key'] for batch in batches])
  assert sorted(keys) == sorted(row['key'] for row in dump)


def test_workers_in_any_order_write_the_same(finished, tmp_path):
  """Three of them, of which one did part of its share twice, and one that was
  killed before them."""
  folder = tmp_path / 'tokens'
  for numbers in ((5, 2), (1, 4, 1), (3, 0)):
    writer = Writer(folder, config(data='there', versions=dict(jax='9')))
    assert writer.finish() is None
    with pytest.raises(UserError, match=r'not finished: \d of 6'):
      open_dump(folder)
    write(writer, numbers)
    (folder / '.00005.dead.writing').mkdir(exist_ok=True)
    (folder / '.00005.dead.writing' / 'half').touch()
    (folder / '.dead.writing').touch()
  assert writer.finish() == writer.finish()
  edited = dict(data='there', versions=dict(jax='9'))
  found, want = tiny.files(folder), tiny.files(finished)
  for name in ('config.json', 'dataset.json'):
    a, b = json.loads(found.pop(name)), json.loads(want.pop(name))
    assert a == b | edited
  assert found == want


def test_two_workers_may_start_at_once(tmp_path, monkeypatch):
  """One begins the dump while the other looks whether there is one."""
  mkdir = pathlib.Path.mkdir

  def slow(folder, **keys):
    mkdir(folder, **keys)
    monkeypatch.setattr(pathlib.Path, 'mkdir', mkdir)
    Writer(folder, config())

  monkeypatch.setattr(pathlib.Path, 'mkdir', slow)
  assert Writer(tmp_path / 'tokens', config()).finished == set()


def test_two_workers_may_write_the_same_shard(finished, tmp_path, monkeypatch):
  """The one that is behind, and whose files the other sweeps, goes on."""
  folder = tmp_path / 'tokens'
  ahead, behind = (Writer(folder, config()) for _ in range(2))
  replace = dump.os.replace

  def slow(source, target):
    monkeypatch.setattr(dump.os, 'replace', replace)
    write(ahead)
    assert ahead.finish()
    replace(source, target)

  monkeypatch.setattr(dump.os, 'replace', slow)
  write(behind, [2])
  assert tiny.files(folder) == tiny.files(finished)
  (folder / 'shards' / '00002.array_record').unlink()
  with pytest.raises(UserError, match='finished/00002.json and run tokenize'):
    open_dump(folder).shard(2)


def work(folder):
  writer = Writer(folder, config(format='megatron', eod=0))
  for number in range(SHARDS):
    if number not in writer.finished:
      write(writer, [number])
      time.sleep(0.02)
  writer.finish()


def finished_in(folder):
  return [*folder.glob('finished/*')]


def test_a_killed_worker_leaves_nothing_behind(tmp_path):
  """Ten times, at any moment after its imports: bytes and listing are those
  of a worker that was not killed. Of two files a shard."""
  work(tmp_path / 'one')
  folder, draw, killed = tmp_path / 'tokens', random.Random(0), 0
  processes = multiprocessing.get_context('forkserver')
  processes.set_forkserver_preload([__name__])  # imported once for all
  while killed < 10:
    worker = processes.Process(target=work, args=(folder,))
    worker.start()
    before = len(finished_in(folder))
    while worker.is_alive():
      if [*folder.glob('.0*.writing')] or len(finished_in(folder)) > before:
        break
      time.sleep(0.001)
    time.sleep(draw.random() * 0.02)
    worker.kill()
    worker.join()
    if worker.exitcode == 0:  # it came to its end
      for path in finished_in(folder):
        path.unlink()
    else:
      assert worker.exitcode == -signal.SIGKILL
      killed += 1
  worker = processes.Process(target=work, args=(folder,))
  worker.start()
  worker.join()
  assert worker.exitcode == 0
  assert tiny.files(folder) == tiny.files(tmp_path / 'one')


@pytest.mark.parametrize(
  'keys, words',
  [
    (dict(fingerprint='e' * 64), 'fingerprint'),
    (dict(offset=2), 'offset=1, not 2'),
    (dict(format='jsonl'), 'format="array_record", not "jsonl"'),
    (dict(listing='abc'), 'other files, of --data=here'),
  ],
)
def test_another_dump_is_refused(finished, keys, words):
  before = tiny.files(finished)
  with pytest.raises(UserError, match=words):
    Writer(finished, config() | keys)
  assert tiny.files(finished) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
  (tmp_path / 'mine.txt').touch()
  with pytest.raises(UserError, match='--out'):
    Writer(tmp_path, config())
  with pytest.raises(UserError, match='config.json'):
    open_dump(tmp_path)
  (tmp_path / 'config.json').write_text(
    '{"format_version": 1}'
  )  # a tokenizer's
  with pytest.raises(UserError, match='--out.*no dump'):
    Writer(tmp_path, config())
  with pytest.raises(UserError, match='no dump'):
    open_dump(tmp_path)


def test_damage_is_named(finished, tmp_path):
  folder = tmp_path / 'tokens'
  writer = Writer(folder, config())
  write(writer)
  writer.finish()
  with pytest.raises(UserError, match='fingerprint is ffff'):
    open_dump(folder, '0' * 64)
  path = folder / 'shards' / '00002.array_record'
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  dump = open_dump(folder)
  dump[0]
  with pytest.raises(UserError, match=r'shard 2 .*damaged.*00002\.json'):
    dump[2 * 3 * 2]
  path.unlink()
  with pytest.raises(UserError, match=r'00002\.array_record'):
    dump[2 * 3 * 2]


@pytest.mark.parametrize(
  'name, text, words',
  (
    ('dataset.json', lambda x: dict(x, rows=7), 'all rows'),
    ('dataset.json', lambda x: dict(x, shards=x['shards'][1:]), 'all shards'),
    ('dataset.json', lambda x: {**x, 'shards': 3}, 'dataset.json'),
    ('dataset.json', lambda x: {'rows': 3}, 'dataset.json'),
    ('dataset.json', 9000 * '[', 'dataset.json'),
    ('finished/00000.json', '{}', '00000.json'),
    ('finished/00000.json', lambda x: dict(x, labels=[]), 'as long'),
    ('config.json', lambda x: dict(shard_count=6, format_version=1), 'None'),
    ('codebook.npy', 'x', 'codebook.npy'),
    ('codebook.npy', None, 'codebook.npy'),
  ),
)
def test_damaged_notes_are_named(finished, tmp_path, name, text, words):
  folder = shutil.copytree(finished, tmp_path / 'tokens')
  (folder / 'finished' / 'notes.json').touch()
  if callable(text):
    text = json.dumps(text(json.loads((folder / name).read_bytes())))
  if text is not None:
    (folder / name).write_text(text)
  with pytest.raises(UserError, match=words) as error:
    opened = open_dump(folder, 'f' * 64)
    _ = opened[0], opened.codebook()
  assert '\n' not in str(error.value)


def test_a_stray_file_is_no_shard(finished, tmp_path):
  folder = shutil.copytree(finished, tmp_path / 'tokens')
  (folder / 'finished' / 'notes.json').touch()
  assert Writer(folder, config()).finished == {*range(SHARDS)}
  (folder / 'dataset.json').unlink()
  shutil.rmtree(folder / 'finished')
  with pytest.raises(UserError, match='not finished: 0 of 6'):
    open_dump(folder)


@pytest.mark.parametrize('name', ('array_record', 'jsonl', 'webdataset'))
def test_what_a_format_cannot_hold(tmp_path, name):
  writer = Writer(tmp_path / 'tokens', config(format=name))
  shard, tokens = content(1)
  tokens[1, 1, 0, 2] = -1
  if name == 'webdataset':
    for number in range(SHARDS):
      writer.write(dataclasses.replace(shard, number=number), tokens, 'x')
    writer.finish()
    row = open_dump(tmp_path / 'tokens')[3]
    np.testing.assert_array_equal(row['tokens'], tokens[1, 1])
    return
  with pytest.raises(UserError, match=rf'{name} cannot hold -1'):
    writer.write(shard, tokens, 'x')
  if name == 'jsonl':
    with pytest.raises(UserError, match='1/0.png has no label'):
      writer.write(shard, np.abs(tokens), 'x')
  assert not writer.finished


def test_keys_that_would_be_one_member_are_refused(tmp_path):
  writer = Writer(tmp_path / 'tokens', config(format='webdataset'))
  shard, tokens = content(1)
  shard = Shard(**(vars(shard) | dict(keys=['a.png', 'b.png', 'a.jpg'])))
  with pytest.raises(UserError, match=r'a\.npy'):
    writer.write(shard, tokens, 'x')


def test_readers_need_no_jax(finished):
  code = (
    'import sys; from vqrae_jax import tokens; '
    f'print(tokens.open_dump({str(finished)!r})[3]["view"]); '
    'assert not {"jax", "flax", "grain"} & set(sys.modules)'
  )
  out = subprocess.check_output([sys.executable, '-c', code], cwd=ROOT)
  assert out == b'1\n'
