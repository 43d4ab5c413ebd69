"""What goes wrong without anyone's mistake: unreadable images, damaged logs,
non-finite values, full disks. A run goes on and counts, or says what to do."""

import json
import shutil
from unittest import mock

import pytest

from tests import bad, runs
from vqrae_jax import cli, reconstruct_images
from vqrae_jax.data.pipeline import Augment, TrainBatches
from vqrae_jax.data.sources import open_source
from vqrae_jax.errors import UserError
from vqrae_jax.train import loop

pytestmark = pytest.mark.usefixtures('one_device')


def test_what_is_skipped_and_what_is_converted(place, tmp_path):
  """One of each broken kind beside good ones of every mode: all counted."""
  photos = tmp_path / 'photos'
  shutil.copytree(place / 'bad', photos)
  count, every = len(bad.BROKEN) + len(bad.good(photos)), 4
  assert len(list(photos.iterdir())) == count
  batch = count // every  # of an epoch's steps: each image comes once
  assert batch * every == count
  data = dict(source=str(photos), image_size=16, max_skipped=1.0)
  config = bad.config() | dict(data=data, batch_size=batch, duration=every)
  figures = loop.train(config, tmp_path / 'run')
  source = open_source(str(photos))
  batches = TrainBatches(source, [Augment((16, 16))], batch_size=batch, seed=0)
  skipped = sum(int(batches.batch(s)['skipped'].sum()) for s in range(every))
  assert figures['skipped'] == skipped >= len(bad.BROKEN)
  text = (tmp_path / 'run' / 'unreadable.jsonl').read_text()
  listed = [json.loads(line) for line in text.splitlines()]
  assert sorted(row['name'] for row in listed) == sorted(bad.BROKEN)
  assert all(row['reason'] and '\n' not in row['reason'] for row in listed)
  assert runs.rows(tmp_path / 'run')[-1]['skipped'] == skipped
  # The same with fewer allowed: a line that names the file that lists them.
  data['max_skipped'] = 0.1
  with pytest.raises(UserError, match='unreadable.jsonl names them'):
    loop.train(config | dict(data=data), tmp_path / 'strict')


def test_a_share_that_is_allowed_never_stops_a_run(tmp_path):
  """Also where the second epoch begins with the one unreadable image."""
  photos = runs.images(tmp_path / 'photos')
  (photos / 'torn.png').write_bytes(b'no image')
  source, batch = open_source(str(photos)), bad.config()['batch_size']
  steps = -(-6 // batch)  # of 5 images: into the second epoch
  for seed in range(100):
    batches = TrainBatches(
      source, [Augment((16, 16))], batch_size=batch, seed=seed
    )
    skipped = [batches.batch(s)['skipped'].sum() for s in range(steps)]
    if sum(skipped) == 2:
      break
  data = dict(source=str(photos), image_size=16, max_skipped=0.2)
  config = bad.config() | dict(data=data, seed=seed, duration=steps)
  assert loop.train(config, tmp_path / 'run')['skipped'] == 2


def test_a_substitute_that_is_unreadable_too_is_not_counted(tmp_path):
  """Else half of the images would count for more than half."""
  photos = runs.images(tmp_path / 'photos')
  count = len([*photos.iterdir()])
  for i in range(count):
    (photos / f'torn{i}.png').write_bytes(b'no image')
  source = open_source(str(photos))
  for seed in range(8):
    batches = TrainBatches(
      source, [Augment((16, 16))], batch_size=2 * count, seed=seed
    )
    assert batches.batch(0)['skipped'].sum() == count


def test_damaged_notes_do_not_stop_a_run(place, tmp_path, monkeypatch, capsys):
  """What lies beside the checkpoints is for people: the run goes on."""
  monkeypatch.chdir(place)
  shutil.copytree('run', tmp_path / 'run')
  monkeypatch.setenv('HOME', str(tmp_path))
  junk = b'\xff\xfe\0\n[]\n{"step": "x", "name": []}\n{"step": 1, "l'
  for name in ('config.json', 'metrics.jsonl', 'unreadable.jsonl'):
    path = tmp_path / 'run' / name
    before = path.read_bytes() if path.exists() else b''
    path.write_bytes(junk if name == 'config.json' else before + junk)
  cli.run(lambda _: loop.train(bad.config() | dict(duration=3), '~/run'))
  assert [row['step'] for row in runs.rows(tmp_path / 'run')] == [1, 2, 3]
  assert json.loads((tmp_path / 'run' / 'config.json').read_bytes())
  err = capsys.readouterr().err
  assert 'config.json is damaged' in err
  assert 'orbax' not in err and 'save' not in err


def test_curves_that_cannot_be_written_do_not_stop_a_run(
  place, tmp_path, monkeypatch, caplog
):
  """A network disk that fails once; TensorBoard's own writer would wait for its
  thread for ever."""
  from tensorboardX import record_writer

  monkeypatch.chdir(place)
  fails = mock.Mock(side_effect=OSError('no answer'))
  monkeypatch.setattr(record_writer.RecordWriter, 'flush', fails)
  log = dict(every=1, images_every=0, usage_window=5, tensorboard=True)
  assert (
    loop.train(bad.config() | dict(log=log), tmp_path / 'run')['steps'] == 2
  )
  assert [row['step'] for row in runs.rows(tmp_path / 'run')] == [1, 2]
  (line,) = [r.message for r in caplog.records if 'TensorBoard' in r.message]
  assert 'no answer' in line and fails.call_count == 1


def test_pictures_that_are_skipped_are_counted(place, tmp_path, capsys):
  photos, out = tmp_path / 'photos', tmp_path / 'out'
  shutil.copytree(place / 'photos', photos)
  shutil.copy(place / 'bad/cut.jpg', photos)
  tokenizer = place / 'tokenizer'
  reconstruct_images.main(
    [f'--tokenizer={tokenizer}', f'--images={photos}', f'--out={out}']
  )
  said = capsys.readouterr().out
  assert 'cut  skipped: ' in said and '3 images (1 skipped) in' in said
  assert not (out / 'cut.png').exists() and (out / '0.png').exists()
