"""python -m benchmarks.cifar --cache=cifar.npz [--side=ours] [--only=vq,fsq]
  [--steps=1000] [--seeds=3] [--json=F] [--compile]

Tokenizers of CIFAR-10 from scratch, all of one model and budget: 32-pixel
images as 64 tokens of 10 bits (FSQ 9.966), a ViT of two blocks of 128 channels
on either side, 1000 steps of 64 images, L2 and the quantizer's own losses,
AdamW. Three seeds of each quantizer; a seed decides the order of images and the
first weights of both ViTs, which are the same under each quantizer.

Beside them vector-quantize-pytorch's quantizers, the class and the settings of
`PEERS`, in a PyTorch loop: the same ViTs (`torch_peers.ViT`) from the same
first weights, the same batches, losses, clipping, AdamW and schedule. Products
of the ViTs are f32 on a CPU and TF32 on a GPU, on both sides; the quantizers'
are f32 everywhere, but for the backward of PyTorch's.

Measured on the test images with the last weights: PSNR of the pooled error,
SSIM, and of the codes that they take usage, perplexity and effective bits (the
entropy of a token's codes). Images a second are measured apart, at the end of
`--side=both`, in short rounds that take turns; with `--compile` beside
torch.compile of the other side's ViTs too. The runs of the two sides go on
side by side there, in two processes. JSON is written after every run.

    python -m benchmarks.cifar --cache=cifar.npz --data=FOLDER   (the cache)
    python -m benchmarks.cifar --report                  (docs/results.md)

The cache has the JPEG files of a folder of webdataset shards, which are
decoded at the start: 15,000 images to train on and 1,500 to measure, 15 MB.
"""

import argparse
import concurrent.futures
import datetime
import functools
import io
import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tarfile
import textwrap
import time

# Threads that wait would take the time of the other side.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
os.environ.setdefault('XLA_FLAGS', '--xla_gpu_enable_triton_gemm=false')

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks import report as report_lib
from vqrae_jax import optim
from vqrae_jax.evaluate import metrics
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.specs import RunOptions
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'cifar.json'
SIDE, PATCH, GRID = 32, 4, (8, 8)
VIT = dict(
  width=128,
  depth=2,
  num_heads=2,
  mlp_dim=512,
  patch_size=PATCH,
  grid=GRID,
  scan=False,
)
ADAMW = optim.AdamWConfig(b2=0.95, weight_decay=0.01)
COMMIT = 0.02
PART = 250  # test images at once
CODES, LEVELS = 1024, (8, 5, 5, 5)
VQ = dict(name='vq', num_codes=CODES)
# name: (the quantizer, the weights of its losses)
OURS = {
  'vq': (VQ, dict(commit=COMMIT)),
  'simvq': (
    dict(name='simvq', num_codes=CODES, code_dim=192),
    dict(codebook=1.0, commit=COMMIT),
  ),
  'fsq': (dict(name='fsq', levels=LEVELS, convention='cosmos'), {}),
  'lfq': (dict(name='lfq', bits=10), dict(commit=COMMIT, entropy=0.005)),
  'residual': (
    dict(name='residual', stages=2, quantizer=VQ | dict(num_codes=32)),
    dict(commit=COMMIT),
  ),
}
PEERS = {
  'vq': (
    'VectorQuantize',
    dict(
      codebook_size=CODES,
      kmeans_init=True,
      threshold_ema_dead_code=2,
      commitment_weight=COMMIT,
    ),
  ),
  'fsq': ('FSQ', dict(levels=list(LEVELS))),
}


# -- data --------------------------------------------------------------------
def make_cache(folder, path):
  """The JPEG files of FOLDER/{train,test}-*.tar, one after another."""
  arrays = {}
  for split in ('train', 'test'):
    files = []
    for shard in sorted(pathlib.Path(folder).glob(f'{split}-*.tar')):
      with tarfile.open(shard) as tar:
        members = [m for m in tar if m.name.endswith('.jpg')]
        files += [tar.extractfile(m).read() for m in members]
    arrays[split] = np.frombuffer(b''.join(files), np.uint8)
    arrays[f'{split}_ends'] = np.cumsum([len(x) for x in files])
  np.savez(path, **arrays)


def images_of(path, split):
  """uint8 [n 32 32 3]."""
  with np.load(path) as cache:
    data, ends = cache[split].tobytes(), [0, *cache[f'{split}_ends'].tolist()]
  files = (data[a:b] for a, b in itertools.pairwise(ends))
  return np.stack([np.asarray(Image.open(io.BytesIO(x))) for x in files])


def order_of(seed, images, options):
  """(i32[steps batch], a permutation an epoch; bool[steps batch], which are
  mirrored)."""
  rng = np.random.default_rng(seed)
  shape = options.steps, options.batch
  epochs = -(-math.prod(shape) // images)
  rows = np.concatenate([rng.permutation(images) for _ in range(epochs)])
  rows = rows[: math.prod(shape)].reshape(shape).astype(np.int32)
  return rows, rng.random(shape) < 0.5


def schedule_of(options):
  return optim.Schedule(options.lr, warmup=options.steps // 12)


# -- ours --------------------------------------------------------------------
def ours(name, options):
  """(StepSpec, its numbers) of a quantizer."""
  section, losses = OURS[name]
  tokenizer = build_tokenizer(
    dict(
      encoder=dict(vit=VIT),
      quantizer=section,
      decoder=dict(vit=VIT | dict(posemb='sincos2d')),
    )
  )
  params = jax.eval_shape(lambda: state_lib.random_variables(tokenizer, 0))
  leaves = trees.flatten(params['params'])
  optimizer, numbers = optim.make_optimizer(
    ADAMW, dict.fromkeys(leaves, schedule_of(options)), leaves, options.steps, 1
  )
  weights = dict(l2=1.0, **losses)
  spec = state_lib.StepSpec(
    tokenizer=tokenizer,
    optimizer=optimizer,
    losses=tuple(weights),
    other_losses=(),
    image_size=(SIDE, SIDE),
    accumulate=1,
    ema=False,
    noise=False,
    temperature=None,
    teacher=False,
    networks_run=RunOptions(),
    usage_window=100,
    updates_codebook=True,
    gan=None,
  )
  numbers = {
    'optimizer': numbers,
    'losses': {n: dict(weight=w, start=0, ramp=0) for n, w in weights.items()},
  }
  return spec, jax.tree.map(np.float32, numbers)


class Ours:
  """One quantizer of ours: its programs, for every seed."""

  def __init__(self, name, images, options):
    self.options, self.images = options, jnp.asarray(images)
    self.spec, self.numbers = ours(name, options)
    self.codes = self.spec.tokenizer.codebook_size
    self._start = jax.jit(self._started)
    self._step = jax.jit(self._stepped, donate_argnums=0)
    self._run = jax.jit(self.spec.tokenizer.apply)

  def _batch(self, step, images, order):
    rows, mirrored = (x[step] for x in order)
    x = images[rows]
    return jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)

  def _started(self, seed, *data):
    state, frozen = state_lib.random_state(self.spec, seed)
    if state_lib.inits_codebook(self.spec, state):
      codebook = state_lib.init_codebook(
        self.spec.tokenizer,
        state_lib.variables_of(state, frozen),
        state.rng,
        self._batch(0, *data),
      )
      state = state.replace(codebook=codebook)
    return state, frozen

  def _stepped(self, state, frozen, numbers, *data):
    images = self._batch(state.step, *data)
    return step_lib.train_step(self.spec, state, frozen, numbers, images)

  def start(self, seed):
    order = order_of(seed, len(self.images), self.options)
    self.data = self.images, jax.device_put(order)
    self.state, self.frozen = self._start(seed, *self.data)
    jax.block_until_ready(self.state)

  def train(self, steps):
    """Metrics, on the device, of 20 steps."""
    rows, every = [], max(steps // 20, 1)
    for step in range(1, steps + 1):
      self.state, row = self._step(
        self.state, self.frozen, self.numbers, *self.data
      )
      if step % every == 0:
        rows.append(row)
    jax.block_until_ready(self.state)
    return rows

  def reconstruct(self, images):
    """(f32 images, i32 indices [n, codes a token])."""
    out = self._run(state_lib.variables_of(self.state, self.frozen), images)
    q = self.spec.tokenizer.quantizer.codes_per_token
    return np.asarray(out.images), np.asarray(out.quantizer.indices).reshape(
      -1, q
    )


# -- theirs ------------------------------------------------------------------
class Theirs:
  """One quantizer of vector-quantize-pytorch, in PyTorch."""

  def __init__(self, name, images, options, compiled=False):
    import torch

    self.torch, self.name, self.options = torch, name, options
    self.compiled = compiled
    self.codes = math.prod(LEVELS) if name == 'fsq' else CODES
    self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.set_float32_matmul_precision('high')
    self.images = torch.from_numpy(images).to(self.device)

  def start(self, seed):
    from benchmarks import torch_cifar

    torch = self.torch
    spec, _ = ours(self.name, self.options)
    init = jax.jit(
      functools.partial(state_lib.random_variables, spec.tokenizer)
    )
    leaves = trees.flatten(jax.device_get(init(seed)['params']))
    torch.manual_seed(seed)
    self.net = torch_cifar.Autoencoder(VIT, *PEERS[self.name])
    torch_cifar.carry(self.net, leaves)
    self.net.to(self.device).train()
    if self.compiled:
      self.net.encoder.compile()
      self.net.decoder.compile()
    kinds = [], []
    for p in self.net.parameters():
      kinds[p.ndim > 1 and p is not self.net.encoder.positions].append(p)
    self.params = [*itertools.chain(*kinds)]
    decays = 0.0, ADAMW.weight_decay
    self.optimizer = torch.optim.AdamW(
      [
        dict(params=p, weight_decay=d)
        for p, d in zip(kinds, decays, strict=True)
      ],
      betas=(ADAMW.b1, ADAMW.b2),
      eps=ADAMW.eps,
      fused=True,
    )
    rows, mirrored = order_of(seed, len(self.images), self.options)
    self.order = (
      torch.from_numpy(rows).long().to(self.device),
      torch.from_numpy(mirrored).to(self.device),
    )
    schedule = schedule_of(self.options)
    numbers = dict(
      lr=schedule.lr,
      end_lr=schedule.end_lr,
      warmup=schedule.warmup,
      total=self.options.steps,
    )
    steps = np.arange(self.options.steps)
    rates = jax.vmap(
      lambda step: optim.learning_rate(schedule.decay, numbers, step)
    )(steps)
    self.rates, self.step = np.asarray(rates).tolist(), 0

  def train(self, steps):
    torch = self.torch
    for _ in range(steps):
      rows, mirrored = (x[self.step] for x in self.order)
      x = self.images[rows]
      x = torch.where(mirrored[:, None, None, None], x.flip(2), x) / 255
      recon, _, loss = self.net(x)
      loss = torch.nn.functional.mse_loss(recon, x) + loss
      self.optimizer.zero_grad()
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self.params, ADAMW.clip)
      for group in self.optimizer.param_groups:
        group['lr'] = self.rates[self.step]
      self.optimizer.step()
      self.step += 1
    if self.device.type == 'cuda':
      torch.cuda.synchronize()
    return []

  def reconstruct(self, images):
    torch = self.torch
    self.net.eval()
    with torch.inference_mode():
      x = torch.from_numpy(images).to(self.device) / 255
      recon, indices, _ = self.net(x)
    self.net.train()
    return recon.cpu().numpy(), indices.cpu().numpy().reshape(-1, 1)


# -- what is measured --------------------------------------------------------
SIDES = {'ours': (Ours, OURS), 'torch': (Theirs, PEERS)}


def measured(side, test):
  """The figures of a trained side on the test images."""
  total = metrics.Sums()
  for images in np.split(test, len(test) // PART):
    recon, indices = side.reconstruct(images)
    sums = metrics.compare(recon, images, len(images))
    sums.counts = np.stack(
      [np.bincount(x, minlength=side.codes) for x in indices.T]
    )
    total = total.merge(sums)
  q = total.counts.shape[0]
  bits = metrics.entropy(total.counts).sum() / math.log(2)
  return total.results() | dict(
    effective_bits=float(bits), bits=q * math.log2(side.codes)
  )


def record(options, place, value):
  """Sets JSON[place[0]][place[1]]."""
  with report_lib.updated(options.json, {}) as found:
    found.setdefault(place[0], {})[place[1]] = value


def machine():
  import torch

  return dict(
    date=datetime.date.today().isoformat(),
    hardware=report_lib.hardware(),
    versions=dict(
      python=platform.python_version(),
      jax=jax.__version__,
      torch=torch.__version__,
    ),
  )


def run(which, name, seed, side, test, options):
  """One run of a side."""
  side.start(seed)
  began = time.perf_counter()
  rows = jax.device_get(side.train(options.steps))
  seconds = time.perf_counter() - began
  found = measured(side, test) | dict(
    steps=options.steps, batch=options.batch, lr=options.lr, seconds=seconds
  )
  figures = ('psnr', 'usage', 'perplexity', 'grad_norm', 'loss/commit')
  found['curve'] = {
    n: [round(float(row[n]), 4) for row in rows]
    for n in figures
    if rows and n in rows[0]
  }
  record(options, ('runs', f'{which}/{name}/{seed}'), found)
  print(
    f'{which} {name} seed {seed}: {found["psnr"]:.2f} dB, SSIM '
    f'{found["ssim"]:.3f}, usage {found["usage"]:.3f}, perplexity '
    f'{found["perplexity"]:.0f} ({seconds:.1f} s)',
    flush=True,
  )


def speed(name, one, train, options):
  """Images a second of both sides, in rounds that take turns."""
  sides = {'ours': one, 'torch': Theirs(name, train, options)}
  if options.compile:
    sides['torch.compile'] = Theirs(name, train, options, compiled=True)
  steps = min(50, options.steps // 4)
  times = {n: [] for n in sides}
  for side in sides.values():
    side.start(0)
    side.train(max(steps // 5, 1))
  for _ in range(3):
    for n, side in sides.items():
      began = time.perf_counter()
      side.train(steps)
      times[n].append(steps * options.batch / (time.perf_counter() - began))
  record(options, ('speed', name), times)
  middle = {n: round(statistics.median(x)) for n, x in times.items()}
  print(f'{name}, images a second: {middle}', flush=True)


# -- the report --------------------------------------------------------------
def table(found):
  """Markdown: a row a quantizer and side, means over seeds [from, to]."""
  runs = {}
  for place, row in found['runs'].items():
    which, name, seed = place.split('/')
    runs.setdefault((name, which), {})[seed] = row
  figures = dict(psnr=2, ssim=3, usage=3, perplexity=0, effective_bits=2)
  lines = [
    '| quantizer | of | bits | PSNR, dB | SSIM | usage | perplexity '
    '| effective bits | images/s |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for name, which in itertools.product(OURS, SIDES):
    if (rows := [*runs.get((name, which), {}).values()]) == []:
      continue
    cells = [
      report_lib.spread([r[n] for r in rows], d) for n, d in figures.items()
    ]
    rates = [
      f'{statistics.median(x):,.0f}' + ' compiled' * n.endswith('compile')
      for n, x in found.get('speed', {}).get(name, {}).items()
      if n.startswith(which)
    ]
    cells.append(', '.join(rates))
    bits = f'{rows[0]["bits"]:.3f}'.rstrip('0').rstrip('.')
    lines.append(f'| {name} | {which} | {bits} | {" | ".join(cells)} |')
  lines.append('')
  for name in PEERS:
    pairs = [runs.get((name, which), {}) for which in SIDES]
    if seeds := sorted(pairs[0].keys() & pairs[1].keys()):
      ahead = [pairs[0][s]['psnr'] - pairs[1][s]['psnr'] for s in seeds]
      lines.append(
        f'- `{name}`: ours less theirs, seed by seed, '
        f'{report_lib.spread(ahead, 2)} dB.'
      )
  return '\n'.join(lines)


def report(options):
  """Writes the table into docs/results.md, between its marks."""
  found = json.loads(options.json.read_text())
  kinds = {
    f'{which}: {m["hardware"]}, {m["date"]}, '
    + ', '.join(f'{k} {v}' for k, v in m['versions'].items())
    for which, m in found['machines'].items()
  }
  run = next(iter(found['runs'].values()))
  head = (
    f'{run["steps"]} steps of {run["batch"]} images, rate {run["lr"]:g}. '
    f'{"; ".join(sorted(kinds))}.'
  )
  made = f'{textwrap.fill(head, 80)}\n\n{table(found)}'
  report_lib.write('results.md', 'cifar', made)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--cache', help='the images, one .npz')
  parser.add_argument('--data', help='shards to make the cache of')
  parser.add_argument('--side', choices=(*SIDES, 'both'), default='both')
  parser.add_argument('--only', help='names of quantizers, a,b')
  parser.add_argument('--steps', type=int, default=1000)
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--lr', type=float, default=1e-3)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--json', type=pathlib.Path, default=RESULTS)
  parser.add_argument(
    '--compile',
    action='store_true',
    help='images a second of torch.compile of their ViTs too',
  )
  parser.add_argument('--report', action='store_true')
  options = parser.parse_args()
  if options.report:
    report(options)
    return
  if options.data:
    make_cache(options.data, options.cache)
    return
  train, test = (images_of(options.cache, s) for s in ('train', 'test'))
  names = options.only.split(',') if options.only else [*OURS]
  if options.side == 'both':
    theirs = subprocess.Popen(
      [sys.executable, '-m', 'benchmarks.cifar', *sys.argv[1:], '--side=torch'],
      cwd=ROOT,
    )
  which = 'torch' if options.side == 'torch' else 'ours'
  record(options, ('machines', which), machine())
  kind, known = SIDES[which]

  def made(name):
    side = kind(name, train, options)
    if which == 'ours':  # compiles
      side.start(0)
      side.train(1)
      side.reconstruct(test[:PART])
    return side

  began, names = time.perf_counter(), [n for n in names if n in known]
  cores = len(os.sched_getaffinity(0))
  with concurrent.futures.ThreadPoolExecutor(cores) as pool:
    sides = dict(zip(names, pool.map(made, names), strict=True))
  print(f'{which}: ready in {time.perf_counter() - began:.0f} s', flush=True)
  for seed, name in itertools.product(range(options.seeds), names):
    run(which, name, seed, sides[name], test, options)
  if options.side == 'both':
    if theirs.wait():
      sys.exit('the side of PyTorch failed')
    for name in PEERS.keys() & sides.keys():
      speed(name, sides[name], train, options)


if __name__ == '__main__':
  main()
