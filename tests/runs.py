"""Tiny runs in processes of their own."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

from PIL import Image

from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
GAN_STEPS = 16

WORKER = """
import json, sys
from vqrae_jax import cli
def main(argv):
  workdir, config, address, count, rank = argv
  import jax
  if address:
    jax.distributed.initialize(address, int(count), int(rank))
  from vqrae_jax import sharding
  from vqrae_jax.train import loop
  config = json.loads(config)
  config['schedules'] = tuple(map(tuple, config['schedules']))
  sharding.compile_afresh_on_cpu()
  loop.train(config, workdir)
cli.run(main)
"""


def free_address() -> str:
  """Of a port that no one listens at."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{s.getsockname()[1]}'


def plain(folder: pathlib.Path, **keys) -> dict:
  """A run of 4 steps on the images of `folder`, each step saved."""
  data = dict(source=str(folder), image_size=16)
  log = dict(every=1, images_every=0, usage_window=5, tensorboard=False)
  config = dict(data=data, log=log, checkpoint=dict(every=1, keep=3), ema=0.9)
  return tiny.run('vq-ema', **config | keys)


def gan(folder: pathlib.Path, **keys) -> dict:
  """16 steps with a discriminator that starts after the first ones."""
  vit = dict(width=16, depth=2, mlp_dim=32, num_heads=2, grid=(2, 2))
  fields = dict(vit=vit, taps=(1, 0), kernel=3)
  config = dict(
    checkpoint=dict(every=3, keep=2),
    mesh=dict(layout='fsdp'),
    losses=tiny.LOSSES['vq-ema'] | dict(gan=dict(weight=0.5, start=4)),
    discriminator=dict(name='dino', fields=fields, start=2, lecam=0.01),
    init=dict(networks='random'),
    schedules=(('encoder/embed/.*', None), ('.*', dict(lr=1e-3, warmup=3))),
    duration=GAN_STEPS,
  )
  return plain(folder, **config | keys)


def images(folder: pathlib.Path) -> pathlib.Path:
  """Fills a new folder with five images; returns it."""
  folder.mkdir()
  for i in range(5):
    Image.fromarray(tiny.images(1, 20, 30, seed=i)[0]).save(folder / f'{i}.png')
  return folder


def started(config, workdir, devices, address='', count=1, rank=0):
  """The process of a run, or one of `count` of it."""
  words = [workdir, json.dumps(config), address, count, rank]
  return subprocess.Popen(
    [sys.executable, '-c', WORKER, *map(str, words)],
    cwd=ROOT,
    env=tiny.alone(devices) | {'PYTHONPATH': str(ROOT)},
    stderr=subprocess.PIPE,
    text=True,
  )


def finished(process) -> str:
  """What it says on stderr; it must succeed."""
  said = process.communicate(timeout=900)[1]
  assert process.returncode == 0, said
  return said


def rows(workdir: pathlib.Path) -> list[dict]:
  """metrics.jsonl, also while it is being written."""
  path = workdir / 'metrics.jsonl'
  found = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      found.append(json.loads(line))
    except ValueError:
      break
  return found


def at_step(step):
  return lambda workdir: any(r['step'] >= step for r in rows(workdir))


def signalled(process, workdir, when, number=signal.SIGKILL) -> str:
  """Sends a signal once `when(workdir)`; what the process said."""
  while process.poll() is None and not when(workdir):
    time.sleep(0.001)
  process.send_signal(number)
  return process.communicate(timeout=900)[1]
