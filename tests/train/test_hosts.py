"""Two processes train as one: same losses, one export; and one that is lost."""

import contextlib
import shutil
import signal

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

import vqrae_jax
from tests import runs
from vqrae_jax import hosts, sharding
from vqrae_jax.errors import UserError
from vqrae_jax.train import loop
from vqrae_jax.train.checkpoint import Checkpoints


def started(config, workdir, devices):
  """Two processes of a run, of so many devices each."""
  where = runs.free_address(), 2
  return [runs.started(config, workdir, devices, *where, i) for i in range(2)]


def train(config, workdir):
  """By two processes of two devices each."""
  runs.finished(runs.launched(config, workdir, 2))


def last_lines(processes):
  return [p.communicate(timeout=900)[1].splitlines()[-1] for p in processes]


@pytest.fixture
def config(tmp_path):
  folder = runs.images(tmp_path / 'images')
  return runs.plain(
    folder, eval=dict(source=str(folder), tile=16), duration=3,
    log=dict(every=1, images_every=2), mesh=dict(layout='fsdp'),
  )  # fmt: skip


def check_same(workdir, want):
  rows = runs.rows(workdir)
  assert [r['step'] for r in rows] == [1, 2, 3]
  for a, b in zip(rows, runs.rows(want), strict=True):
    for name in ('loss/l2', 'loss/commit'):
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-7)


def test_two_hosts_train_as_one(config, tmp_path, caplog, monkeypatch):
  mesh = sharding.make_mesh('fsdp', jax.devices()[:4])
  monkeypatch.setattr(sharding, 'make_mesh', lambda *_, **__: mesh)
  one, two = tmp_path / 'one', tmp_path / 'two'
  loop.train(config, one)
  train(config, two)
  check_same(two, one)
  tokenizer, _ = vqrae_jax.load_tokenizer(two / 'tokenizer')
  assert tokenizer.codebook_size == 64
  assert (two / 'reconstructions.png').exists()
  # Each has hashed its own files; what one of them lost is found.
  kept = Checkpoints(two / 'checkpoints')
  assert kept.steps() == [1, 2, 3]
  for path in two.glob('checkpoints/0*[23]/state/ocdbt.process_1/d/*'):
    path.write_bytes(path.read_bytes() + b' ')
  assert kept.latest()['step'] == 1
  words = 'checkpoint 3 is not used: 00000003/state/ocdbt.process_1'
  assert words in caplog.text
  # What two hosts saved at step 1, one goes on with.
  loop.train(config, two)
  check_same(two, one)


def test_hosts_that_differ_are_refused(config, tmp_path, monkeypatch):
  """By images or settings; where the images lie is each host's own."""
  sent = []

  def gathered(mine):
    sent.append(mine)
    return np.stack([sent[0], mine])

  monkeypatch.setattr(multihost_utils, 'process_allgather', gathered)
  copied = shutil.copytree(tmp_path / 'images', tmp_path / 'copied')
  same = dict(config['data'], source=str(copied))
  setups = [
    runs.setup(config | keys)
    for keys in ({}, dict(data=same), dict(seed=1), dict(ema=0.5))
  ]
  (copied / 'image3.png').unlink()
  setups.append(runs.setup(config | dict(data=same)))
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  for made, words in zip(
    setups, ('', '', 'settings', 'settings', 'images'), strict=True
  ):
    raised = pytest.raises(UserError, match=f'hosts 1 have other {words}')
    with raised if words else contextlib.nullcontext():
      made.check_agreement()


def test_a_gathered_leaf_is_dropped_before_the_next(monkeypatch):
  mesh = sharding.make_mesh('fsdp')
  place = sharding.NamedSharding(mesh, sharding.PartitionSpec('fsdp'))
  tree = [jax.device_put(np.full((64, 8), i, 'f4'), place) for i in range(4)]
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  before = set(map(id, jax.live_arrays()))
  for i, leaf in enumerate(sharding.host_leaves(tree, mesh)):
    np.testing.assert_array_equal(leaf, np.full((64, 8), i))
    assert before.issuperset(map(id, jax.live_arrays()))


@pytest.mark.slow
def test_two_hosts_begin_with_a_run(config, tmp_path):
  """Each reads all of it and keeps its share; the teacher's too. And two
  hosts verify and resume what one has saved."""
  parent, one, two = (tmp_path / n for n in ('parent', 'one', 'two'))
  held = dict(config, schedules=[['encoder/.*', None], ['.*', dict(lr=1e-3)]])
  train(held, parent)
  losses = config['losses'] | dict(distill=1.0)
  child = config | dict(init_from=str(parent), losses=losses, teacher='init')
  runs.finished(runs.started(child, one, 4))
  shutil.copytree(one, two)
  for gone in ('checkpoints/00000003', 'tokenizer'):
    shutil.rmtree(two / gone)
  train(child, two)
  check_same(two, one)


@pytest.mark.slow
def test_a_signal_to_one_host_stops_all_at_one_step(config, tmp_path):
  endless = config | dict(duration=100000, eval=None)
  processes = started(endless, tmp_path / 'run', 1)
  when = runs.at_step(3)
  runs.signalled(processes[1], tmp_path / 'run', when, signal.SIGTERM)
  (said,) = last_lines(processes[:1])
  assert 'stopped: by the scheduler after step' in said
  assert [p.returncode for p in processes] == [143, 143]
  last = runs.rows(tmp_path / 'run')[-1]['step']
  assert Checkpoints(tmp_path / 'run' / 'checkpoints').steps()[-1] == last


@pytest.mark.slow
@pytest.mark.parametrize('lost', [0, 1])
def test_a_lost_host_is_said_by_the_other(config, tmp_path, lost):
  endless = config | dict(duration=100000, eval=None)
  processes = started(endless, tmp_path / 'run', 1)
  runs.signalled(processes.pop(lost), tmp_path / 'run', runs.at_step(3))
  said = processes[0].communicate(timeout=900)[1]
  assert '\nerror: a host of this run is gone' in f'\n{said}'
  assert processes[0].returncode in (75, -signal.SIGABRT)


@pytest.mark.slow
def test_an_image_spread_over_hosts_is_refused(config, tmp_path):
  config['mesh'] = dict(layout='fsdp+tp', tensor=4)
  processes = started(config, tmp_path / 'run', 2)
  for said in last_lines(processes):
    assert 'mesh.tensor' in said
  assert all(p.returncode for p in processes)


def test_hosts_leave_together(monkeypatch):
  """JAX gives the last of them five minutes, and then aborts all."""
  waits = []

  def barrier(key, timeout_ms):
    waits.append(timeout_ms)

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(multihost, 'get_barrier_sync_fn', lambda: barrier)
  with hosts.loss_reported():
    assert not waits
  assert waits[0] > 24 * 3600 * 1000
  with pytest.raises(UserError), hosts.loss_reported():
    raise UserError('of this host alone')
  assert len(waits) == 1
  # A TPU slice that nobody joined by `jax.distributed`.
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: False)
  monkeypatch.setattr(multihost_utils, 'sync_global_devices', waits.append)
  with hosts.loss_reported():
    assert len(waits) == 1
  assert len(waits) == 2
