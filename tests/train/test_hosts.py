"""Two real processes train as one: same batches, same losses, one export."""

import json
import os
import pathlib
import socket
import subprocess
import sys

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
from vqrae_jax.train import loop
config = json.loads(config)
config['schedules'] = tuple(map(tuple, config['schedules']))
loop.train(config, workdir)
"""


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def train(config, workdir, processes, devices):
  address = f'127.0.0.1:{free_port()}'
  flag = f'--xla_force_host_platform_device_count={devices}'
  env = os.environ | {'XLA_FLAGS': flag, 'JAX_PLATFORMS': 'cpu'}
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


def test_two_hosts_train_as_one(config, tmp_path):
  config['mesh'] = dict(layout='fsdp')
  one, two = tmp_path / 'one', tmp_path / 'two'
  assert train(config, one, 1, 4)[0][0] == 0
  ends = train(config, two, 2, 2)
  assert [code for code, _ in ends] == [0, 0], ends
  rows = [
    [json.loads(line) for line in (d / 'metrics.jsonl').open()]
    for d in (one, two)
  ]
  assert [r['step'] for r in rows[1]] == [1, 2, 3]
  for a, b in zip(*rows, strict=True):
    for name in ('loss/l2', 'loss/commit'):
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-7)
  tokenizer, _ = vqrae_jax.load_tokenizer(two / 'tokenizer')
  assert tokenizer.codebook_size == 64
  assert (two / 'reconstructions.png').exists()


def test_an_image_spread_over_hosts_is_refused(config, tmp_path):
  config['mesh'] = dict(layout='fsdp+tp', tensor=4)
  ends = train(config, tmp_path / 'run', 2, 2)
  for code, last in ends:
    assert code != 0
    assert 'must divide the 2 devices of a host' in last
