"""python -m benchmarks.bench [--only=encode,stage-1] [--pairs=8] [--data=DATA]
  [--json=F]

What the package costs beside others on the same work, one after another in
rounds, so that other load on the machine meets all alike: of each row the
median over rounds of ours / theirs, the quartiles, the ratio of the fastest
calls and of CPU time. A row of its own is a plain matrix product; each row has
its rate, and on a known GPU its share of the peak. `--only` takes beginnings of
rows' names. On CPU everything is f32; on a GPU networks run in bf16, quantizers
in f32. An H100 and an H200 are taken to have 989 TFLOP/s. `--report` writes
docs/performance.md from benchmarks/results/*.json.

`--only=data --data=DATA` shows whether a source is read at the pace of its
decoding: beside the training pipeline, from its first batch on, stands a bare
loop of Pillow over the same images in as many threads, on bytes in memory.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

# Threads that wait would take the time of whoever runs next.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
# Biases and gelu in the products' own kernels (docs/performance.md).
os.environ.setdefault('XLA_FLAGS', '--xla_gpu_enable_triton_gemm=false')

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from PIL import Image

import vqrae_jax
from benchmarks import report as report_lib
from benchmarks import torch_peers
from vqrae_jax import optim, sharding
from vqrae_jax.data import pipeline, sources
from vqrae_jax.nn.dino import DINO_S8, TAPS
from vqrae_jax.ops import trees
from vqrae_jax.ops.nearest import nearest_code
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import setup as setup_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'
GPU = jax.default_backend() == 'gpu'
DEVICE = torch.device('cuda' if GPU else 'cpu')
DTYPE = 'bfloat16' if GPU else 'float32'
PEAK = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}  # dense bf16
WIDE = dict(width=1024, depth=24, mlp_dim=4096, num_heads=16, patch_size=16)
CODES, CODE_DIM = 16384, 1536


@dataclasses.dataclass
class Row:
  """Contenders on the same work, ours first, and what it takes."""

  calls: dict
  flops: float = 0.0
  pairs: int | None = None  # fewer than --pairs


def vit(side, **fields):
  return WIDE | dict(grid=(side // 16, side // 16)) | fields


ENCODER = dict(act='gelu_tanh', norm_eps=1e-6)  # SigLIP-L/16
DECODER = dict(posemb='sincos2d', num_prefix_tokens=1, norm_eps=1e-12)


def model(side):
  return dict(
    encoder=dict(vit=vit(side, **ENCODER), output_norm='plain'),
    quantizer=dict(
      name='simvq', num_codes=CODES, code_dim=CODE_DIM, distance='cosine'
    ),
    decoder=dict(vit=vit(side, **DECODER)),
    dtype=DTYPE,
  )


@functools.cache
def peer(side):
  """PyTorch's tokenizer of the same sizes."""
  torch.manual_seed(0)
  torch.set_float32_matmul_precision('highest')
  torch.set_num_threads(os.cpu_count() if GPU else len(os.sched_getaffinity(0)))
  parts = torch_peers.Tokenizer(
    vit(side, **ENCODER), vit(side, **DECODER), side, CODES, CODE_DIM
  )
  return parts.to(DEVICE).eval()


@functools.cache
def ours(side):
  """(tokenizer, variables as inference has them), random weights."""
  tokenizer = vqrae_jax.build_tokenizer(model(side))
  images = jnp.zeros((1, side, side, 3))
  variables = jax.jit(tokenizer.init)(jax.random.key(0), images)
  table = jax.jit(lambda v: tokenizer.apply(v, method='baked_codebook'))
  codebook = {'quantizer': table(variables)}
  return tokenizer, {'params': variables['params'], 'codebook': codebook}


def done(call):
  """Runs a call of ours to its end."""
  return lambda *args: jax.block_until_ready(call(*args))


def torch_call(call, train=False):
  def run(*args):
    with contextlib.ExitStack() as stack:
      if not train:
        stack.enter_context(torch.inference_mode())
      if GPU and not train:
        stack.enter_context(torch.autocast('cuda', torch.bfloat16))
      call(*args)
    if GPU:
      torch.cuda.synchronize()

  return run


def torch_flops(call):
  from torch.utils.flop_counter import FlopCounterMode

  with FlopCounterMode(display=False) as counter:
    call()
  return counter.get_total_flops()


def pictures(batch, side):
  """The same images for both, each in its layout, on the device."""
  x = np.random.default_rng(0).random((batch, side, side, 3), np.float32)
  theirs = torch.from_numpy(x.transpose(0, 3, 1, 2)).contiguous()
  return jnp.asarray(x), theirs.to(DEVICE)


def encoder_row(batch, side=224, train=False):
  """The encoder alone; with `train` forward and backward."""
  tokenizer, variables = ours(side)
  images, theirs = pictures(batch, side)
  net = peer(side).encoder
  if train:

    def loss(encoder, x):
      params = variables['params'] | {'encoder': encoder}
      y = tokenizer.apply({'params': params}, x, method='encode')
      return y.astype(jnp.float32).sum()

    fn = jax.jit(jax.grad(loss))
    params = variables['params']['encoder']
    net = torch_peers.Encoder(vit(side, **ENCODER), (side // 16) ** 2)
    net = net.to(DEVICE)

    def backward(forward):
      def run():
        cast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU)
        with cast:
          y = forward(theirs)
        y.float().sum().backward()
        net.zero_grad()

      return torch_call(run, train=True)

    calls = {
      'ours': lambda: done(fn)(params, images),
      'torch': backward(net),
      'torch.compile': backward(torch.compile(net)),
    }
    return Row(calls, torch_flops(calls['torch']))
  fn = jax.jit(vqrae_jax.encode, static_argnums=0)
  calls = {
    'ours': lambda: done(fn)(tokenizer, variables, images),
    'torch': lambda: torch_call(net)(theirs),
    'torch.compile': functools.partial(torch_call(torch.compile(net)), theirs),
  }
  return Row(calls, torch_flops(calls['torch']))


def indices_row(batch, side=224, decode=False):
  tokenizer, variables = ours(side)
  images, theirs = pictures(batch, side)
  net = peer(side)
  ask = functools.partial(np.random.default_rng(0).integers, 0, CODES)
  if decode:
    grid = side // 16
    ids = ask((batch, grid, grid)).astype(np.int32)
    images, theirs = jnp.asarray(ids), torch.from_numpy(ids).long()
    theirs = theirs.flatten(1).to(DEVICE)
  fn = getattr(
    vqrae_jax, 'decode_from_indices' if decode else 'encode_to_indices'
  )
  fn = jax.jit(fn, static_argnums=0)
  them = net.decode if decode else net.encode
  calls = {
    'ours': lambda: done(fn)(tokenizer, variables, images),
    'torch': lambda: torch_call(them)(theirs),
    'torch.compile': functools.partial(torch_call(torch.compile(them)), theirs),
  }
  return Row(calls, torch_flops(calls['torch']))


def drawn(shapes):
  """Arrays as a run holds them after a while, quicker than by its start."""
  rng = np.random.default_rng(0)

  def leaf(name, x):
    if name.endswith('rng'):
      return jax.device_put(jax.random.key(0), x.sharding)
    if '/opt_state/' in name or not jnp.issubdtype(x.dtype, jnp.floating):
      return jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
    value = 0.02 * rng.standard_normal(x.shape, np.float32)
    return jax.device_put(value + name.endswith('scale'), x.sharding)

  return trees.map_named(leaf, shapes)


def step_row(batch, side, remat=False):
  """The stage-1 step: encoder frozen, L2, LPIPS, DINO discriminator."""
  given = dict(
    model=model(side) | dict(remat=remat),
    data=dict(source='bundled:photos', image_size=side),
    losses=dict(l2=1.0, lpips=1.0, gan=0.75, codebook=1.0, commit=0.25),
    discriminator=dict(name='dino'),
    schedules=(('encoder/.*', None), ('.*', dict(lr=1e-4))),
    optim=dict(weight_decay=1e-4),
    duration=1000,
    batch_size=batch,
    init=dict(networks='random'),
  )
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  made = setup_lib.setup(config_lib.read_config(given), mesh)
  state, frozen = drawn(state_lib.state_shapes(made.step, mesh))
  with jax.set_mesh(mesh):
    placed = made.place(made.batches.batch(0))
    hparams, state = setup_lib.f32(made.hparams), [state]
    step = made.train_step().lower(state[0], frozen, hparams, placed).compile()

  def run():
    with jax.set_mesh(mesh):
      state[0], metrics = step(state[0], frozen, hparams, placed)
      assert not jax.block_until_ready((state[0], metrics))[1]['nonfinite']

  theirs = torch.from_numpy(np.asarray(placed['images'], np.float32) / 255)
  theirs = theirs.permute(0, 3, 1, 2).contiguous().to(DEVICE)
  with torch.device(DEVICE):
    trainer = torch_peers.Trainer(
      torch_peers.Tokenizer(
        vit(side, **ENCODER), vit(side, **DECODER), side, CODES, CODE_DIM
      ),
      torch_peers.Discriminator(dataclasses.asdict(DINO_S8), TAPS, 9),
      autocast=GPU,
    )
  calls = {
    'ours': run,
    'RAE': functools.partial(torch_call(trainer.rae_step, train=True), theirs),
    'clever': functools.partial(
      torch_call(trainer.clever_step, train=True), theirs
    ),
  }
  return Row(calls, torch_flops(calls['clever']))


def nearest_row(tokens):
  rng = np.random.default_rng(0)
  z = rng.standard_normal((tokens, CODE_DIM), np.float32)
  table = rng.standard_normal((CODES, CODE_DIM), np.float32)
  a, b = jnp.asarray(z), jnp.asarray(table)
  c, d = torch.from_numpy(z).to(DEVICE), torch.from_numpy(table).to(DEVICE)
  dot = jax.jit(lambda a, b: jnp.matmul(a, b.T, precision='highest'))
  nearest = jax.jit(nearest_code)

  def theirs(a, b):
    with torch.autocast(DEVICE.type, enabled=False):
      return (0.5 * (b * b).sum(-1) - a @ b.T).argmin(-1)

  return Row(
    {
      'ours': lambda: done(nearest)(a, b),
      'matrix product': lambda: done(dot)(a, b),
      'torch': lambda: torch_call(theirs)(c, d),
    },
    2 * tokens * CODES * CODE_DIM,
  )


def optimizer_row(parameters):
  """Clip, AdamW, the average of weights; ours skips what is not finite."""
  shape = (parameters // 8 // 1024, 1024)
  names = [f'{i}/kernel' for i in range(8)]
  rng = np.random.default_rng(0)
  draw = lambda: {n: rng.standard_normal(shape, np.float32) for n in names}  # noqa: E731
  params, grads = draw(), jax.device_put(draw())
  rate, decay, average = 1e-4, 1e-4, 0.999
  tx, numbers = optim.make_optimizer(
    optim.AdamWConfig(weight_decay=decay),
    dict.fromkeys(names, optim.Schedule(rate, decay='constant')),
    params,
    1000,
    1000,
  )
  chain = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=decay)
  )

  def averaged(old, new):
    return jax.tree.map(lambda e, p: e + (1 - average) * (p - e), old, new)

  def ours(state, grads, numbers):
    norm = tx.norm(grads)

    def update(state):
      params, moments, ema = state
      updates, moments = tx.update(numbers, grads, moments, params, norm)
      params = optax.apply_updates(params, updates)
      return params, moments, averaged(ema, params)

    return step_lib.updated_if(jnp.isfinite(norm), update, state)

  def bare(state, grads):
    params, moments, ema = state
    updates, moments = chain.update(grads, moments, params)
    params = optax.apply_updates(params, updates)
    return params, moments, averaged(ema, params)

  def call(fn, optimizer, *rest):
    copy = lambda tree: jax.tree.map(jnp.array, tree)  # noqa: E731
    state = [(copy(params), optimizer.init(copy(params)), copy(params))]
    fn = jax.jit(fn, donate_argnums=0).lower(state[0], grads, *rest).compile()
    used = fn.memory_analysis().temp_size_in_bytes / (4 * parameters)
    print(f'  {used:.2f} copies of the parameters as temporaries')

    def run():
      state[0] = jax.block_until_ready(fn(state[0], grads, *rest))

    return run

  theirs = [
    torch.nn.Parameter(torch.from_numpy(p).to(DEVICE)) for p in params.values()
  ]
  for p, g in zip(theirs, grads.values(), strict=True):
    p.grad = torch.from_numpy(np.array(g)).to(DEVICE)
  ema = [p.detach().clone() for p in theirs]
  adamw = torch.optim.AdamW(theirs, rate, weight_decay=decay, fused=True)

  def fused():
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    adamw.step()
    torch._foreach_lerp_(ema, theirs, 1 - average)

  return Row({
    'ours': call(ours, tx, setup_lib.f32(numbers)),
    'bare optax': call(bare, chain),
    'torch fused': torch_call(fused, train=True),
  })  # fmt: skip


def decode_and_resize(size, data):
  with Image.open(io.BytesIO(data)) as image:
    image = image.convert('RGB')
  left, top = ((n - min(image.size)) // 2 for n in image.size)
  box = (left, top, left + min(image.size), top + min(image.size))
  return image.resize(size, Image.BICUBIC, box, reducing_gap=3).tobytes()


def data_row(data, batches, side=224, decoder='pil'):
  """The pipeline of 64 images a batch, from a start to its last batch. No
  flips: decoding and cropping is what both do."""
  augment = pipeline.Augment((side, side), resize=side, flip=False)
  source = sources.open_source(data).decoded_by(decoder, augment.ample)
  loader = pipeline.TrainBatches(source, [augment], batch_size=64, seed=0)
  threads = pipeline.reading_threads()
  stretches = {name: itertools.count(step=batches) for name in ('ours', 'bare')}

  def read():
    iterator = loader.iterate(next(stretches['ours']))
    collections.deque(itertools.islice(iterator, batches), 0)

  def bare():
    start = next(stretches['bare'])
    rows = np.concatenate(
      [loader._empty(start + n)[0]['photo'] for n in range(batches)]
    )
    encoded = [source._bytes(int(source._rows[row])) for row in rows]
    work = functools.partial(decode_and_resize, (side, side))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      # Every thread has its own share and waits for no other.
      parts = [encoded[n::threads] for n in range(threads)]
      list(pool.map(lambda part: collections.deque(map(work, part), 0), parts))

  return Row({'ours': read, 'Pillow': bare})


def start_row():
  """`python -m vqrae_jax.train` of two steps, by what an earlier start has
  compiled, and without it."""
  folder = tempfile.TemporaryDirectory()

  def train(cache):
    with tempfile.TemporaryDirectory(dir=folder.name) as fresh:
      subprocess.run(
        [
          sys.executable, '-m', 'vqrae_jax.train', f'--workdir={fresh}/run',
          '--config=configs/quickstart.py:steps=2',
        ],
        cwd=ROOT, check=True, capture_output=True,
        env=os.environ | dict(VQRAE_JAX_CACHE=cache or fresh),
      )  # fmt: skip

  return Row(
    {'ours': lambda: train(folder.name), 'first start': lambda: train(None)},
    pairs=3,
  )


def product_row():
  """What the machine gives: a square product in the networks' dtype."""
  n = 8192 if GPU else 2048
  x = jax.random.normal(jax.random.key(0), (n, n), DTYPE)
  y = torch.randn(n, n, device=DEVICE, dtype=getattr(torch, DTYPE))
  dot = jax.jit(lambda x: x @ x)
  return Row(
    {
      'ours': lambda: done(dot)(x),
      'torch': lambda: torch_call(lambda y: y @ y)(y),
    },
    2 * n**3,
  )


def rows(data):
  """{name: () -> Row} for this machine."""
  if GPU:
    return {
      'matrix product': product_row,
      'encoder, batch 256': lambda: encoder_row(256),
      'stage-1 step, 224 px, batch 64': lambda: step_row(64, 224),
      'forward and backward, batch 64': lambda: encoder_row(64, train=True),
      'encode_to_indices, batch 256': lambda: indices_row(256),
      'decode_from_indices, batch 256': lambda: indices_row(256, decode=True),
      'nearest code, 50176 tokens': lambda: nearest_row(50176),
      'encoder, batch 8': lambda: encoder_row(8),
      'optimizer, 300M parameters': lambda: optimizer_row(300 * 2**20),
    }
  return {
    'stage-1 step, 128 px, batch 2': lambda: step_row(2, 128),
    'matrix product': product_row,
    'encoder, batch 1': lambda: encoder_row(1),
    'encoder, batch 8': lambda: encoder_row(8),
    'forward and backward, batch 4': lambda: encoder_row(4, train=True),
    'encode_to_indices, batch 4': lambda: indices_row(4),
    'decode_from_indices, batch 4': lambda: indices_row(4, decode=True),
    'nearest code, 1568 tokens': lambda: nearest_row(1568),
    'optimizer, 50M parameters': lambda: optimizer_row(48 * 2**20),
    'second start, 3 rounds': start_row,
  } | (data_rows(data) if data else {})


def data_rows(data):
  return {
    'data, 4 batches': lambda: data_row(data, 4),
    'data, 4 batches, simplejpeg': lambda: data_row(
      data, 4, decoder='simplejpeg'
    ),
    'data, 16 batches': lambda: data_row(data, 16),
  }


def row_result(name, data, pairs):
  row = rows(data)[name]()
  return result(row, measured(row, row.pairs or pairs))


def measured(row, pairs):
  """{contender: ([seconds], [CPU seconds, children's too])}, the first call
  left out."""
  names = list(row.calls)
  for name in names:
    for _ in range(3 if GPU else 1):
      row.calls[name]()
  times = {name: ([], []) for name in names}
  for r in range(pairs):
    for name in names[r % len(names) :] + names[: r % len(names)]:
      began = time.perf_counter(), sum(os.times()[:4])
      row.calls[name]()
      ended = time.perf_counter(), sum(os.times()[:4])
      for kept, a, b in zip(times[name], began, ended, strict=True):
        kept.append(b - a)
  return times


def result(row, times):
  """What is written of a row."""
  wall, cpu = times['ours']
  out = {
    'ours_s': statistics.median(wall),
    'flops': row.flops,
    'flops_per_s': row.flops / statistics.median(wall),
    'peers': {},
  }
  for name, (theirs, their_cpu) in times.items():
    if name == 'ours':
      continue
    ratios = sorted(a / b for a, b in zip(wall, theirs, strict=True))
    quarter = len(ratios) // 4
    out['peers'][name] = {
      'ratio': statistics.median(ratios),
      'quartiles': [ratios[quarter], ratios[-1 - quarter]],
      'fastest': min(wall) / min(theirs),
      'cpu': sum(cpu) / sum(their_cpu),
      's': statistics.median(theirs),
    }
  return out


def table(found):
  """Markdown of one machine's results."""
  versions = ', '.join(f'{k} {v}' for k, v in found['versions'].items())
  peak = next((f for k, f in PEAK.items() if k in found['hardware']), None)
  lines = [
    f'### {found["hardware"]}',
    '',
    f'{found["date"]}; {versions}; {found["dtype"]}; {found["pairs"]} rounds; '
    f'load {found["load"]:.1f} before them'
    + (f'; `GLIBC_TUNABLES={m}`.' if (m := found.get('malloc')) else '.'),
    '',
    '| row | ours | rate | beside | ours / it [quartiles] | fastest | CPU |',
    '| --- | --- | --- | --- | --- | --- | --- |',
  ]
  for name, row in found['rows'].items():
    rate = ''
    if row['flops']:
      rate = f'{row["flops_per_s"] / 1e12:.3g} TFLOP/s'
      rate += f', {row["flops_per_s"] / peak:.0%} of peak' if peak else ''
    head = f'| {name} | {row["ours_s"] * 1e3:.4g} ms | {rate} '
    for peer, p in row['peers'].items():
      low, high = p['quartiles']
      lines.append(
        f'{head}| {peer} | {p["ratio"]:.3f} [{low:.3f}, {high:.3f}] | '
        f'{p["fastest"]:.3f} | {p["cpu"]:.3f} |'
      )
      head = '| | | '
  return '\n'.join(lines)


def report():
  """Writes the tables into docs/performance.md, between its marks."""
  files = map(pathlib.Path.read_text, sorted(RESULTS.glob('*.json')))
  # Those of other scripts have no rows.
  tables = [table(x) for x in map(json.loads, files) if 'rows' in x]
  report_lib.write('performance.md', 'bench', '\n\n'.join(tables))


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', help='words that rows begin with, a,b')
  parser.add_argument('--pairs', type=int, default=20 if GPU else 8)
  parser.add_argument('--data', help='a folder, a glob, …, for the data rows')
  parser.add_argument('--json', help='where to write the results')
  parser.add_argument('--report', action='store_true')
  options = parser.parse_args()
  if options.report:
    report()
    return
  words = tuple((options.only or '').split(','))
  report_to = {
    'date': datetime.date.today().isoformat(),
    'hardware': report_lib.hardware(),
    'versions': {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'torch': torch.__version__,
      'optax': optax.__version__,
    },
    'load': os.getloadavg()[0],
    'pairs': options.pairs,
    'dtype': DTYPE,
    'malloc': os.environ.get('GLIBC_TUNABLES'),
    'rows': {},
  }
  peak = next((f for k, f in PEAK.items() if k in report_to['hardware']), None)
  print(f'{report_to["hardware"]}, load {report_to["load"]:.2f}', flush=True)
  # A process each, so that none meets what another leaves. On a GPU they start
  # too slowly.
  pool = concurrent.futures.ProcessPoolExecutor(
    1, multiprocessing.get_context('spawn'), max_tasks_per_child=1
  )
  for name in rows(options.data):
    if not name.startswith(words):
      continue
    began = time.perf_counter()
    task = name, options.data, options.pairs
    try:
      if GPU:
        found = row_result(*task)
      else:
        found = pool.submit(row_result, *task).result()
    except Exception as e:  # the other rows are still worth their time
      print(f'{name}: {type(e).__name__}: {str(e)[:2000]}', flush=True)
      continue
    report_to['rows'][name] = found
    rate = ''
    if found['flops']:
      rate = f'{found["flops_per_s"] / 1e12:.3g} TFLOP/s '
      rate += f'{found["flops_per_s"] / peak:.0%} of peak ' if peak else ''
    took = time.perf_counter() - began
    print(f'{name}: {found["ours_s"]:.4g} s {rate}(in {took:.0f} s)')
    for other, p in found['peers'].items():
      print(
        f'  / {other:18} {p["ratio"]:.3f} [{p["quartiles"][0]:.3f} '
        f'{p["quartiles"][1]:.3f}], fastest {p["fastest"]:.3f}, CPU '
        f'{p["cpu"]:.3f}  ({p["s"]:.4g} s)', flush=True,
      )  # fmt: skip
    if options.json:
      pathlib.Path(options.json).write_text(json.dumps(report_to, indent=1))
    if GPU:
      torch.cuda.empty_cache()


if __name__ == '__main__':
  main()
