"""python -m benchmarks.nearest [--shapes=50176x16384x1536,…] [--rounds=10]
  [--json=FILE]
python -m benchmarks.nearest --report

The time of `nearest_code` beside the bare product of its shape (f32, highest
precision) and PyTorch's `addmm` + `argmin` and `cdist` + `argmin` in f32, all
in rounds that take turns. On a GPU also each way to search of `ops/nearest.py`
and `ops/nearest_kernels.py`, and a bf16 product. Tokens are codes moved by
a third of their distance from one another, around a direction they all share.
Each shape's row is written as it comes; `--report` puts all into
docs/quantizers.md.
"""

import argparse
import datetime
import functools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import report as report_lib
from vqrae_jax.ops import nearest, nearest_kernels

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'nearest'
GPU = jax.default_backend() == 'gpu'
SHAPES = dict(
  gpu='50176x16384x1536,50176x16384x256,50176x16384x32,100352x4096x768,'
  '12544x65536x64,12544x262144x8',
  cpu='1568x16384x1536,4096x4096x256,4096x16384x32,1024x65536x64,1024x262144x8',
)
CHOSEN = nearest.SEARCHES['cuda']
WAYS = dict(
  six=functools.partial(nearest.direct, precision=nearest.SIX_BF16),
  f32=nearest.direct,
  shortlist=nearest.shortlist,
  kernel=functools.partial(
    nearest.shortlist, groups=nearest_kernels.gpu_groups
  ),
)


def made(n, k, c):
  """(tokens f32[n c], codes f32[k c])."""

  @jax.jit
  def draw(key):
    keys = jax.random.split(key, 4)
    codes = jax.random.normal(keys[0], (k, c))
    near = codes[jax.random.randint(keys[1], (n,), 0, k)]
    z = near + jax.random.normal(keys[2], (n, c)) / 3
    return z + 3, codes + 3

  return draw(jax.random.key(0))


def contenders(n, k, c):
  z, codes = made(n, k, c)
  calls = {}

  def add(name, fn):
    program = jax.jit(fn).lower(z, codes).compile()
    calls[name] = lambda: jax.block_until_ready(program(z, codes))

  add('nearest_code', nearest.nearest_code)
  for name, way in WAYS.items() if GPU else ():
    nearest.SEARCHES['cuda'] = lambda codes, margins, way=way: way(codes)
    jax.clear_caches()
    add(name, lambda z, codes: nearest.nearest_code(z, codes))
  nearest.SEARCHES['cuda'] = CHOSEN
  add('product', lambda z, c: jnp.matmul(z, c.T, precision='highest'))
  if GPU:
    half = jnp.bfloat16
    a, b = z.astype(half), codes.astype(half)
    bare = jax.jit(lambda a, b: jnp.matmul(a, b.T))
    calls['product, bf16'] = lambda: jax.block_until_ready(bare(a, b))
  device = torch.device('cuda' if GPU else 'cpu')
  x, y = (torch.from_numpy(np.asarray(v)).to(device) for v in (z, codes))

  def theirs(fn):
    def call():
      with torch.inference_mode():
        for part in x.split(max(2**28 // k, 1)):  # 1 GiB of scores
          fn(part)
      if GPU:
        torch.cuda.synchronize()

    return call

  calls['torch addmm'] = theirs(
    lambda x: torch.addmm(0.5 * (y * y).sum(-1), x, y.T, alpha=-1).argmin(-1)
  )
  calls['torch cdist'] = theirs(lambda x: torch.cdist(x, y).argmin(-1))
  found = {n: np.asarray(f()) for n, f in calls.items() if n in WAYS}
  for name, index in found.items():
    print(f'{name}: {(index != found["f32"]).sum()} of {n} unlike f32')
  return calls


def report():
  """Writes a table of each machine into docs/quantizers.md."""
  made = []
  for path in sorted(RESULTS.glob('*.json')):
    found = json.loads(path.read_text())
    names = [n for n in found['rows'][0]['seconds'] if n != 'product']
    made += [
      ', '.join([found['hardware'], found['date'], *found['versions']]) + '.',
      '',
      f'| tokens, codes, width | product | {" | ".join(names)} |',
      '|---' * (2 + len(names)) + '|',
    ]
    for row in found['rows']:
      sizes = ', '.join(f'{int(x):,}' for x in row['shape'].split('x'))
      bare = row['seconds']['product']
      cells = [f'{row["seconds"][n] / bare:.2f}' for n in names]
      made.append(f'| {sizes} | {bare * 1e3:.1f} ms | {" | ".join(cells)} |')
    made.append('')
  report_lib.write('quantizers.md', 'nearest', '\n'.join(made).strip())


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  kind = jax.default_backend()
  parser.add_argument('--shapes', default=SHAPES['gpu' if GPU else 'cpu'])
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument(
    '--json', type=pathlib.Path, default=RESULTS / f'{kind}.json'
  )
  parser.add_argument('--report', action='store_true')
  options = parser.parse_args()
  if options.report:
    report()
    return
  found = dict(
    hardware=report_lib.hardware(),
    date=datetime.date.today().isoformat(),
    versions=[f'jax {jax.__version__}', f'torch {torch.__version__}'],
    rows=[],
  )
  for shape in options.shapes.split(','):
    calls = contenders(*map(int, shape.split('x')))
    times = {name: [] for name in calls}
    for _ in range(options.rounds + 1):
      for name, call in calls.items():
        began = time.perf_counter()
        call()
        times[name].append(time.perf_counter() - began)
    row = {n: statistics.median(x[1:]) for n, x in times.items()}
    found['rows'].append(dict(shape=shape, seconds=row))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + '\n')
    bare = row['product']
    ratios = ', '.join(f'{n} {s / bare:.2f}' for n, s in row.items())
    print(f'{shape}: product {bare * 1e3:.2f} ms; {ratios}', flush=True)


if __name__ == '__main__':
  main()
