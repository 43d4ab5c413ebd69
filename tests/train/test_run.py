"""A run on files: what it leaves, logs, and refuses."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from tests import tiny
from tests.train import pieces
from vqrae_jax import sharding
from vqrae_jax.errors import UserError
from vqrae_jax.files import to_path
from vqrae_jax.losses import adversarial
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import export as run_export
from vqrae_jax.train import loop, reporting
from vqrae_jax.train import setup as setup_lib

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def config(images):
  def make(kind='fsq-cosmos', **keys):
    base = dict(
      data=dict(source=str(images), image_size=16, exclude=('image0',)),
      eval=dict(source=str(images), include=('image0',), tile=16, every=3),
      log=dict(every=2, images_every=3, usage_window=3),
      duration=5,
    )
    return tiny.run(kind, **(base | keys))

  return make


@pytest.fixture(scope='module')
def ran(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  return loop.train(config(), workdir), workdir


def setup(config, mesh=None):
  return setup_lib.setup(config_lib.read_config(config), mesh)


def rows(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_what_a_run_leaves(ran, images):
  figures, workdir = ran
  assert {p.name for p in workdir.iterdir()} == {
    'checkpoints', 'config.json', 'lock', 'metrics.jsonl', 'pictures',
    'reconstructions.png', 'summary.json', 'tensorboard', 'tokenizer',
  }  # fmt: skip
  found = json.loads((workdir / 'summary.json').read_text())
  assert found == json.loads(json.dumps(figures))
  for key in (
    'psnr', 'psnr_block_mean', 'ssim', 'bits_per_image', 'codes_used',
    'train_seconds', 'images_per_second',
  ):  # fmt: skip
    assert np.isfinite(found[key]), key
  assert found['images'] == 6  # 40x48 in tiles of 16
  assert found['effective_bits'] == pytest.approx(np.log2(found['perplexity']))
  table = reporting.table(figures)
  for key in ('perplexity', 'effective bits', 'nominal'):
    assert key in table
  kept = json.loads((workdir / 'config.json').read_text())
  assert kept['data']['source'] == str(images)
  with Image.open(workdir / 'reconstructions.png') as page:
    assert page.width > 100
  assert any((workdir / 'tensorboard').iterdir())


def test_rows_of_metrics(ran):
  figures, workdir = ran
  found = rows(workdir)
  assert [r['step'] for r in found] == [2, 3, 4, 5]
  for row in found:
    assert set(row) >= {'loss/l2', 'psnr', 'grad_norm', 'usage'}
    assert set(row) >= {'perplexity', 'images_per_second', 'lr/decoder'}
    assert row['weight/l2'] == 1.0 and row['nonfinite'] == 0
  # Held-out figures of the EMA weights; the last are the export's.
  evaluated = {r['step']: r for r in found if 'eval/psnr' in r}
  assert list(evaluated) == [3, 5]
  for name in ('psnr', 'ssim', 'usage', 'perplexity'):
    want = pytest.approx(figures[name], rel=1e-4)
    assert evaluated[5][f'eval/{name}'] == want
  assert evaluated[3]['eval/psnr'] != evaluated[5]['eval/psnr']


def test_pictures_on_the_way_are_of_held_out_tiles(ran, images):
  _, workdir = ran
  left = sorted(p.name for p in (workdir / 'pictures').iterdir())
  assert left == ['00000003.png', '00000005.png']
  page = np.asarray(Image.open(workdir / 'pictures' / left[0]))[::8, ::8]
  assert page.shape == (32, 6 * 16, 3)  # six tiles above their reconstructions
  image = np.asarray(Image.open(images / 'image0.png'))
  np.testing.assert_array_equal(page[:16, :16], image[:16, :16])


def test_the_figures_are_of_the_files(ran, images):
  """Anyone who opens the directory gets what summary.json says."""
  figures, workdir = ran
  tokenizer, variables = vqrae_jax.load_tokenizer(workdir / 'tokenizer')
  image = np.asarray(Image.open(images / 'image0.png'))[:32]
  tiles = image.reshape(2, 16, 3, 16, 3).swapaxes(1, 2).reshape(6, 16, 16, 3)
  indices = vqrae_jax.encode_to_indices(tokenizer, variables, tiles)
  recon = vqrae_jax.decode_from_indices(tokenizer, variables, indices)
  psnr = -10 * np.log10(((np.asarray(recon) - tiles / 255.0) ** 2).mean())
  np.testing.assert_allclose(figures['psnr'], psnr, rtol=1e-4)
  assert figures['codes_used'] == len(np.unique(indices))


def test_the_same_run_again_is_the_same(ran, config, tmp_path):
  figures, workdir = ran
  (tmp_path / 'metrics.jsonl').write_text('left over from another run\n')
  again = loop.train(config(), tmp_path)
  assert again['fingerprint'] == figures['fingerprint']
  for a, b in zip(rows(workdir), rows(tmp_path), strict=True):
    assert tiny.without_clocks(a) == tiny.without_clocks(b)


def test_a_resumed_run_is_the_uninterrupted_one(run_config, tmp_path):
  """In one process: schedules, data, noise, averages (`test_resume.py` kills
  real ones)."""
  config = run_config(
    noise_tau=0.5, duration=4, checkpoint=dict(every=2, keep=9),
    schedules=(('.*', dict(lr=1e-3, warmup=2)),),
  )  # fmt: skip
  want = loop.train(config, tmp_path)
  whole = list(map(tiny.without_clocks, rows(tmp_path)))
  for last in (2, 4):  # of the steps of a trace, what is left
    shutil.rmtree(tmp_path / 'checkpoints/00000004')
    again = loop.train(config, tmp_path, profile=(1, last))
    traced = bool(list(tmp_path.rglob('*.xplane.pb')))
    assert traced == (last == 4)
  assert list(map(tiny.without_clocks, rows(tmp_path))) == whole
  assert again['fingerprint'] == want['fingerprint']


def test_a_workdir_in_a_bucket(run_config):
  """Rows, config, figures and tokenizer go there and come from there; only
  checkpoints are Orbax's own to write."""
  fsspec = pytest.importorskip('fsspec')
  from fsspec.implementations.memory import MemoryFileSystem

  class Bucket(MemoryFileSystem):
    protocol = 'gs'
    store, pseudo_dirs = {}, ['']

  for name in ('gs', 'gcs'):
    fsspec.register_implementation(name, Bucket, clobber=True)
  workdir = 'gs://bucket/run'
  figures = loop.train(run_config(checkpoint=dict(every=0)), workdir)
  left = {p.name for p in to_path(workdir).iterdir()}
  assert {'config.json', 'metrics.jsonl', 'summary.json'} <= left
  assert [r['step'] for r in rows(to_path(workdir))] == [1, 2]
  tokenizer, variables = vqrae_jax.load_tokenizer(f'{workdir}/tokenizer')
  assert tokenizer.codebook_size == 64 and variables
  start = run_config(init_from=f'{workdir}/tokenizer')
  with jax.set_mesh((made := setup(start)).mesh):
    assert figures['fingerprint'] and loop.initialize(made)


def test_a_continuous_tokenizer_has_no_codes_to_count(config, tmp_path):
  figures = loop.train(config('none'), tmp_path)
  assert 'codes_used' not in figures and 'PSNR' in reporting.table(figures)


def test_a_finished_run_stays_as_it_is(ran, config):
  """The same command again, or one that would have trained otherwise."""
  figures, workdir = ran
  left = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
  other = config(schedules=(('.*', dict(lr=0.5)),))
  for again in (config(), other):
    assert loop.train(again, workdir) == json.loads(json.dumps(figures))
  assert {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()} == left


def test_a_finished_run_needs_no_config_json(ran, config, tmp_path):
  figures, workdir = ran
  shutil.copytree(workdir, tmp_path / 'run')
  path = tmp_path / 'run/config.json'
  for damage in (path.unlink, lambda: path.write_text('{')):
    damage()
    assert loop.train(config(), tmp_path / 'run')['steps'] == figures['steps']


def test_a_second_run_is_refused_at_once(ran, config, monkeypatch):
  """Before data are opened, and with nothing written."""
  _, workdir = ran
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
  monkeypatch.setattr(setup_lib, 'setup', lambda _: pytest.fail('it went on'))
  with (
    loop.only_run_in(workdir),
    pytest.raises(UserError, match='another run'),
  ):
    loop.train(config(duration=6), workdir)
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*')} == before


def test_a_second_run_may_come_late(ran, config, monkeypatch):
  """Between the first look and the lock: it is the lock that refuses."""
  _, workdir = ran
  before = (workdir / 'metrics.jsonl').read_bytes()
  monkeypatch.setattr(loop, 'check_no_run_in', lambda _: None)
  with (
    loop.only_run_in(workdir),
    pytest.raises(UserError, match='another run'),
  ):
    loop.train(config(duration=6), workdir)
  assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_the_lock_is_held_to_the_last_file(config, tmp_path, monkeypatch):
  held = []

  def watched(inner):
    def look(*args):
      with pytest.raises(UserError, match='another run'):
        loop.check_no_run_in(tmp_path)
      held.append(inner.__name__)
      return inner(*args)

    return look

  for stage in (loop.run, loop.finish):
    monkeypatch.setattr(loop, stage.__name__, watched(stage))
  loop.train(config(duration=1), tmp_path)
  assert held == ['run', 'finish']
  loop.check_no_run_in(tmp_path)


def test_held_out_images_are_decoded_first(config, images, tmp_path):
  """A torn one is found before training; small ones are counted."""
  for path in images.iterdir():
    shutil.copy(path, tmp_path)
  torn = tmp_path / 'image3.png'
  torn.write_bytes(torn.read_bytes()[:-900])
  held_out = dict(source=str(tmp_path), tile=16)
  with pytest.raises(UserError, match=r'image3.png: .*eval.exclude'):
    setup(config(eval=held_out))
  setup(config(eval=held_out | dict(exclude=('image3',))))
  with pytest.raises(UserError, match=r'image0 .*3 more.*eval.tile=64'):
    setup(config(eval=held_out | dict(tile=64)))


def test_images_that_are_on_both_sides_are_counted(
  config, images, tmp_path, log
):
  other = shutil.copytree(images, tmp_path / 'other')
  for source, include, shared in (
    (images, ('image[01]',), '1 of the 2'),
    (images, ('image0',), None),
    (other, ('*',), None),
  ):
    log['warning'].clear()
    setup(config(eval=dict(source=str(source), include=include, tile=16)))
    assert [shared in s for s in log['warning']] == [True] * bool(shared)


def test_what_another_run_wrote_meanwhile_is_not_undone(
  ran, config, tmp_path, monkeypatch
):
  """A run that had looked before another saved stops, and removes nothing."""
  _, workdir = ran
  here = tmp_path / 'run'
  shutil.copytree(workdir, here)
  steps = loop.Checkpoints.steps
  looks = iter(range(9))
  monkeypatch.setattr(
    loop.Checkpoints, 'steps',
    lambda self: steps(self) + [6] * (next(looks) > 0),
  )  # fmt: skip
  with pytest.raises(UserError, match='another run has written'):
    loop.train(config(duration=8), here)
  assert rows(here) == rows(workdir)


def test_dry_run_writes_nothing(config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert np.isfinite(loop.dry_run(config())['loss/l2'])
  assert not list(tmp_path.iterdir())


def test_profile_leaves_a_trace(config, tmp_path):
  loop.train(config(eval=None), tmp_path, profile=(2, 3))
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
  assert not (tmp_path / 'reconstructions.png').exists()


def test_a_batch_must_divide_over_devices(config):
  mesh = sharding.make_mesh(devices=jax.devices())
  with pytest.raises(UserError, match='batch_size=12'):
    setup(config(batch_size=12), mesh)


def test_a_stopped_runs_tokenizer_can_be_exported(ran, config, tmp_path):
  """Its latest checkpoint gives what its end would have given."""
  figures, workdir = ran
  shutil.copytree(workdir, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run/tokenizer')
  found = run_export.export_run(tmp_path / 'run', tmp_path / 'out')
  assert found == figures['fingerprint']
  with pytest.raises(UserError, match='--run='):
    run_export.export_run(tmp_path, tmp_path / 'other')
  with pytest.raises(UserError, match='--out=.*out exists'):
    run_export.export_run(tmp_path / 'run', tmp_path / 'out')


@pytest.fixture
def break_steps(monkeypatch):
  """Sets the steps whose images hold a NaN."""
  place, count = setup_lib.Setup.place, iter(range(10**6))

  def begin(*steps):
    def placed(setup, batch):
      batch = dict(batch, images=np.float32(batch['images']) / 255)
      if next(count) in steps:
        batch['images'][0, 0, 0, 0] = np.nan
      return place(setup, batch)

    monkeypatch.setattr(setup_lib.Setup, 'place', placed)

  return begin


def nonfinite_config(run_config, **keys):
  base = dict(duration=6, checkpoint=dict(every=1, keep=1))
  return run_config(**base | keys)


def test_nonfinite_steps_are_skipped_and_logged(
  run_config, tmp_path, break_steps, log
):
  break_steps(3, 4)  # place 0 is for the codebook
  loop.train(nonfinite_config(run_config), tmp_path)
  assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text()
  found = rows(tmp_path)
  assert [r['nonfinite'] for r in found] == [0, 0, 1, 2, 2, 2]
  assert found[2]['loss/l2'] is None and found[4]['loss/l2'] is not None
  lines = [line for line in log['warning'] if 'max_nonfinite' in line]
  assert len(lines) == 2
  assert 'step 3' in lines[0] and '1 in a row' in lines[0]
  assert 'step 4' in lines[1] and '2 in a row' in lines[1]


def test_too_many_nonfinite_steps_stop_the_run(
  run_config, tmp_path, break_steps
):
  """The checkpoint before them stays, though each step would save one."""
  break_steps(3, 4, 5)
  words = r'step 5 .*3 steps in a row.*resumes from step 2'
  with pytest.raises(loop.NonFinite, match=words):
    loop.train(nonfinite_config(run_config, max_nonfinite=2), tmp_path)
  assert not (tmp_path / 'tokenizer').exists()


def test_a_run_of_nonfinite_steps_alone_gives_no_tokenizer(
  run_config, tmp_path, break_steps
):
  break_steps(*range(1, 7))
  with pytest.raises(loop.NonFinite, match='step 6 .*6 steps in a row'):
    loop.train(nonfinite_config(run_config), tmp_path)


def test_a_gan_run_resumes_and_warns(simvq_config, tmp_path, log, monkeypatch):
  """Rows of a resumed run are those of an uninterrupted one; metrics start
  with what they measure; an alarm is logged once; another run that starts from
  it says what is drawn anew."""
  from vqrae_jax.train import gan

  monkeypatch.setattr(gan, 'WON', 2.0)  # a loss below twice of guessing
  config = simvq_config(
    losses=tiny.LOSSES['simvq-l2']
    | dict(lpips=0.5, gan=dict(weight=0.5, start=1)),
    discriminator=pieces.PATCH,
    init=dict(networks='random'),
    duration=4,
    checkpoint=dict(every=2, keep=2),
  )  # fmt: skip
  one, two = tmp_path / 'one', tmp_path / 'two'
  loop.train(config, one)
  assert any('RANDOM networks in lpips' in line for line in log['info'])
  warned = [s for s in log['warning'] if 'the discriminator separates' in s]
  assert len(warned) == 1
  want = rows(one)
  late = {'loss/gan', 'adaptive_weight'}  # from the second step
  assert late | {
    'loss/lpips', 'weight/gan', 'logits/real', 'loss/discriminator',
    'lr/discriminator', 'discriminator/grad_norm', 'discriminator/update_norm',
  } <= set(want[-1])  # fmt: skip
  assert not late & set(want[0]) and late <= set(want[1])
  assert [r['weight/gan'] for r in want] == [0, 0.5, 0.5, 0.5]
  assert all(r['lr/discriminator'] > 0 for r in want)
  shutil.copytree(one, two)
  shutil.rmtree(two / 'tokenizer')
  shutil.rmtree(two / 'checkpoints/00000004')
  loop.train(config, two)
  again = [tiny.without_clocks(r) for r in rows(two)]
  assert again == [tiny.without_clocks(r) for r in want]
  made = setup(config | dict(init_from=str(one)))
  with jax.set_mesh(made.mesh):
    started = loop.initialize(made)
    state, hparams = started.state, setup_lib.f32(made.hparams)
    batch = made.place(made.batches.batch(0))
    made.train_step()(state, started.frozen, hparams, batch)
  (line,) = [s for s in log['info'] if s.startswith('re-initialized')]
  for part in ('the discriminator (', 'the optimizer (', 'not EMA'):
    assert part in line
  # The state's memory is the next state's; what is frozen stays.
  assert state.tokenizer.params['decoder/head/kernel'].is_deleted()
  assert not any(x.is_deleted() for x in jax.tree.leaves(started.frozen))


def test_one_device_and_eight_agree(monkeypatch):
  """Three steps of both networks, on eight devices in two microbatches each.

  Adam divides a gradient by its own size, and with a small eps makes ±1 of
  rounding errors where the true gradient is zero: this one is above them. A
  value between two levels of 8 bits falls to either, so fakes are not rounded.
  """
  monkeypatch.setattr(adversarial, 'to_8_bits', lambda x: jnp.clip(x, 0, 1))
  optim = dict(b1=0.9, b2=0.95, eps=1e-3)
  found = []
  for devices, layout in ((1, 'dp'), (8, 'fsdp')):
    mesh = sharding.make_mesh(layout, jax.devices()[:devices])
    plan = pieces.planned(
      'simvq-l2',
      losses=tiny.LOSSES['simvq-l2'] | dict(gan=dict(weight=0.5)),
      optim=optim,
      discriminator=pieces.PATCH | dict(optim=optim),
      batch_size=16,
      accumulate=2 if devices == 8 else 1,
    )
    state, frozen = pieces.started(plan, mesh, larger=pieces.APART)
    with jax.set_mesh(mesh):
      step = pieces.jitted_on(plan, state, mesh)
      for i in range(3):
        batch = sharding.place_batch({'x': tiny.images(16, seed=i)}, mesh)['x']
        state, metrics = step(state, frozen, batch)
        found.append({k: float(v) for k, v in metrics.items()})
  for one, eight in zip(found[:3], found[3:], strict=True):
    assert one['loss/gan'] != 0
    for name, value in one.items():
      np.testing.assert_allclose(
        eight[name], value, rtol=1e-5, atol=1e-6, err_msg=name
      )
