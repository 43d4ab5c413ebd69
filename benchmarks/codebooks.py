"""python -m benchmarks.codebooks [--data=synthetic] [--method=vq,simvq]
  [--codes=4096] [--width=256] [--steps=1000] [--json=FILE]
python -m benchmarks.codebooks --data=cifar10-last,imagenet-9 --root=FOLDER
python -m benchmarks.codebooks --report

How much of a codebook is used, and how near its codes are: a quantizer alone is
trained on latents, 1,000 steps of 4,096 tokens, and measured on 1e6 tokens that
it was not trained on. Each row (usage, perplexity, squared error) is written as
it comes; `--report` writes docs/quantizers.md from all of them.

On one GPU, 16,384 codes of 1536:

    export XLA_FLAGS=--xla_gpu_enable_triton_gemm=false
    python -m benchmarks.codebooks --data=synthetic --codes=16384 --width=1536 \
      --method=vq,simvq,fsq-mlp,kmeans,vq-naive,vector-quantize-pytorch \
      --json=$OUT/codebooks.json

and for the other rows, of which real ones read FOLDER (below) and encode 2e6
tokens first:

    python -m benchmarks.codebooks --json=$OUT/codebooks.json --root=FOLDER \
      --data=synthetic,cifar10-last,cifar10-9,imagenet-last,imagenet-9

Data. "synthetic": LayerNorm'd tokens around 2,000 centres in 24 dimensions.
"cifar10-9", "cifar10-last", "imagenet-9", "imagenet-last": the 9th or the last
block of the ViT-S/14 in FOLDER/vit_s14_trained, each token normalised, in
bfloat16, over random crops with flips of FOLDER/cifar10_wds (its own split; 128
pixels, crops of 112: 64 tokens each) or FOLDER/imagenet_sample (every third
image is for the test; 256 pixels, crops of 224: 256 tokens). Images are cropped
again until there are 1e6 tokens of a split; training reads its own in epochs,
each of another order. Latents are kept in `--cache`.

Training is that of `configs/common.original`: AdamW at 1e-3 to 1e-5 with 5 % of
warm-up, codebook 1, commitment .25. Where a quantizer has a projection, it also
has the squared error of the latents that come out; a recipe's decoder takes
that part. "fsq-decoder" has one: three layers that read what comes out, trained
with it, and no commitment, which FSQ's paper does not have either. "…-entropy"
also has the loss `entropy`. "vq-even" revives codes of less than half of the
mean count. FSQ and "vq-mlp-entropy" read latents normalised per channel
(`model.latents`), but for "fsq-mlp-raw". A codebook starts at the first
max(K, 4,096) tokens. Lloyd's k-means, from k-means++, makes 10 passes over a
tenth of the same batches.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import math
import pathlib
import platform
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks import report as report_lib
from vqrae_jax import optim, quantizers
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.ops import trees
from vqrae_jax.ops.nearest import nearest_code
from vqrae_jax.quantizers import base

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'codebooks'

TOKENS, IMAGES = 4096, 64  # of a step; codes are revived by one an image
TEST = 10**6  # tokens that are measured, and the number of the first batch
DECODER = 1024  # channels inside
PASSES = 10  # of k-means, over a tenth of the batches
# For about as many codes. Outer levels are used less, and of four channels of 8
# levels all outer ones hardly ever together (usage .945 of 4,096).
LEVELS = {
  256: (8, 6, 5),
  1024: (8, 5, 5, 5),
  4096: (7, 5, 5, 5, 5),
  16384: (5, 5, 5, 5, 5, 5),
}
LOSSES = {'codebook': 1.0, 'commit': 0.25}
# Weights of the loss `entropy`.
ENTROPY = {
  'vq-mlp-entropy': 0.1,
  'fsq-mlp-entropy': 0.2,
  'fsq-decoder-entropy': 0.05,
}
ADAMW = optim.AdamWConfig(b1=0.9, b2=0.999, weight_decay=1e-4, clip=1.0)

# Sections of quantizers, but for the number of codes; "vq", "simvq" and
# "fsq-mlp" are held to a usage of .95 and a perplexity of .5 K.
METHODS = {
  'vq': dict(name='vq'),
  'vq-even': dict(name='vq', revive_below=0.5),
  'vq-mlp-entropy': dict(
    name='vq',
    projection='mlp',
    code_dim=32,
    revive_below=0.5,
    entropy_temperature=2.0,
  ),
  'simvq': dict(name='simvq'),
  'fsq-mlp': dict(name='fsq', projection='mlp'),
  'fsq-mlp-entropy': dict(name='fsq', projection='mlp'),
  'fsq-decoder': dict(name='fsq', projection='mlp'),
  'fsq-decoder-entropy': dict(name='fsq', projection='mlp'),
  'kmeans': dict(name='vq'),
  'vq-naive': dict(name='vq', data_init=False, revive_below=0.0),
  'vector-quantize-pytorch': {},
  'vector-quantize-pytorch-revived': dict(
    kmeans_init=True, threshold_ema_dead_code=2
  ),
  'simvq-random': dict(name='simvq', basis_init='normal'),
  'fsq-linear': dict(name='fsq'),
  'fsq-mlp-raw': dict(name='fsq', projection='mlp'),
}


def synthetic(width):
  """A batch f32[TOKENS width] by its number: LayerNorm of
  mean + (.4 centre + .15 jitter) U + .2 noise."""
  keys = jax.random.split(jax.random.key(0), 4)
  mean = jax.random.normal(keys[0], (width,))
  basis = jax.random.normal(keys[1], (24, width))
  centers = jax.random.normal(keys[2], (2000, 24))

  @jax.jit
  def batch(i):
    key = jax.random.split(jax.random.fold_in(keys[3], i), 3)
    chosen = jax.random.randint(key[0], (TOKENS,), 0, len(centers))
    inside = 0.4 * centers[chosen] + 0.15 * jax.random.normal(
      key[1], (TOKENS, 24)
    )
    z = mean + inside @ basis + 0.2 * jax.random.normal(key[2], (TOKENS, width))
    z = z - z.mean(-1, keepdims=True)
    return code_ops.unit_rms(z)

  return batch


def latents(data, root, cache):
  """A batch f32[TOKENS 384] by its number, of a ViT's latents."""
  images, block = data.rsplit('-', 1)
  files = [cache / f'{images}-{block}-{s}.npy' for s in ('train', 'test')]
  if not files[-1].exists():
    cache.mkdir(parents=True, exist_ok=True)
    encode(images, root, cache)
  train, test = (np.load(file, mmap_mode='r') for file in files)

  @functools.lru_cache(2)
  def order(epoch):
    return np.random.default_rng((0, epoch)).permutation(len(train))

  def batch(i):
    if i >= TEST:
      first = (i - TEST) * TOKENS
      return jnp.asarray(test[first : first + TOKENS], jnp.float32)
    at = np.arange(i * TOKENS, (i + 1) * TOKENS)
    epochs = at // len(train)
    rows = [
      order(e)[at[epochs == e] % len(train)]
      for e in range(epochs[0], epochs[-1] + 1)
    ]
    return jnp.asarray(train[np.concatenate(rows)], jnp.float32)

  return batch


def encode(images, root, cache):
  """Writes latents f16[tokens 384] of the two blocks, of both splits."""
  import dataclasses

  from vqrae_jax.data import pipeline, sources
  from vqrae_jax.models.encoder import Encoder
  from vqrae_jax.pretrained.encoders import load_encoder

  if images == 'cifar10':
    shards = root / 'cifar10_wds'
    splits = [sources.open_source(f'{shards}/{s}-*') for s in ('train', 'test')]
    resize, size = 128, 112
  else:
    source = sources.open_source(str(root / 'imagenet_sample'))
    third = np.arange(len(source)) % 3 == 0
    splits = [source.select(~third), source.select(third)]
    resize, size = 256, 224
  loaded, variables = load_encoder(
    str(root / 'vit_s14_trained'), 'plain', dtype='bfloat16'
  )
  encoder = Encoder(dataclasses.replace(loaded.spec, layers=(8, 11)))
  forward = jax.jit(encoder.apply)
  rows = TOKENS * 196 // size**2
  augment = pipeline.Augment((size, size), resize)
  total = math.ceil(TEST / TOKENS)
  for split, source in zip(('train', 'test'), splits, strict=True):
    batches = pipeline.TrainBatches(source, [augment], batch_size=rows, seed=0)
    files = [
      np.lib.format.open_memmap(
        cache / f'{images}-{block}-{split}.npy.part',
        'w+', np.float16, (total * TOKENS, encoder.spec.vit.width),
      )
      for block in ('9', 'last')
    ]  # fmt: skip
    for i, batch in zip(range(total), batches.iterate(), strict=False):
      found = forward(variables, batch['images'])
      for j, file in enumerate(files):
        file[i * TOKENS : (i + 1) * TOKENS] = np.asarray(
          found[..., j, :], np.float16
        ).reshape(TOKENS, -1)
    for block in ('9', 'last'):
      path = cache / f'{images}-{block}-{split}.npy'
      path.with_suffix('.npy.part').rename(path)


def section_of(method, codes, width):
  """The quantizer's section."""
  section = METHODS[method]
  if section['name'] == 'fsq':
    return section | dict(levels=LEVELS[codes])
  if section['name'] == 'simvq':
    section = section | dict(code_dim=width)
  return section | dict(num_codes=codes)


class Decoder(nn.Module):
  """What reads the latents that come out."""

  @nn.compact
  def __call__(self, z_q):
    x = z_q
    for _ in range(2):
      x = nn.gelu(nn.Dense(DECODER)(x))
    return nn.Dense(z_q.shape[-1])(x)


def read(quantizer, decoder, variables, z, **options):
  """(the quantizer's output, what a decoder makes of it)."""
  params = dict(variables.get('params', {}))
  weights = {'params': params.pop('decoder', {})}
  out = quantizer.apply(variables | {'params': params}, z, **options)
  return out, decoder.apply(weights, out.z_q) if decoder else out.z_q


def start(quantizer, decoder, z, key, naive):
  """({leaf name: parameter}, codebook), the codebook from tokens z."""
  init_key, key = jax.random.split(key)
  variables = quantizer.init(init_key, z[:8])
  params = dict(variables.get('params', {}))
  if decoder:
    params['decoder'] = decoder.init(init_key, z[:8])['params']
  codebook = variables.get('codebook', {})
  tokens = quantizer.apply(variables, z, method='to_code_space')
  codebook = quantizer.init_codebook(codebook, tokens, key)
  if naive:  # the average of 1711.00937 as it is usually started
    codebook = codebook | {'counts': jnp.zeros_like(codebook['counts'])}
  return trees.flatten(params), codebook


def train(quantizer, decoder, batch, steps, losses, naive=False):
  """The variables after `steps`."""
  key = jax.random.key(1)
  first = max(quantizer.codebook_size, TOKENS) // TOKENS
  z = jnp.concatenate([batch(i) for i in range(first)])
  params, codebook = jax.jit(start, static_argnums=(0, 1, 4))(
    quantizer, decoder, z, key, naive
  )
  schedule = optim.Schedule(1e-3, 1e-5, warmup=steps // 20)
  optimizer, numbers = optim.make_optimizer(
    ADAMW, dict.fromkeys(params, schedule), params, steps, steps
  )
  moments = optimizer.init(params)

  def loss(params, codebook, z, random):
    variables = {'params': trees.unflatten(params), 'codebook': codebook}
    out, decoded = read(
      quantizer, decoder, variables, z,
      train=True, random=random, losses=tuple(losses),
    )  # fmt: skip
    total = sum(losses.get(name, 0) * x for name, x in out.losses.items())
    if quantizer.projection:
      total = total + jnp.mean((decoded - z) ** 2)
    return total, out

  @functools.partial(jax.jit, donate_argnums=(1, 2, 3))
  def step(i, params, moments, codebook, z):
    random = {'samples': jax.random.split(jax.random.fold_in(key, i), IMAGES)}
    z = z.reshape(IMAGES, -1, z.shape[-1])
    if params:
      grads, out = jax.grad(loss, has_aux=True)(params, codebook, z, random)
      norm = optimizer.norm(grads)
      updates, moments = optimizer.update(numbers, grads, moments, params, norm)
      params = optax.apply_updates(params, updates)
    else:
      out = loss(params, codebook, z, random)[1]
    stats = out.stats
    if out.tokens is not None:
      stats = stats | {'tokens': out.tokens}
    return params, moments, quantizer.update_codebook(codebook, stats)

  for i in range(steps):
    params, moments, codebook = step(i, params, moments, codebook, batch(i))
  variables = {'params': trees.unflatten(params), 'codebook': codebook}
  return jax.block_until_ready(variables)


def kmeans(quantizer, batch, steps):
  """The same of Lloyd's algorithm, codes that no token is nearest to stay."""
  k, every = quantizer.codebook_size, max(steps // PASSES, 1)
  seeds = range(base.SEEDED_FROM * k // TOKENS)
  z = jnp.concatenate([batch(i) for i in seeds or (0,)])
  spread = jax.jit(base.spread_codes, static_argnums=1)
  codes = spread(z, k, jax.random.key(1))

  @jax.jit
  def add(codes, counts, sums, z):
    indices = nearest_code(z, codes)
    counts = counts + code_ops.count_codes(indices, k)
    return counts, sums + code_ops.sum_by_code(z, indices, k)

  for _ in range(PASSES):
    found = jnp.zeros(k, jnp.int32), jnp.zeros_like(codes)
    for i in range(every):
      found = add(codes, *found, batch(i))
    counts, sums = found[0][:, None], found[1]
    codes = jnp.where(counts > 0, sums / jnp.maximum(counts, 1), codes)
  return {'codebook': {'codes': jax.block_until_ready(codes)}}


def normaliser(method, batch):
  """(mean, std) of channels, f32[width] each, of 16 batches; (0, 1) if `method`
  reads latents as they are."""
  projected = method.startswith(('fsq', 'vq-mlp'))
  if not projected or method == 'fsq-mlp-raw':
    return 0.0, 1.0
  z = jnp.concatenate([batch(i) for i in range(16)])
  return z.mean(0), z.std(0)


def ours(method, batch, codes, width, steps):
  """(f32[n width] -> (indices, latents), its arrays, seconds of training)."""
  section = section_of(method, codes, width)
  quantizer = quantizers.build(section, width, 'float32')
  decoder = Decoder() if method.startswith('fsq-decoder') else None
  losses = {} if decoder else dict(LOSSES)
  if method in ENTROPY:
    losses['entropy'] = ENTROPY[method]
  mean, std = normaliser(method, batch)
  began = time.perf_counter()
  if method == 'kmeans':
    variables = kmeans(quantizer, batch, steps)
  else:
    variables = train(
      quantizer,
      decoder,
      lambda i: (batch(i) - mean) / std,
      steps,
      losses,
      naive=method == 'vq-naive',
    )

  def call(z, variables):
    out, decoded = read(quantizer, decoder, variables, (z - mean) / std)
    return out.indices, decoded * std + mean

  return call, variables, time.perf_counter() - began


def theirs(method, batch, codes, width, steps):
  """The same of vector-quantize-pytorch."""
  import torch
  from vector_quantize_pytorch import VectorQuantize

  torch.manual_seed(0)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  module = VectorQuantize(width, codes, **METHODS[method]).to(device).train()

  def there(x):
    return torch.from_dlpack(jax.block_until_ready(x)).to(device)[None]

  began = time.perf_counter()
  with torch.no_grad():
    for i in range(steps):
      module(there(batch(i)))
    table = jnp.asarray(module.codebook.cpu().numpy())
  seconds = time.perf_counter() - began

  def call(z, table):
    indices = nearest_code(z, table)
    return indices, table[indices]

  return call, table, seconds


def measure(method, batch, codes=4096, width=256, steps=1000, tokens=TEST):
  """A row: usage, perplexity and squared error over test tokens."""
  made = theirs if method.startswith('vector') else ours
  call, arrays, seconds = made(method, batch, codes, width, steps)
  size = math.prod(LEVELS[codes]) if method.startswith('fsq') else codes

  @jax.jit
  def add(arrays, counts, z):
    indices, z_q = call(z, arrays)
    counts = counts + code_ops.count_codes(indices, size)
    return counts, (z.mean(0), (z * z).mean(), ((z_q - z) ** 2).mean())

  counts, sums = jnp.zeros(size, jnp.int32), []
  for i in range(math.ceil(tokens / TOKENS)):
    counts, found = add(arrays, counts, batch(TEST + i))
    sums.append(found)
  mean, square, error = (
    np.mean([np.asarray(x, np.float64) for x in xs], 0)
    for xs in zip(*sums, strict=True)
  )
  return dict(
    method=method,
    codes=codes,
    size=size,
    width=width,
    steps=steps,
    test_tokens=int(counts.sum()),
    usage=float(code_ops.usage(counts)),
    perplexity=float(code_ops.perplexity(counts)) / size,
    # A share of the variance of tokens.
    error=float(error / (square - (mean * mean).mean())),
    seconds=round(seconds, 1),
  )


KEY = 'data', 'codes', 'width', 'method', 'steps'


def write(path, row):
  """Adds a row to a file, in place of one of the same setting."""
  rows = json.loads(path.read_text()) if path.exists() else []
  same = [all(r[k] == row[k] for k in KEY) for r in rows]
  rows = [r for r, is_it in zip(rows, same, strict=True) if not is_it] + [row]
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(rows, indent=1) + '\n')


def report():
  """Writes the tables into docs/quantizers.md, between its marks."""
  groups = {}
  for path in sorted(RESULTS.glob('*.json')):
    for row in json.loads(path.read_text()):
      key = tuple(row[k] for k in KEY if k != 'method')
      groups.setdefault(key, {})[row['method']] = row
  made = []
  for (data, codes, width, steps), rows in sorted(groups.items()):
    least = rows['kmeans']['error'] if 'kmeans' in rows else None
    one = next(iter(rows.values()))
    versions = ', '.join(f'{k} {v}' for k, v in one['versions'].items())
    dates = [row['date'] for row in rows.values()]
    dates = ' to '.join(sorted({min(dates), max(dates)}))
    hardware = ' or '.join(sorted({r['hardware'] for r in rows.values()}))
    made += [
      f'### {data}, {codes:,} codes, width {width}',
      '',
      f'{steps:,} steps; {one["test_tokens"]:,} test tokens; {dates}; '
      f'{hardware}; {versions}.',
      '',
      '| method | usage | perplexity / K | error | beside k-means | seconds |',
      '| --- | --- | --- | --- | --- | --- |',
    ]
    for name in (name for name in METHODS if name in rows):
      row = rows[name]
      ratio = f'{row["error"] / least:.3f}' if least else ''
      made.append(
        f'| {name} | {row["usage"]:.1%} | {row["perplexity"]:.3f} | '
        f'{row["error"]:.4f} | {ratio} | '
        f'{row["seconds"]:.0f} |'
      )
    made.append('')
  report_lib.write('quantizers.md', 'codebooks', '\n'.join(made).strip())


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  cache = pathlib.Path(tempfile.gettempdir()) / 'codebooks'
  parser.add_argument('--data', default='synthetic', help='a,b')
  parser.add_argument('--method', default=','.join(METHODS), help='a,b')
  parser.add_argument('--codes', type=int, default=4096)
  parser.add_argument('--width', type=int, default=256, help='of synthetic')
  parser.add_argument('--steps', type=int, default=1000)
  parser.add_argument('--tokens', type=int, default=TEST, help='of the test')
  parser.add_argument('--root', type=pathlib.Path, help='of real data')
  parser.add_argument('--cache', type=pathlib.Path, default=cache)
  kind = jax.default_backend()
  parser.add_argument(
    '--json', type=pathlib.Path, default=RESULTS / f'{kind}.json'
  )
  parser.add_argument('--report', action='store_true')
  options = parser.parse_args()
  if options.report:
    report()
    return
  packages = 'jax', 'torch', 'vector-quantize-pytorch'
  for data in options.data.split(','):
    if data == 'synthetic':
      width, batch = options.width, synthetic(options.width)
    else:
      width, batch = 384, latents(data, options.root, options.cache)
    for method in options.method.split(','):
      row = dict(data=data) | measure(
        method, batch, options.codes, width, options.steps, options.tokens
      )
      row |= dict(
        date=datetime.date.today().isoformat(),
        hardware=report_lib.hardware(),
        versions={'python': platform.python_version()}
        | {p: importlib.metadata.version(p) for p in packages},
      )
      write(options.json, row)
      print(
        f'{data} {method}: usage {row["usage"]:.4f}, perplexity / K '
        f'{row["perplexity"]:.4f}, error {row["error"]:.4f} '
        f'({row["seconds"]:.0f} s)', flush=True,
      )  # fmt: skip


if __name__ == '__main__':
  main()
