"""Tiny runs: their configs, their starts, and processes of their own."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from PIL import Image

from tests import tiny
from tests.train import pieces
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import initialize
from vqrae_jax.train import setup as setup_lib
from vqrae_jax.train.checkpoint import Checkpoints
from vqrae_jax.train.reporting import read_summary

OPEN = (('.*', dict(lr=1e-3)),)
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
  sharding.compile_afresh_on_cpu()
  loop.train(json.loads(config), workdir)
cli.run(main)
"""


def free_address() -> str:
  """Of a port that no one listens at."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{s.getsockname()[1]}'


def setup(config: dict, mesh=None) -> setup_lib.Setup:
  return setup_lib.setup(config_lib.read_config(config), mesh)


def begun(config: dict, mesh=None) -> initialize.Started:
  """The run's state at step 0."""
  made = setup(config, mesh)
  with jax.set_mesh(made.mesh):
    return initialize.initialize(made)


def plain(folder: pathlib.Path, kind: str = 'vq-ema', **keys) -> dict:
  """A run of 4 steps on the images of `folder`, each step saved."""
  data = dict(source=str(folder), image_size=16)
  log = dict(every=1, images_every=0, usage_window=5, tensorboard=False)
  config = dict(data=data, log=log, checkpoint=dict(every=1, keep=3), ema=0.9)
  return tiny.run(kind, **config | keys)


def gan(folder: pathlib.Path, **keys) -> dict:
  """16 steps with a discriminator that starts after the first ones."""
  config = dict(
    checkpoint=dict(every=3, keep=2),
    mesh=dict(layout='fsdp'),
    losses=tiny.LOSSES['vq-ema'] | dict(gan=dict(weight=0.5, start=4)),
    discriminator=pieces.DINO | dict(start=2),
    init=dict(networks='random'),
    schedules=(('encoder/embed/.*', None), ('.*', dict(lr=1e-3, warmup=3))),
    duration=GAN_STEPS,
  )
  return plain(folder, **config | keys)


def images(folder: pathlib.Path, h: int = 40, w: int = 48) -> pathlib.Path:
  """Fills a new folder with four images; returns it."""
  folder.mkdir()
  for i in range(4):
    image = Image.fromarray(tiny.images(1, h, w, seed=i)[0])
    image.save(folder / f'image{i}.png')
  return folder


def started(config, workdir, devices, address='', count=1, rank=0):
  """The process of a run, or one of `count` of it."""
  words = workdir, json.dumps(config), address, count, rank
  return python(WORKER, devices, *words)


def config_file(config: dict, path: pathlib.Path) -> pathlib.Path:
  """The file, which gives that config."""
  path.write_text(f'def get_config():\n  return {config!r}\n')
  return path


def launched(config, workdir, devices):
  """Two processes of a run by `launch/local.py`, of so many devices each."""
  file = config_file(config, workdir.with_suffix('.py'))
  return subprocess.Popen(
    [sys.executable, 'launch/local.py', f'--devices={devices}', '--',
     f'--config={file}', f'--workdir={workdir}'],
    cwd=ROOT, env=tiny.alone(1), stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def python(code, devices, *words):
  """A process that runs `code` on so many devices."""
  return subprocess.Popen(
    [sys.executable, '-c', code, *map(str, words)],
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


def last_state(workdir: pathlib.Path) -> dict[str, bytes]:
  """{leaf name: its bytes} of the newest checkpoint."""
  kept = Checkpoints(workdir / 'checkpoints')
  manifest = kept.latest()
  shapes = {
    name: np.broadcast_to(np.zeros((), dtype), shape)
    for name, (shape, dtype) in manifest['leaves'].items()
  }
  found = kept.restore(manifest, shapes, part=True)
  return {name: np.asarray(x).tobytes() for name, x in found.items()}


def check_same(workdir: pathlib.Path, want: pathlib.Path) -> None:
  """All rows but clocks, the figures and every array of the last checkpoint
  are those of a run that nothing stopped."""
  found, wanted = rows(workdir), rows(want)
  assert [r['step'] for r in wanted] == list(range(1, len(wanted) + 1))
  for a, b in zip(found, wanted, strict=True):
    assert tiny.without_clocks(a) == tiny.without_clocks(b)
  figures, wanted = map(read_summary, (workdir, want))
  for name in ('fingerprint', 'skipped', 'steps'):
    assert figures[name] == wanted[name], name
  assert last_state(workdir) == last_state(want)


def at_step(step):
  return lambda workdir: any(r['step'] >= step for r in rows(workdir))


def signalled(process, workdir, when, number=signal.SIGKILL) -> str:
  """Sends a signal once `when(workdir)`; what the process said."""
  while process.poll() is None and not when(workdir):
    time.sleep(0.001)
  process.send_signal(number)
  return process.communicate(timeout=900)[1]
