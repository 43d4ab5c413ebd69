"""What goes wrong without anyone's mistake: unreadable images, damaged logs,
non-finite values, full disks. A run goes on and counts, or says what to do."""

import contextlib
import io
import json
import shutil

import pytest

from tests import bad
from vqrae_jax import cli, reconstruct_images
from vqrae_jax.data.pipeline import Augment, TrainBatches
from vqrae_jax.data.sources import open_source
from vqrae_jax.errors import UserError
from vqrae_jax.train import loop

pytestmark = pytest.mark.usefixtures('one_device')


def test_what_is_skipped_and_what_is_converted(place, tmp_path, monkeypatch):
  """One of each broken kind beside good ones of every mode: all counted."""
  photos = tmp_path / 'photos'
  shutil.copytree(place / 'bad', photos)
  good = bad.good(photos)
  every = 4  # steps of an epoch, in which each image comes once
  assert len(list(photos.iterdir())) == len(bad.BROKEN) + len(good)
  batch = (len(bad.BROKEN) + len(good)) // every
  assert batch * every == len(bad.BROKEN) + len(good)
  data = dict(source=str(photos), image_size=16, max_skipped=1.0)
  config = bad.config() | dict(data=data, batch_size=batch, duration=every)
  figures = loop.train(config, tmp_path / 'run')
  source = open_source(str(photos))
  batches = TrainBatches(source, Augment((16, 16)), batch_size=batch, seed=0)
  skipped = sum(int(batches.batch(s)['skipped'].sum()) for s in range(every))
  assert figures['skipped'] == skipped >= len(bad.BROKEN)
  text = (tmp_path / 'run' / 'unreadable.jsonl').read_text()
  listed = [json.loads(line) for line in text.splitlines()]
  assert sorted(row['name'] for row in listed) == sorted(bad.BROKEN)
  assert all(row['reason'] and '\n' not in row['reason'] for row in listed)
  rows = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  assert json.loads(rows[-1])['skipped'] == skipped
  # The same with fewer allowed: a line that names the file that lists them.
  data['max_skipped'] = 0.1
  with pytest.raises(UserError, match='unreadable.jsonl names them'):
    loop.train(config | dict(data=data), tmp_path / 'strict')


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
  text = (tmp_path / 'run' / 'metrics.jsonl').read_text()
  steps = [json.loads(line)['step'] for line in text.splitlines()]
  assert steps == [1, 2, 3]
  assert json.loads((tmp_path / 'run' / 'config.json').read_bytes())
  err = capsys.readouterr().err
  assert 'config.json is damaged' in err
  assert 'orbax' not in err and 'save' not in err


def test_a_checkpoint_of_wild_values_is_named(place, tmp_path, monkeypatch):
  """Its values may be finite; the message says how to go further back."""
  monkeypatch.chdir(place)
  wild = dict(schedules=(('.*', dict(lr=1e15)),), duration=9, max_nonfinite=0)
  words = r'not finite at step 2 .* remove .*/checkpoints/00000001'
  with pytest.raises(loop.NonFinite, match=words):
    loop.train(bad.config() | wild, tmp_path)
  assert not (tmp_path / 'tokenizer').exists()


def test_a_disk_that_cannot_be_written_is_a_line(capsys):
  def main(_):
    raise PermissionError(13, 'Permission denied', 'runs/x')

  with pytest.raises(SystemExit, match='2'):
    cli.run(main)
  assert capsys.readouterr().err == 'error: runs/x: Permission denied\n'


def test_pictures_that_are_skipped_are_counted(place, tmp_path, monkeypatch):
  monkeypatch.chdir(place)
  photos = tmp_path / 'photos'
  shutil.copytree('photos', photos)
  shutil.copy('bad/cut.jpg', photos)
  out = tmp_path / 'out'
  argv = ['--tokenizer=tokenizer', f'--images={photos}', f'--out={out}']
  said = io.StringIO()
  with contextlib.redirect_stdout(said):
    reconstruct_images.main(argv)
  assert 'cut  skipped: ' in said.getvalue()
  assert '3 images (1 skipped) in' in said.getvalue()
  assert not (out / 'cut.png').exists() and (out / '0.png').exists()
