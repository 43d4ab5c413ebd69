"""Two real processes train as one: same batches, same losses, one export."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]

WORKER = """
import json, sys
import jax
address, rank, count, config, workdir = sys.argv[1:]
if int(count) > 1:
  jax.distributed.initialize(address, int(count), int(rank))
from vqrae_jax import sharding
from vqrae_jax.train import loop
sharding.compile_afresh_on_cpu()
config = json.loads(config)
config['schedules'] = tuple(map(tuple, config['schedules']))
loop.train(config, workdir)
"""


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def train(config, workdir, processes, devices, until=None):
  """[(exit code, last words)] of each process.

  `until(workdir)` becoming true sends the last process a SIGTERM.
  """
  address = f'127.0.0.1:{free_port()}'
  env = tiny.alone(devices)
  words = [json.dumps(config), str(workdir)]
  running = [
    subprocess.Popen(
      [
        sys.executable,
        '-c',
        WORKER,
        address,
        str(rank),
        str(processes),
        *words,
      ],
      env=env,
      cwd=ROOT,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(processes)
  ]
  while until and all(p.poll() is None for p in running):
    if until(workdir):
      running[-1].send_signal(signal.SIGTERM)
      break
    time.sleep(0.01)
  ends = [(p.communicate(timeout=300)[1], p.returncode) for p in running]
  return [(code, err.strip().split('\n')[-1]) for err, code in ends]


@pytest.fixture
def config(tmp_path):
  photos = tmp_path / 'photos'
  photos.mkdir()
  for i in range(5):
    Image.fromarray(tiny.images(1, 20, 30, seed=i)[0]).save(photos / f'{i}.png')
  return tiny.run(
    'vq-ema',
    data=dict(source=str(photos), image_size=16),
    eval=dict(source=str(photos), tile=16),
    log=dict(every=1, images_every=2),
    duration=3,
  )


def rows_of(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').open()]


def test_two_hosts_train_as_one(config, tmp_path):
  config |= dict(mesh=dict(layout='fsdp'), checkpoint=dict(every=1))
  one, two = tmp_path / 'one', tmp_path / 'two'
  assert train(config, one, 1, 4)[0][0] == 0
  ends = train(config, two, 2, 2)
  assert [code for code, _ in ends] == [0, 0], ends
  rows = rows_of(one)
  same(rows_of(two), rows)
  tokenizer, _ = vqrae_jax.load_tokenizer(two / 'tokenizer')
  assert tokenizer.codebook_size == 64
  assert (two / 'reconstructions.png').exists()
  # What two hosts saved at step 1, one goes on with.
  for step in (2, 3):
    (two / 'checkpoints' / f'{step:08d}.json').unlink()
  assert train(config, two, 1, 4)[0][0] == 0
  same(rows_of(two), rows)


@pytest.mark.slow
def test_two_hosts_begin_with_a_run(config, tmp_path):
  """Each reads the whole of it and lays down its share; so is the teacher."""
  config |= dict(mesh=dict(layout='fsdp'), checkpoint=dict(every=1))
  parent, one, two = (tmp_path / n for n in ('parent', 'one', 'two'))
  held = dict(config, schedules=[['encoder/.*', None], ['.*', dict(lr=1e-3)]])
  assert train(held, parent, 2, 2)[0][0] == 0
  child = config | dict(
    init_from=str(parent),
    losses=config['losses'] | dict(distill=1.0),
    teacher='init',
  )
  assert train(child, one, 1, 4)[0][0] == 0
  ends = train(child, two, 2, 2)
  assert [code for code, _ in ends] == [0, 0], ends
  same(rows_of(two), rows_of(one))


def same(rows, want):
  assert [r['step'] for r in rows] == [1, 2, 3]
  for a, b in zip(rows, want, strict=True):
    assert a['samples'] == b['samples']
    for name in ('loss/l2', 'loss/commit'):
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-7)


def test_a_signal_to_one_host_stops_all_at_one_step(config, tmp_path):
  config |= dict(duration=100000, eval=None)

  def going(workdir):
    path = workdir / 'metrics.jsonl'
    return path.exists() and len(path.read_text().splitlines()) > 2

  ends = train(config, tmp_path / 'run', 2, 1, until=going)
  words = {last for _, last in ends}
  assert len(words) == 1, ends
  assert 'Stopped: by the scheduler after step' in words.pop()
  last = rows_of(tmp_path / 'run')[-1]['step']
  assert (tmp_path / 'run' / 'checkpoints' / f'{last:08d}.json').exists()


def test_an_image_spread_over_hosts_is_refused(config, tmp_path):
  config['mesh'] = dict(layout='fsdp+tp', tensor=4)
  ends = train(config, tmp_path / 'run', 2, 2)
  for code, last in ends:
    assert code != 0
    assert 'must divide the 2 devices of a host' in last
