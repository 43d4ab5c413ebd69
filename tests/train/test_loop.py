"""A whole run on files: what it leaves, says, and refuses."""

import json
import shutil

import jax
import numpy as np
import pytest
from absl import logging
from PIL import Image

import vqrae_jax
from tests import tiny
from vqrae_jax import sharding
from vqrae_jax.train import finite, lock, loop, summary

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('photos')
  for i in range(4):
    pixels = tiny.images(1, 40, 48, seed=i)[0]
    Image.fromarray(pixels).save(folder / f'photo{i}.png')
  return folder


def config(photos, kind='fsq-cosmos', **keys):
  data = dict(source=str(photos), image_size=16, exclude=('photo0',))
  held_out = dict(source=str(photos), include=('photo0',), tile=16, every=3)
  log = dict(every=2, images_every=3, usage_window=3)
  base = dict(data=data, eval=held_out, log=log, duration=5)
  return tiny.run(kind, **(base | keys))


@pytest.fixture(scope='module')
def ran(photos, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  return loop.train(config(photos), workdir), workdir


def rows(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_what_a_run_leaves(ran, photos):
  figures, workdir = ran
  left = {p.name for p in workdir.iterdir()}
  assert left == {
    'checkpoints',
    'config.json',
    'lock',
    'metrics.jsonl',
    'pictures',
    'reconstructions.png',
    'summary.json',
    'tensorboard',
    'tokenizer',
  }
  summary_json = json.loads((workdir / 'summary.json').read_text())
  assert summary_json == json.loads(json.dumps(figures))
  for key in (
    'psnr', 'psnr_block_mean', 'ssim', 'bits_per_image', 'codes_used',
    'train_seconds', 'images_per_second',
  ):  # fmt: skip
    assert np.isfinite(summary_json[key]), key
  assert summary_json['images'] == 6  # 40x48 in tiles of 16
  kept = json.loads((workdir / 'config.json').read_text())
  assert kept['data']['source'] == str(photos)
  with Image.open(workdir / 'reconstructions.png') as page:
    assert page.width > 100
  assert any((workdir / 'tensorboard').iterdir())


def test_rows_of_metrics(ran):
  _, workdir = ran
  found = rows(workdir)
  assert [r['step'] for r in found] == [2, 3, 4, 5]
  for row in found:
    assert set(row) >= {'loss/l2', 'psnr', 'grad_norm', 'usage'}
    assert set(row) >= {'perplexity', 'images_per_second', 'lr/decoder'}
    assert row['weight/l2'] == 1.0 and row['nonfinite'] == 0


def test_held_out_figures_on_the_way(ran):
  """Every 3 steps and at the end, of the averaged weights; the last are those
  of the exported tokenizer."""
  figures, workdir = ran
  found = {r['step']: r for r in rows(workdir) if 'eval/psnr' in r}
  assert list(found) == [3, 5]
  for name in ('psnr', 'ssim', 'usage', 'perplexity'):
    assert found[5][f'eval/{name}'] == pytest.approx(figures[name], rel=1e-4)
  assert found[3]['eval/psnr'] != found[5]['eval/psnr']


def test_pictures_on_the_way_are_of_held_out_tiles(ran, photos):
  _, workdir = ran
  left = sorted(p.name for p in (workdir / 'pictures').iterdir())
  assert left == ['00000003.png', '00000005.png']
  page = np.asarray(Image.open(workdir / 'pictures' / left[0]))[::8, ::8]
  assert page.shape == (32, 6 * 16, 3)  # six tiles above what they became
  photo = np.asarray(Image.open(photos / 'photo0.png'))
  np.testing.assert_array_equal(page[:16, :16], photo[:16, :16])


def test_the_figures_are_of_the_files(ran, photos):
  """Anyone who opens the directory gets what summary.json says."""
  figures, workdir = ran
  tokenizer, variables = vqrae_jax.load_tokenizer(workdir / 'tokenizer')
  photo = np.asarray(Image.open(photos / 'photo0.png'))[:32]
  tiles = photo.reshape(2, 16, 3, 16, 3).swapaxes(1, 2).reshape(6, 16, 16, 3)
  indices = vqrae_jax.encode_to_indices(tokenizer, variables, tiles)
  painted = vqrae_jax.decode_from_indices(tokenizer, variables, indices)
  psnr = -10 * np.log10(((np.asarray(painted) - tiles / 255.0) ** 2).mean())
  np.testing.assert_allclose(figures['psnr'], psnr, rtol=1e-4)
  assert figures['codes_used'] == len(np.unique(indices))


def test_the_same_run_again_is_the_same(ran, photos, tmp_path):
  figures, workdir = ran
  (tmp_path / 'metrics.jsonl').write_text('left over from another run\n')
  again = loop.train(config(photos), tmp_path)
  assert again['fingerprint'] == figures['fingerprint']
  for a, b in zip(rows(workdir), rows(tmp_path), strict=True):
    assert tiny.without_clocks(a) == tiny.without_clocks(b)


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(photos, tmp_path):
  """In one process: schedules, data, noise, averages (`test_resume.py` kills
  real ones)."""
  keys = dict(eval=None, noise_tau=0.5, checkpoint=dict(every=2, keep=9))
  whole = loop.train(config(photos, 'vq-ema', **keys), tmp_path)
  want = list(map(tiny.without_clocks, rows(tmp_path)))
  for later in (4, 5):
    (tmp_path / 'checkpoints' / f'{later:08d}.json').unlink()
  again = loop.train(config(photos, 'vq-ema', **keys), tmp_path)
  assert list(map(tiny.without_clocks, rows(tmp_path))) == want
  assert again['fingerprint'] == whole['fingerprint']


@pytest.mark.parametrize('kind', ('vq-ema', 'none'))
def test_other_quantizers_run_too(kind, photos, tmp_path):
  figures = loop.train(config(photos, kind), tmp_path)
  assert ('codes_used' in figures) == (kind != 'none')
  assert 'PSNR' in summary.table(figures)


def test_a_loss_that_is_no_number_stops_the_run(photos, tmp_path):
  bad = config(photos, schedules=(('.*', dict(lr=1e15)),), duration=50)
  words = r'loss/l2.*not finite at step \d+ .*, 11 steps in a row; lower'
  with pytest.raises(finite.NonFinite, match=words):
    loop.train(bad, tmp_path)
  assert not (tmp_path / 'tokenizer').exists()


def test_a_finished_run_stays_as_it_is(ran, photos):
  """The same command again, or one that would have trained otherwise."""
  figures, workdir = ran
  left = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
  other = config(photos, schedules=(('.*', dict(lr=0.5)),))
  for again in (config(photos), other):
    assert loop.train(again, workdir) == json.loads(json.dumps(figures))
  assert {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()} == left


def test_a_finished_run_needs_no_config_json(ran, photos, tmp_path):
  figures, workdir = ran
  here = tmp_path / 'run'
  shutil.copytree(workdir, here)
  for spoil in ((here / 'config.json').unlink, _torn(here / 'config.json')):
    spoil()
    assert loop.train(config(photos), here)['steps'] == figures['steps']


def _torn(path):
  return lambda: path.write_text('{')


def test_a_second_run_is_refused_at_once(ran, photos, monkeypatch):
  """Before data are opened, and with nothing written."""
  _, workdir = ran
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
  monkeypatch.setattr(loop, 'Run', lambda _: pytest.fail('it went on'))
  with (
    lock.only_run_in(workdir),
    pytest.raises(vqrae_jax.UserError, match='another run is going on in'),
  ):
    loop.train(config(photos, duration=6), workdir)
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*')} == before


def test_the_lock_is_held_to_the_last_file(photos, tmp_path, monkeypatch):
  held = []

  def watched(inner):
    def look(*args):
      with pytest.raises(vqrae_jax.UserError, match='another run'):
        lock.check_no_run_in(tmp_path)
      held.append(inner.__name__)
      return inner(*args)

    return look

  monkeypatch.setattr(loop._Going, 'steps', watched(loop._Going.steps))
  monkeypatch.setattr(summary, 'finish', watched(summary.finish))
  loop.train(config(photos, duration=1), tmp_path)
  assert held == ['steps', 'finish']
  lock.check_no_run_in(tmp_path)


def test_a_second_run_may_come_late(ran, photos, monkeypatch):
  """Between the first look and the lock: it is the lock that refuses."""
  _, workdir = ran
  before = (workdir / 'metrics.jsonl').read_bytes()
  monkeypatch.setattr(loop, 'check_no_run_in', lambda _: None)
  with (
    lock.only_run_in(workdir),
    pytest.raises(vqrae_jax.UserError, match='another run is going on in'),
  ):
    loop.train(config(photos, duration=6), workdir)
  assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_held_out_photographs_are_decoded_first(photos, tmp_path):
  """None is found to be torn after days of training; small ones are counted."""
  for path in photos.iterdir():
    shutil.copy(path, tmp_path)
  torn = tmp_path / 'photo3.png'
  torn.write_bytes(torn.read_bytes()[:-900])
  held_out = dict(source=str(tmp_path), tile=16)
  with pytest.raises(vqrae_jax.UserError, match=r'photo3.png: .*exclude'):
    loop.Run(config(photos, eval=held_out))
  loop.Run(config(photos, eval=held_out | dict(exclude=('photo3',))))
  words = r'photo0 of 40x48 \(and 3 more\) is smaller than eval.tile=64; lower'
  with pytest.raises(vqrae_jax.UserError, match=words):
    loop.Run(config(photos, eval=held_out | dict(tile=64)))


def test_photographs_that_are_on_both_sides_are_counted(
  photos, tmp_path, monkeypatch
):
  said = []
  monkeypatch.setattr(logging, 'warning', lambda s, *x: said.append(s % x))
  for held_out, words in (
    (
      dict(include=('photo[01]',)),
      '1 of the 2 photographs of eval are trained',
    ),
    (dict(include=('photo0',)), None),
    (dict(source=shutil.copytree(photos, tmp_path / 'other')), None),
  ):
    said.clear()
    held_out = dict(source=str(photos), tile=16) | held_out
    loop.Run(
      config(photos, eval=held_out | dict(source=str(held_out['source'])))
    )
    assert [words in s for s in said] == ([True] if words else [])


def test_what_another_wrote_meanwhile_is_not_undone(
  ran, photos, tmp_path, monkeypatch
):
  """A run that had looked before another saved stops, and removes nothing."""
  _, workdir = ran
  here = tmp_path / 'run'
  shutil.copytree(workdir, here)
  (last,) = (here / 'checkpoints').glob('00000005.json')
  resume = loop.Run.resume

  def while_another_saves(*args):
    found = resume(*args)
    shutil.copy(last, last.with_name('00000006.json'))
    return found

  monkeypatch.setattr(loop.Run, 'resume', while_another_saves)
  with pytest.raises(vqrae_jax.UserError, match='another run has written to'):
    loop.train(config(photos, duration=8), here)
  assert last.with_name('00000006.json').exists()
  assert rows(here) == rows(workdir)


def test_dry_run_writes_nothing(photos, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  metrics = loop.dry_run(config(photos))
  assert np.isfinite(metrics['loss/l2']) and 'samples' not in metrics
  assert not list(tmp_path.iterdir())


def test_profile_leaves_a_trace(photos, tmp_path):
  loop.train(config(photos, eval=None), tmp_path, profile=(2, 3))
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
  assert not (tmp_path / 'reconstructions.png').exists()


def test_a_batch_must_divide_over_devices(photos):
  mesh = sharding.make_mesh(devices=jax.devices())
  with pytest.raises(vqrae_jax.UserError, match='multiple of the 8 devices'):
    loop.Run(config(photos, batch_size=12), mesh)
