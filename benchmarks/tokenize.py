"""python -m benchmarks.tokenize [--data=DATA] [--images=16] [--rounds=6]
  [--json=FILE]

What `vqrae_jax.tokenize` costs beside the encoder, at 256 px:

- images/s of a worker that writes shards, with a ViT-B/16 of random weights,
  beside bare `encode_to_indices` on as many images in memory; rounds take
  turns, and the ratio is that of the medians, of the clock and of the time of
  all processors;
- milliseconds of the host's processors, and of the clock, for an image with an
  encoder that does nothing.

The load of the machine is in the result: other processes slow both sides down,
and make the ratio uncertain.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np

import vqrae_jax
from vqrae_jax import export, tokenize
from vqrae_jax.data.sources import open_source

VIT = dict(
  width=768, depth=12, mlp_dim=3072, num_heads=12, patch_size=16, grid=(16, 16)
)
MODEL = dict(
  encoder=dict(vit=VIT),
  quantizer=dict(name='fsq', levels=(8, 8, 8, 5, 5, 5), convention='cosmos'),
  decoder=dict(vit=VIT | dict(depth=1, posemb='sincos2d')),
)


class Stub(tokenize.Worker):
  """A worker whose encoder gives zeros at once."""

  def encode(self, images):
    """i32[b 16 16]."""
    return np.zeros((len(images), 16, 16), np.int32)


def _worker(kind, folder, data, number, batch, shard):
  return kind(
    tokenize.Job(
      tokenizer=f'{folder}/tokenizer',
      data=data,
      out=f'{folder}/{number}',
      batch_size=batch,
      shard_images=shard,
    )
  )


def speed(folder, data, images, rounds, batch) -> dict:
  """Images/s of a worker and of the bare encoder, in turns."""
  made = vqrae_jax.load_tokenizer(f'{folder}/tokenizer')
  encode = jax.jit(vqrae_jax.encode_to_indices, static_argnums=0)
  pixels = np.random.default_rng(0).integers(
    0, 256, (batch, 256, 256, 3), np.uint8
  )
  worker = _worker(tokenize.Worker, folder, data, 'dump', batch, images)
  jax.block_until_ready(encode(*made, pixels))  # compiled
  jax.block_until_ready(worker.encode(pixels))

  def bare(number):
    for _ in range(images // batch):
      np.asarray(encode(*made, pixels))

  def write(number):
    written, _ = worker.write(number)
    if written != images:
      raise SystemExit(
        f'shard {number} has {written} images: data of files must have '
        f'--images={images} in each'
      )

  taken, used = dict(bare=[], worker=[]), dict(bare=[], worker=[])
  for number in range(rounds):
    for name, run in (('bare', bare), ('worker', write)):
      start, clock = time.perf_counter(), time.process_time()
      run(number)
      taken[name].append(time.perf_counter() - start)
      used[name].append(time.process_time() - clock)
    print(f'round {number}: ' + ', '.join(
      f'{name} {images / times[-1]:.3f} images/s'
      for name, times in taken.items()
    ), flush=True)  # fmt: skip

  def ratio(times):
    bare, mine = (statistics.median(times[name]) for name in times)
    return bare / mine

  return dict(
    images_per_second=images / statistics.median(taken['worker']),
    bare_images_per_second=images / statistics.median(taken['bare']),
    ratio=ratio(taken),
    ratio_of_cpu_time=ratio(used),
    seconds=taken,
    cpu_seconds=used,
  )


def host(folder, data, batch) -> dict:
  """Milliseconds an image without an encoder."""
  count = len(open_source(data))
  worker = _worker(Stub, folder, data, 'stub', batch, count)
  start, clock = time.perf_counter(), time.process_time()
  images = sum(worker.write(number)[0] for number in range(worker.count))
  clock, wall = time.process_time() - clock, time.perf_counter() - start
  return dict(
    images=images,
    cpu_ms_per_image=1000 * clock / images,
    wall_ms_per_image=1000 * wall / images,
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', default='bundled:photos')
  parser.add_argument('--images', type=int, default=16)
  parser.add_argument('--rounds', type=int, default=6)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--only', choices=('speed', 'host'))
  parser.add_argument('--json', type=pathlib.Path)
  flags = parser.parse_args()
  found = dict(
    date=datetime.date.today().isoformat(),
    device=jax.devices()[0].device_kind,
    processors=len(os.sched_getaffinity(0)),
    jax=jax.__version__,
    data=flags.data,
    load_before=os.getloadavg(),
  )
  with tempfile.TemporaryDirectory() as folder:
    tokenizer = vqrae_jax.build_tokenizer(MODEL)
    init = jax.jit(tokenizer.init)
    variables = init(jax.random.key(0), np.zeros((1, 256, 256, 3), np.uint8))
    export.save_tokenizer(tokenizer, variables, f'{folder}/tokenizer')
    del variables
    if flags.only != 'speed':
      found['host'] = host(folder, flags.data, 32)
      print(found['host'], flush=True)
    if flags.only != 'host':
      found['speed'] = speed(
        folder, flags.data, flags.images, flags.rounds, flags.batch
      )
  found['load_after'] = os.getloadavg()
  text = json.dumps(found, indent=1)
  print(text)
  if flags.json:
    flags.json.write_text(text + '\n')


if __name__ == '__main__':
  main()
