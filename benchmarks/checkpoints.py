"""python -m benchmarks.checkpoints [--a=OLD] [--b=NEW] [--gib=1] [--pairs=8]

What a checkpoint costs in source trees, save by save in turns, so that other
load on the machine meets both alike: seconds that `save` holds the loop, then
until the files and their hashes are there, CPU seconds of all that, what it
takes from the work that goes on meanwhile (matrix products, as a step has
them), bytes on disk, and CPU seconds of the check and of restoring it.

The state is random normals, which compress as weights do. Each tree runs in a
process of its own on one CPU device, in a folder of its own below --folder.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from concurrent import futures

KEPT = 2


def _clocks():
  return time.perf_counter(), time.process_time()


def _since(began):
  return tuple(b - a for a, b in zip(began, _clocks(), strict=True))


def _state(gib):
  """Stacked kernels as parameters, two moments and an average have them."""
  import jax.numpy as jnp
  import numpy as np

  rng = np.random.default_rng(0)
  blocks = max(round(gib * 2**30 / (4 * 6 * 4 * 1024 * 1024)), 1)
  shape = blocks, 1024, 1024
  return {
    part: {
      f'k{i}': jnp.asarray(0.02 * rng.standard_normal(shape, np.float32))
      for i in range(6)
    }
    for part in ('params', 'mu', 'nu', 'ema')
  }


def worker(folder, gib):
  """Makes a checkpoint for each line read, and says what it cost."""
  import jax
  import jax.numpy as jnp

  from vqrae_jax.train.checkpoint import Checkpoints

  state = _state(gib)
  kept = Checkpoints(folder / 'checkpoints', KEPT)
  product = jax.jit(lambda x: x @ x * 1e-3)
  x = jnp.ones((1024, 1024))

  def call():
    began = _clocks()
    product(x).block_until_ready()
    return _since(began)

  call()
  thread = futures.ThreadPoolExecutor(1)
  for step, line in enumerate(sys.stdin, 1):
    quiet = [call() for _ in range(30)]
    wall, cpu = map(statistics.median, zip(*quiet, strict=True))
    began, busy, calls = _clocks(), line.strip() == 'busy', 0
    kept.save(step, state, {})
    stall = _since(began)[0]
    writing = thread.submit(kept.wait)
    while busy and not writing.done():
      call()
      calls += 1
    writing.result()
    seconds, cpu_seconds = _since(began)
    row = {
      'stall s': stall,
      'CPU s behind it': cpu_seconds - calls * cpu,
      'until written s': seconds,
    }
    if busy:
      row = {'lost by other work s': seconds - calls * wall}
    else:
      made = folder / 'checkpoints' / f'{step:08d}'
      files = [p for p in made.rglob('*') if p.is_file()]
      row['GiB on disk'] = sum(p.stat().st_size for p in files) / 2**30
      began = _clocks()
      manifest = kept.latest()
      row['check CPU s'] = _since(began)[1]
      began = _clocks()
      shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state,
      )
      jax.block_until_ready(kept.restore(manifest, shapes))
      row['restore CPU s'] = _since(began)[1]
    print(json.dumps(row), flush=True)
  kept.close()


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--a', default='.', help='a source tree')
  parser.add_argument('--b', default='.', help='the one compared with it')
  parser.add_argument('--gib', type=float, default=1.0)
  parser.add_argument('--pairs', type=int, default=8)
  parser.add_argument('--folder', help='where the checkpoints lie meanwhile')
  parser.add_argument('--worker', type=pathlib.Path, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.worker:
    worker(options.worker, options.gib)
    return
  from benchmarks import report  # a worker's tree may have another

  with tempfile.TemporaryDirectory(dir=options.folder) as folder:
    workers = [
      report.Worker(
        root,
        __file__,
        f'--worker={tempfile.mkdtemp(dir=folder)}',
        f'--gib={options.gib}',
      )
      for root in (options.a, options.b)
    ]
    rows = [
      [w.ask('quiet') | w.ask('busy') for w in workers]
      for _ in range(options.pairs + 1)
    ][1:]  # the first pair warms up
    for w in workers:
      w.close()
  load = ' '.join(f'{x:.1f}' for x in os.getloadavg())
  print(f'{options.gib:g} GiB, {len(rows)} pairs, load {load}')
  print(f'{"":22}{"a":>9}{"b":>9}{"b / a":>9}  (medians; least to most)')
  for name in rows[0][0]:
    a, b = zip(*((x[name], y[name]) for x, y in rows), strict=True)
    print(
      f'{name:22}{statistics.median(a):9.3f}{statistics.median(b):9.3f}'
      f'{statistics.median(y / x for x, y in zip(a, b, strict=True)):9.3f}'
      f'  {min(a):.3f}-{max(a):.3f}, {min(b):.3f}-{max(b):.3f}'
    )


if __name__ == '__main__':
  main()
