"""A run that is killed and started again is the run that was not.

The runs are real processes on 8 fake devices, killed by SIGKILL: no handler,
no flush. Both players are in them: a codebook and weights with averages, a
discriminator with power iterations and LeCam's averages, which begins after the
first steps. Compared are all rows of metrics.jsonl but clocks, with the running
checksum of the samples, the fingerprint of the tokenizer at the end, and every
array of the last checkpoint.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vqrae_jax.train.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 24
DINO = dict(
  name='dino',
  fields=dict(
    vit=dict(width=16, depth=2, mlp_dim=32, num_heads=2, grid=(2, 2)),
    taps=(1, 0),
    kernel=3,
  ),
  start=2,
  lecam=0.01,
)

WORKER = """
import json, sys
from vqrae_jax import command, sharding
from vqrae_jax.train import loop
config = json.loads(sys.argv[1])
config['schedules'] = tuple(map(tuple, config['schedules']))
sharding.compile_afresh_on_cpu()
command.run(lambda _: loop.train(config, sys.argv[2]))
"""


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  photos = tmp_path_factory.mktemp('photos')
  for i in range(5):
    Image.fromarray(tiny.images(1, 20, 30, seed=i)[0]).save(photos / f'{i}.png')
  return tiny.run(
    'vq-ema',
    data=dict(source=str(photos), image_size=16),
    log=dict(every=1, images_every=0, usage_window=5, tensorboard=False),
    checkpoint=dict(every=3, keep=2),
    mesh=dict(layout='fsdp'),
    losses=tiny.LOSSES['vq-ema'] | dict(gan=dict(weight=0.5, start=4)),
    discriminator=DINO,
    init=dict(networks='random'),
    schedules=(
      ('encoder/embed/.*', None),
      ('.*', dict(lr=1e-3, warmup=3)),
    ),
    duration=STEPS,
  )


def started(config, workdir):
  return subprocess.Popen(
    [sys.executable, '-c', WORKER, json.dumps(config), str(workdir)],
    cwd=ROOT,
    env=os.environ | tiny.CACHE | {'JAX_PLATFORMS': 'cpu'},
    stderr=subprocess.PIPE,
    text=True,
  )


def rows(workdir):
  found = []
  path = workdir / 'metrics.jsonl'
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      found.append(json.loads(line))
    except ValueError:  # the line being written
      break
  return found


def at_step(step):
  return lambda workdir: any(r['step'] >= step for r in rows(workdir))


def in_a_save(workdir):
  """Files of a step are there, and its manifest is not."""
  folder = workdir / 'checkpoints'
  names = {p.name for p in folder.glob('0*')} if folder.is_dir() else set()
  torn = {n[:8] for n in names} - {n[:8] for n in names if n.endswith('.json')}
  return bool(torn - {'00000003'})  # not at the first: nothing to go back to


def killed(config, workdir, when):
  """Runs until `when(workdir)`, then SIGKILL; whether it was in time."""
  process = started(config, workdir)
  while process.poll() is None:
    if when(workdir):
      process.send_signal(signal.SIGKILL)
      break
    time.sleep(0.001)
  process.communicate()
  return process.returncode == -signal.SIGKILL


def signalled(config, workdir, when):
  """Runs until `when(workdir)`, then SIGTERM: it saves, says so, stops."""
  process = started(config, workdir)
  while process.poll() is None and not when(workdir):
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  err = process.communicate()[1]
  assert process.returncode == 143, err
  assert 'stopped: by SIGTERM after step' in err.splitlines()[-1]
  last = rows(workdir)[-1]['step']
  assert (workdir / 'checkpoints' / f'{last:08d}.json').exists()


def finished(config, workdir):
  process = started(config, workdir)
  err = process.communicate(timeout=300)[1]
  assert process.returncode == 0, err
  figures = json.loads((workdir / 'summary.json').read_text())
  return [tiny.without_clocks(r) for r in rows(workdir)], figures, err, workdir


def last_state(workdir):
  """{leaf name: its bytes} of the newest checkpoint."""
  kept = Checkpoints(workdir / 'checkpoints')
  manifest = kept.latest()
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    for name, (shape, dtype) in manifest['leaves'].items()
    if name != 'rng'
  }
  found = kept.restore(manifest, shapes, part=True)
  kept.close()
  return {name: np.asarray(x).tobytes() for name, x in found.items()}


@pytest.fixture(scope='module')
def uninterrupted(config, tmp_path_factory):
  return finished(config, tmp_path_factory.mktemp('whole'))


def same(found, want):
  rows_found, figures, _, at = found
  rows_want, wanted, _, at_want = want
  assert [r['step'] for r in rows_found] == list(range(1, STEPS + 1))
  assert rows_found == rows_want
  for name in ('fingerprint', 'samples', 'skipped', 'steps'):
    assert figures[name] == wanted[name], name
  assert rows_found[-1]['loss/discriminator'] > 0
  leaves = last_state(at)
  assert leaves == last_state(at_want)
  for part in ('ema/', 'codebook/', 'discriminator/stats/spectral/', 'usage'):
    assert any(name.startswith(part) for name in leaves), part


def test_killed_at_a_step_stopped_by_a_signal_killed_in_a_save(
  config, uninterrupted, tmp_path
):
  assert killed(config, tmp_path, at_step(8))
  signalled(config, tmp_path, at_step(11))
  in_time = killed(config, tmp_path, in_a_save)
  found = finished(config, tmp_path)
  print(f'killed in a save: {in_time}')
  assert 'goes on from step' in found[2]
  same(found, uninterrupted)


@pytest.mark.slow
def test_killed_at_ten_random_steps(config, uninterrupted, tmp_path):
  rng = random.Random(0)
  kills, saves = 0, 0
  for step in sorted(rng.sample(range(2, STEPS), 10)):
    kills += killed(config, tmp_path, at_step(step))
  # And ten times as soon as a save has begun, from the start each.
  same(finished(config, tmp_path), uninterrupted)
  for i in range(4):
    workdir = tmp_path / f'save{i}'
    saves += killed(config, workdir, in_a_save)
    same(finished(config, workdir), uninterrupted)
  print(f'{kills} kills at random steps, {saves} in a save')
  assert kills == 10 and saves >= 1
