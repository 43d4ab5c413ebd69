"""A run on files: what it leaves, logs, and refuses."""

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from tests import runs, tiny
from tests.train import pieces
from vqrae_jax import push, sharding
from vqrae_jax.data.decode import EncodedImages
from vqrae_jax.errors import Stopped, UserError
from vqrae_jax.evaluate.metrics import table
from vqrae_jax.export import __main__ as export_main
from vqrae_jax.files import to_path
from vqrae_jax.losses import adversarial
from vqrae_jax.train import export as run_export
from vqrae_jax.train import gan, loop, reporting
from vqrae_jax.train import setup as setup_lib
from vqrae_jax.train.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def config(images):
  def make(kind='fsq-cosmos', **keys):
    base = dict(
      data=dict(source=str(images), image_size=16, exclude=('image0',)),
      eval=dict(
        source=str(images),
        include=('image0',),
        tile=16,
        every=3,
        metrics=('lpips',),
      ),
      init=dict(networks='random'),
      log=dict(every=2, images_every=3, usage_window=3),
      duration=5,
    )
    return tiny.run(kind, **(base | keys))

  return make


@pytest.fixture(scope='module')
def ran(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  return loop.train(config(), workdir, profile=(2, 3)), workdir


def test_what_a_run_leaves(ran, images):
  figures, workdir = ran
  assert {p.name for p in workdir.iterdir()} == {
    'checkpoints', 'config.json', 'lock', 'metrics.jsonl', 'pictures',
    'profile', 'reconstructions.png', 'summary.json', 'tensorboard',
    'tokenizer',
  }  # fmt: skip
  found = json.loads((workdir / 'summary.json').read_text())
  assert found == json.loads(json.dumps(figures))
  for key in (
    'psnr', 'psnr_block_mean', 'ssim', 'bits_per_image', 'codes_used',
    'train_seconds', 'images_per_second', 'data_wait',
  ):  # fmt: skip
    assert np.isfinite(found[key]), key
  assert found['images'] == 6  # 40x48 in tiles of 16
  assert found['effective_bits'] == pytest.approx(np.log2(found['perplexity']))
  shown = table(figures)
  for key in ('perplexity', 'effective bits', 'nominal'):
    assert key in shown
  kept = json.loads((workdir / 'config.json').read_text())
  assert kept['data']['source'] == str(images)
  with Image.open(workdir / 'reconstructions.png') as page:
    assert page.width > 100
  assert any((workdir / 'profile').rglob('*.xplane.pb'))


def test_rows_of_metrics(ran):
  figures, workdir = ran
  found = runs.rows(workdir)
  assert [r['step'] for r in found] == [2, 3, 4, 5]
  for row in found:
    assert row.keys() >= {
      'loss/l2', 'psnr', 'grad_norm', 'usage', 'perplexity',
      'images_per_second', 'lr/decoder', 'update_norm',
    }  # fmt: skip
    assert row['weight/l2'] == 1.0 and row['nonfinite'] == 0
  # Held-out figures of the EMA weights; the last are the export's.
  evaluated = {r['step']: r for r in found if 'eval/psnr' in r}
  assert list(evaluated) == [3, 5]
  for name in ('psnr', 'ssim', 'lpips', 'usage', 'perplexity'):
    want = pytest.approx(figures[name], rel=1e-4)
    assert evaluated[5][f'eval/{name}'] == want
  assert evaluated[3]['eval/psnr'] != evaluated[5]['eval/psnr']


def test_the_page_of_logs_has_every_name(ran):
  """Of rows and of summary.json; those of a discriminator are in a golden
  file, whose `ema_gap` is not of a run."""
  figures, workdir = ran
  page = (runs.ROOT / 'docs' / 'logs.md').read_text()
  page = page.partition('\n## Names of metrics\n')[2]
  known = [
    name
    for cell in re.findall(r'^\| (`.*?) \|', page, re.M)
    for name in re.findall('`([^`]+)`', cell)
  ]
  golden = json.loads((runs.ROOT / 'tests/golden/metrics.json').read_text())
  names = set(figures).union(*runs.rows(workdir), *golden.values())
  assert {'eval/lpips', 'psnr_shuffled', 'logits/fake'} <= names
  patterns = '|'.join(re.sub('NAME|PART', r'\\w+', name) for name in known)
  lost = {n for n in names - {'ema_gap'} if not re.fullmatch(patterns, n)}
  assert not lost


def test_pictures_on_the_way_are_of_held_out_tiles(ran, images):
  _, workdir = ran
  left = sorted(p.name for p in (workdir / 'pictures').iterdir())
  assert left == ['00000003.png', '00000005.png']
  page = np.asarray(Image.open(workdir / 'pictures' / left[0]))[::8, ::8]
  # Six tiles above their reconstructions and their tokens, a colour each.
  assert page.shape == (3 * 16, 6 * 16, 3)
  tokens = page[32:].reshape(4, 4, 24, 4, 3)
  assert (tokens == tokens[:, :1, :, :1]).all()
  assert len(np.unique(tokens.reshape(-1, 3), axis=0)) > 3
  image = np.asarray(Image.open(images / 'image0.png'))
  np.testing.assert_array_equal(page[:16, :16], image[:16, :16])


def test_scalars_and_pictures_go_to_wandb(config, tmp_path, monkeypatch):
  """And to the same run of it when the run goes on; a stand-in of its API."""
  runs_of, logged, ended = [], [], []

  class Run:
    id = 'r1'

    def log(self, values, step):
      logged.append((step, values))

    def finish(self):
      ended.append(True)

  def init(**options):
    runs_of.append(options)
    return Run()

  module = types.SimpleNamespace(init=init, Image=lambda x: x.shape)
  monkeypatch.setitem(sys.modules, 'wandb', module)
  log = dict(every=1, images_every=2, usage_window=3, wandb='mine')
  keys = dict(log=log, eval={})
  loop.train(config(**keys, duration=2), tmp_path / 'run')
  rows = {step: row for step, row in logged if 'psnr' in row}
  assert [*rows] == [1, 2] and 'loss/l2' in rows[1]
  pictures = [s for s, row in logged if row.keys() == {'reconstructions'}]
  assert pictures == [2] and ended == [True]
  loop.train(config(**keys, duration=3), tmp_path / 'run')
  first, second = runs_of
  assert first['project'] == 'mine' and first['name'] == 'run'
  assert first['config']['duration'] == 2
  assert (first['id'], second['id']) == (None, 'r1')
  assert [s for s, row in logged if 'psnr' in row] == [1, 2, 3]
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match=r'log.wandb=mine .*vqrae_jax\[wandb\]'):
    loop.train(config(**keys), tmp_path / 'other')


def test_tensorboard_has_all_rows(ran):
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  (path,) = (ran[1] / 'tensorboard').iterdir()
  data, events = path.read_bytes(), []
  while data:  # of length, its sum, an event, its sum
    size = int.from_bytes(data[:8], 'little')
    events.append(Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  assert events[1].session_log.status == SessionLog.START
  found, pictures = {}, []
  for event in events:
    for value in event.summary.value:
      if value.HasField('image'):
        pictures.append(event.step)
      else:
        found.setdefault(event.step, {})[value.tag] = value.simple_value
  assert pictures == [3, 5]
  rows = {row.pop('step'): row for row in runs.rows(ran[1])}
  assert found.keys() == rows.keys()
  for step, row in rows.items():
    want = {k: x for k, x in row.items() if x is not None}
    assert found[step] == pytest.approx(want, rel=1e-6)


def test_the_figures_are_of_the_files(ran, images):
  """Anyone who opens the directory gets what summary.json says."""
  figures, workdir = ran
  tokenizer, variables = vqrae_jax.load_tokenizer(workdir / 'tokenizer')
  image = np.asarray(Image.open(images / 'image0.png'))[:32]
  tiles = image.reshape(2, 16, 3, 16, 3).swapaxes(1, 2).reshape(6, 16, 16, 3)
  encode, decode = (
    jax.jit(functools.partial(fn, tokenizer))
    for fn in (vqrae_jax.encode_to_indices, vqrae_jax.decode_from_indices)
  )
  indices = encode(variables, tiles)
  recon = decode(variables, indices)
  psnr = -10 * np.log10(((np.asarray(recon) - tiles / 255.0) ** 2).mean())
  np.testing.assert_allclose(figures['psnr'], psnr, rtol=1e-4)
  assert figures['codes_used'] == len(np.unique(indices))


def test_the_same_run_again_is_the_same(ran, config, tmp_path, programs):
  """By the programs of the first."""
  figures, workdir = ran
  (tmp_path / 'metrics.jsonl').write_text('left over from another run\n')
  again = loop.train(config(), tmp_path)
  assert not programs()
  assert again['fingerprint'] == figures['fingerprint']
  for a, b in zip(runs.rows(workdir), runs.rows(tmp_path), strict=True):
    assert tiny.without_clocks(a) == tiny.without_clocks(b)


def test_a_resumed_run_is_the_uninterrupted_one(run_config, tmp_path):
  """In one process: schedules, data, noise, averages, pictures of training
  images (`test_resume.py` kills real ones)."""
  config = run_config(
    noise_tau=0.5, duration=4, checkpoint=dict(every=2, keep=9),
    schedules=(('.*', dict(lr=1e-3, warmup=2)),),
    log=dict(every=1, images_every=4, tensorboard=False),
  )  # fmt: skip
  want = loop.train(config, tmp_path)
  whole = list(map(tiny.without_clocks, runs.rows(tmp_path)))
  (picture,) = (tmp_path / 'pictures').iterdir()
  before = picture.read_bytes()
  for last in (2, 4):  # of the steps of a trace, what is left
    shutil.rmtree(tmp_path / 'checkpoints/00000004')
    again = loop.train(config, tmp_path, profile=(1, last))
    traced = bool(list(tmp_path.rglob('*.xplane.pb')))
    assert traced == (last == 4)
  assert list(map(tiny.without_clocks, runs.rows(tmp_path))) == whole
  assert again['fingerprint'] == want['fingerprint']
  assert picture.read_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
def test_several_sizes(images, tmp_path):
  """Each step has one of them; rotations fit any grid. Resumed in between, the
  run is the uninterrupted one."""
  rope = dict(posemb='rope2d')
  model = tiny.model('vq-ema', depth=1)
  for part in ('encoder', 'decoder'):
    model[part] = dict(vit=model[part]['vit'] | rope)
  config = runs.plain(
    images, model=model, duration=6, checkpoint=dict(every=2, keep=9),
    data=dict(source=str(images), image_size=[16, (24, 8)]),
    seed=12,  # the second size comes at the fifth step
  )  # fmt: skip
  want = loop.train(config, tmp_path)
  whole = list(map(tiny.without_clocks, runs.rows(tmp_path)))
  batches = runs.setup(config).batches
  shapes = {batches.batch(step)['images'].shape[1:3] for step in range(6)}
  assert shapes == {(16, 16), (24, 8)}
  shutil.rmtree(tmp_path / 'checkpoints/00000006')
  again = loop.train(config, tmp_path)
  assert list(map(tiny.without_clocks, runs.rows(tmp_path))) == whole
  assert again['fingerprint'] == want['fingerprint']


@pytest.mark.slow
@pytest.mark.usefixtures('one_device')
def test_several_codes_a_token(images, tmp_path):
  """EMA stages with dropout, affine codes and revival: a resumed run is the
  uninterrupted one; its tokenizer starts another."""
  inner = dict(
    name='vq', num_codes=64, code_dim=8, decay=0.8, revive_below=0.9,
    affine=True,
  )  # fmt: skip
  model = tiny.model('residual-vq', depth=1, dropout=0.5, quantizer=inner)
  config = runs.plain(
    images, 'residual-vq', model=model, duration=4, accumulate=2,
    checkpoint=dict(every=2, keep=9), eval=dict(source=str(images), tile=16),
    log=dict(every=1, images_every=0, usage_window=2, tensorboard=False),
  )  # fmt: skip
  workdir = tmp_path / 'run'
  want = loop.train(config, workdir)
  whole = list(map(tiny.without_clocks, runs.rows(workdir)))
  before = runs.last_state(workdir)
  shutil.rmtree(workdir / 'checkpoints/00000004')
  again = loop.train(config, workdir)
  assert again['fingerprint'] == want['fingerprint']
  assert list(map(tiny.without_clocks, runs.rows(workdir))) == whole
  assert runs.last_state(workdir) == before
  assert 0 < whole[-1]['usage'] <= 1 and whole[-1]['loss/commit'] > 0
  # 16 tokens of two codes; bits add up over both.
  assert want['bits_per_image'] == 16 * 2 * 6
  assert want['effective_bits'] >= np.log2(want['perplexity'])
  tokenizer, variables = vqrae_jax.load_tokenizer(workdir / 'tokenizer')
  indices = vqrae_jax.encode_to_indices(
    tokenizer, variables, tiny.images(1, 16, 24)
  )
  assert indices.shape == (1, 4, 6, 2)
  second = loop.train(
    config | dict(duration=2, init_from=str(workdir / 'tokenizer')),
    tmp_path / 'second',
  )
  assert second['fingerprint'] != want['fingerprint']


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
  assert left == {'config.json', 'metrics.jsonl', 'summary.json', 'tokenizer'}
  assert [r['step'] for r in runs.rows(to_path(workdir))] == [1, 2]
  tokenizer, variables = vqrae_jax.load_tokenizer(f'{workdir}/tokenizer')
  assert tokenizer.codebook_size == 64 and variables and figures['fingerprint']
  runs.begun(run_config(init_from=f'{workdir}/tokenizer'))


def test_a_continuous_tokenizer_has_no_codes_to_count(config, images, tmp_path):
  held_out = dict(source=str(images), include=('image0',), tile=16)
  figures = loop.train(config('none', eval=held_out, duration=1), tmp_path)
  assert 'codes_used' not in figures and 'PSNR' in table(figures)


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
  run = shutil.copytree(workdir, tmp_path / 'run')
  (run / 'config.json').unlink()
  assert loop.train(config(), run)['steps'] == figures['steps']


def test_a_second_run_is_refused_with_nothing_written(ran, config, monkeypatch):
  """At once, before data are opened; and by the lock, if it comes between the
  first look and that."""
  _, workdir = ran
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
  with loop.only_run_in(workdir):
    with monkeypatch.context() as patch:
      patch.setattr(setup_lib, 'setup', lambda _: pytest.fail('it went on'))
      with pytest.raises(UserError, match='another run'):
        loop.train(config(duration=6), workdir)
    monkeypatch.setattr(loop, 'check_no_run_in', lambda _: None)
    with pytest.raises(UserError, match='another run'):
      loop.train(config(duration=6), workdir)
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*')} == before


def test_the_lock_is_held_to_the_last_file(config, tmp_path, monkeypatch):
  def finish(*args):
    figures = reporting.finish(*args)
    with pytest.raises(UserError, match='another run'):
      loop.check_no_run_in(tmp_path)
    return figures

  monkeypatch.setattr(loop, 'finish', finish)
  loop.train(config(duration=1), tmp_path)
  loop.check_no_run_in(tmp_path)


def test_held_out_images_are_decoded_first(config, images, tmp_path):
  """A torn one is found before training; small ones are counted."""
  for path in images.iterdir():
    shutil.copy(path, tmp_path)
  torn = tmp_path / 'image3.png'
  torn.write_bytes(torn.read_bytes()[:-900])
  held_out = dict(source=str(tmp_path), tile=16)
  with pytest.raises(UserError, match=r'image3.png: .*eval.exclude'):
    runs.setup(config(eval=held_out))
  runs.setup(config(eval=held_out | dict(exclude=('image3',))))
  with pytest.raises(UserError, match=r'image0 .*3 more.*eval.tile=64'):
    runs.setup(config(eval=held_out | dict(tile=64)))


def test_images_that_are_on_both_sides_are_counted(
  config, images, tmp_path, caplog
):
  other = shutil.copytree(images, tmp_path / 'other')
  for source, include, shared in (
    (images, ('image[01]',), '1 of the 2'),
    (images, ('image0',), None),
    (other, ('*',), None),
  ):
    caplog.clear()
    runs.setup(config(eval=dict(source=str(source), include=include, tile=16)))
    lines = [s for s in caplog.messages if 'trained on too' in s]
    assert [shared in line for line in lines] == [True] * bool(shared)


def test_what_another_run_wrote_meanwhile_is_not_undone(
  ran, config, tmp_path, monkeypatch
):
  """A run that had looked before another saved stops, and removes nothing."""
  _, workdir = ran
  here = shutil.copytree(workdir, tmp_path / 'run')
  looks = iter(([5], [5, 6]))
  monkeypatch.setattr(loop.Checkpoints, 'steps', lambda _: next(looks))
  with pytest.raises(UserError, match='another run has written'):
    loop.train(config(duration=8), here)
  assert runs.rows(here) == runs.rows(workdir)


def test_a_stopped_runs_tokenizer_can_be_exported(ran, config, tmp_path):
  """Its latest checkpoint gives what its end would have given."""
  figures, workdir = ran
  run, out = shutil.copytree(workdir, tmp_path / 'run'), tmp_path / 'out'
  shutil.rmtree(run / 'tokenizer')
  assert run_export.export_run(run, out) == figures['fingerprint']
  bundle = tmp_path / 'bundle'
  export_main.main([f'--run={run}', f'--out={bundle}', '--platforms=cpu'])
  card = json.loads((bundle / 'bundle.json').read_text())
  assert card['fingerprint'] == figures['fingerprint']
  with pytest.raises(UserError, match='--run='):
    run_export.export_run(tmp_path, tmp_path / 'other')
  with pytest.raises(UserError, match='--out=.*out exists'):
    run_export.export_run(run, out)


def test_a_model_card_has_what_the_run_left(ran, images):
  """Data without this machine's folders, recipe, figures with their protocol,
  and the licence of the encoder's weights."""
  figures, workdir = ran
  tokenizer, _ = vqrae_jax.load_tokenizer(workdir / 'tokenizer')
  config, found = push.read_run(workdir, figures['fingerprint'])
  assert found == figures

  def text(**keys):
    init = dict(init_from=None) | keys
    run = dataclasses.replace(config, **init), figures
    return push.card('me/mine', tokenizer, 7, figures['fingerprint'], run)

  card = text()
  metadata, _ = card.removeprefix('---\n').split('\n---\n', 1)
  assert 'library_name: vqrae_jax' in metadata
  psnr = f'{figures["psnr"]:.2f}'
  said = 'hf:me/mine', 'image0', '5 steps', psnr, 'random weights', images.name
  for words in (*said, figures['fingerprint']):
    assert words in card, words
  assert str(images.parent) not in card
  for name in ('dinov2-base', 'hf:facebook/dinov2-base@main'):
    card = text(init=dataclasses.replace(config.init, encoder=name))
    assert 'facebook/dinov2-base; licence: Apache-2.0' in card
  assert 'started from old' in text(init_from='/home/me/old')
  with pytest.raises(UserError, match='of another tokenizer'):
    push.read_run(workdir, 64 * '0')


def test_decoders_keep_enough_for_every_size(config, monkeypatch):
  """The longest side, not that of the largest area."""
  sides, plain = [], EncodedImages.decoded_by

  def decoded_by(source, decoder, side):
    sides.append(side)
    return plain(source, decoder, side)

  monkeypatch.setattr(EncodedImages, 'decoded_by', decoded_by)
  sizes = ((32, 32), (8, 64))
  data = dict(source=config()['data']['source'], image_size=sizes)
  runs.setup(config(data=data | dict(crop='squash'), eval=None))
  assert sides == [2 * 64]


@pytest.fixture
def train_broken(run_config, tmp_path, monkeypatch):
  """(numbers, **keys) -> None: trains six steps, with a NaN in the images of
  those; 0 is the codebook's first batch."""
  place, count = setup_lib.Setup.place, itertools.count()

  def train(numbers, **keys):
    def placed(setup, batch):
      images = np.float32(batch['images']) / 255
      if next(count) in numbers:
        images[0, 0, 0, 0] = np.nan
      return place(setup, dict(batch, images=images))

    monkeypatch.setattr(setup_lib.Setup, 'place', placed)
    kept = dict(every=1, keep=1)
    loop.train(run_config(duration=6, checkpoint=kept, **keys), tmp_path)

  return train


def test_nonfinite_steps_are_skipped_and_logged(train_broken, tmp_path, caplog):
  warmed = ('encoder/.*', None), ('.*', dict(lr=1e-3, warmup=4))
  train_broken((3, 4), schedules=warmed)
  assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text()
  found = runs.rows(tmp_path)
  assert [r['nonfinite'] for r in found] == [0, 0, 1, 2, 2, 2]
  assert found[2]['loss/l2'] is None and found[4]['loss/l2'] is not None
  # What each step asked for and added: skipped ones count for no schedule.
  rates = [r['lr/decoder'] for r in found]
  np.testing.assert_allclose(rates, np.array([1, 2, 3, 3, 3, 4]) * 2.5e-4)
  assert [r['update_norm'] > 0 for r in found] == [1, 1, 0, 0, 1, 1]
  one, two = [s for s in caplog.messages if 'max_nonfinite' in s]
  assert 'step 3' in one and '1 in a row' in one
  assert 'step 4' in two and '2 in a row' in two


@pytest.mark.parametrize(
  'numbers, most, words',
  [
    # The checkpoint before them stays, though each step would save one.
    ((3, 4, 5), 2, 'step 5 .*3 steps .*from step 2; .*remove .*/00000002'),
    (range(1, 7), 100, 'step 6 .*6 steps in a row'),
  ],
)
def test_too_many_nonfinite_steps_stop_the_run(
  numbers, most, words, train_broken, tmp_path
):
  with pytest.raises(loop.NonFinite, match=words):
    train_broken(numbers, max_nonfinite=most)
  assert not (tmp_path / 'tokenizer').exists()


def test_a_signal_while_the_last_state_is_written(
  run_config, tmp_path, monkeypatch
):
  """Nothing is lost, and it says so."""
  finish = Checkpoints._finish

  def signalled(self, folder):
    os.kill(os.getpid(), signal.SIGTERM)
    finish(self, folder)

  config = run_config(checkpoint=dict(every=2, keep=1))
  before = signal.signal(signal.SIGTERM, lambda *_: None)
  try:
    with monkeypatch.context() as patch:
      patch.setattr(Checkpoints, '_finish', signalled)
      with pytest.raises(Stopped, match='SIGTERM after step 2, which is saved'):
        loop.train(config, tmp_path)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert Checkpoints(tmp_path / 'checkpoints').steps() == [2]
  assert loop.train(config, tmp_path)['steps'] == 2
  assert (tmp_path / 'tokenizer').is_dir()


def test_a_signal_at_the_last_step_of_a_run_without_checkpoints(
  run_config, tmp_path, monkeypatch
):
  """It is finished: to start over would lose it."""
  rates_at = setup_lib.Setup.rates_at

  def signalled(setup, step, skipped):
    if step == 1:
      signal.raise_signal(signal.SIGTERM)
    return rates_at(setup, step, skipped)

  monkeypatch.setattr(setup_lib.Setup, 'rates_at', signalled)
  loop.train(run_config(checkpoint=dict(every=0)), tmp_path)
  assert (tmp_path / 'tokenizer').is_dir()


def test_the_logged_rate_is_the_highest_of_the_blocks(images):
  schedules = (
    ('.*/transformer/.*', dict(lr=1e-3, layers=(0.25, 0.5))),
    ('.*', dict(lr=1e-4)),
  )
  made = runs.setup(runs.plain(images, 'fsq-cosmos', schedules=schedules))
  assert made.rates_at(0)['lr/decoder'] == pytest.approx(5e-4)


def test_what_a_gan_run_logs(simvq_config, tmp_path, log, monkeypatch):
  """Metrics start with what they measure; an alarm is logged once; another run
  that starts from it says what is drawn anew."""
  monkeypatch.setattr(gan, 'WON', 2.0)  # a loss below twice of guessing
  config = simvq_config(
    losses=tiny.LOSSES['simvq-l2'] | dict(gan=dict(weight=0.5, start=1)),
    discriminator=pieces.PATCH,
    duration=4,
  )  # fmt: skip
  loop.train(config, tmp_path)
  assert log.text.count('the discriminator separates') == 1
  found = runs.rows(tmp_path)
  late = {'loss/gan', 'adaptive_weight'}  # from the second step
  assert late | {
    'weight/gan', 'logits/real', 'loss/discriminator',
    'lr/discriminator', 'discriminator/grad_norm', 'discriminator/update_norm',
  } <= set(found[-1])  # fmt: skip
  assert not late & set(found[0]) and late <= set(found[1])
  assert [r['weight/gan'] for r in found] == [0, 0.5, 0.5, 0.5]
  assert all(r['lr/discriminator'] > 0 for r in found)
  config |= dict(init_from=str(tmp_path))
  made, started = runs.setup(config), runs.begun(config)
  (line,) = [s for s in log.messages if s.startswith('re-initialized')]
  for part in ('the discriminator (', 'the optimizer (', 'not EMA'):
    assert part in line
  with jax.set_mesh(made.mesh):
    batch = made.place(made.batches.batch(0))
    hparams = setup_lib.f32(made.hparams)
    made.train_step()(started.state, started.frozen, hparams, batch)
  # The state's memory is the next state's; what is frozen stays.
  params = started.state.tokenizer.params
  assert params['decoder/head/kernel'].is_deleted()
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
