"""What `examples/ar` and `examples/maskgit` share: flags, the data of a dump,
the training loop, and the files that are written."""

import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from PIL import Image

import vqrae_jax
from vqrae_jax import cli
from vqrae_jax.errors import UserError, read_json
from vqrae_jax.files import atomic_write
from vqrae_jax.tokens import open_dump

HEAD = 64  # channels
DROP = 0.1  # the share of classes that training drops, for guidance
EVERY = 10  # reports of a run
COLUMNS = 8  # samples of a class


class Prior(NamedTuple):
  """A model of tokens. A batch has "tokens" i32[b n] and "label" i32[b], -1
  for no class.

  Attributes:
    init: key -> params.
    loss: (params, batch, key) -> f32[], which training lowers.
    nats: (params, batch, key) -> f32[b], of held-out images, a token.
    sample: (params, labels i32[b], key) -> i32[b n].
  """

  init: Callable
  loss: Callable
  nats: Callable
  sample: Callable


def main(argv, module, define, build):
  """Parses flags, trains, samples.

  Args:
    argv: without the program.
    module: which is run.
    define: defines its own flags in absl's FlagValues.
    build: (codes, classes, tokens of an image, flags) -> its Prior.
  """
  values = flags.FlagValues()
  keys = dict(flag_values=values)
  flags.DEFINE_string('tokens', None, 'a dump written by tokenize', **keys)
  flags.DEFINE_string('tokenizer', None, 'the tokenizer of the dump', **keys)
  flags.DEFINE_string('out', None, 'the folder to write', **keys)
  for name, default, text in (
    ('steps', 2000, 'training steps'),
    ('batch_size', 32, 'images per step'),
    ('width', 128, 'channels, a multiple of 64'),
    ('depth', 4, 'blocks'),
  ):
    flags.DEFINE_integer(name, default, text, lower_bound=1, **keys)
  flags.DEFINE_integer('seed', 0, 'seed of weights and of all draws', **keys)
  flags.DEFINE_float('lr', 1e-3, 'the learning rate', **keys)
  text = 'guidance scale: 1 for no guidance, 0 ignores the class'
  flags.DEFINE_float('guidance', 2.0, text, **keys)
  define(values)
  example = f'python -m {module} --tokens=DUMP --tokenizer=DIR --out=OUT'
  cli.parse(values, argv, module, example)
  cli.required(values, 'tokens', 'tokenizer', 'out')
  if values.width % HEAD:
    raise UserError(f'--width={values.width} must be a multiple of {HEAD}')
  folder = pathlib.Path(values.tokenizer)
  tokenizer, variables = vqrae_jax.load_tokenizer(folder)
  fingerprint = read_json(folder / 'config.json')['fingerprint']
  dump = open_dump(values.tokens, fingerprint=fingerprint)
  out = cli.new_folder(values.out)
  out.mkdir(parents=True, exist_ok=True)

  rows, batches, test = split(dump, values.batch_size)
  codes, shape = dump.layout.codebook_size, dump.layout.index_shape
  n = math.prod(shape)
  classes, models = statistics(rows, n, codes)
  print(f'{len(rows)} rows of {n} tokens of {classes} classes')
  found, began = [], time.perf_counter()

  def report(step, loss, held_out):
    seconds = time.perf_counter() - began
    row = dict(step=step, loss=loss, held_out=held_out, seconds=seconds)
    found.append(row)
    text = ', '.join(
      f'{name} {nats:.3f} nats ({nats / math.log(2):.2f} bits)'
      for name, nats in dict(loss=loss, held_out=held_out, **models).items()
    )
    print(f'step {step}: {text}; {seconds:.0f} s', flush=True)

  prior = build(codes, classes, n, values)
  params = train(prior, batches, test, values, report)
  with atomic_write(out / 'losses.json') as file:
    file.write(json.dumps(dict(models, steps=found), indent=1).encode())

  labels = jnp.repeat(jnp.array([*range(classes)] or [-1]), COLUMNS)
  draw = jax.jit(lambda p, key: prior.sample(p, labels, key))
  indices = draw(params, jax.random.key(values.seed)).reshape(-1, *shape)
  decode = jax.jit(vqrae_jax.decode_from_indices, static_argnums=0)
  images = np.asarray(decode(tokenizer, variables, indices))
  h, w = images.shape[1:3]
  grid = images.reshape(-1, COLUMNS, h, w, 3).swapaxes(1, 2)
  grid = np.round(255 * grid.reshape(-1, COLUMNS * w, 3)).astype(np.uint8)
  with atomic_write(out / 'samples.npy') as file:
    np.save(file, np.asarray(indices))
  with atomic_write(out / 'samples.png') as file:
    Image.fromarray(grid).save(file, format='PNG')
  print(f'{out}: samples.png, a row of {COLUMNS} a class')


def train(prior, batches, test, values, report):
  """The parameters after `values.steps` steps; `report(step, loss, held-out
  loss)` on the way."""
  params = jax.jit(prior.init)(jax.random.key(values.seed))
  rate = optax.warmup_cosine_decay_schedule(
    0, values.lr, values.steps // 20, values.steps
  )
  adamw = optax.adamw(rate, b2=0.95, weight_decay=0.03)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)

  @jax.jit
  def step(params, state, batch, key):
    value, grads = jax.value_and_grad(prior.loss)(params, batch, key)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  evaluate = jax.jit(prior.nats)
  state = jax.jit(optimizer.init)(params)
  key, seen = jax.random.key(values.seed + 1), []
  every = max(values.steps // EVERY, 1)
  for i, batch in zip(range(1, values.steps + 1), batches, strict=False):
    params, state, value = step(
      params, state, batch, jax.random.fold_in(key, i)
    )
    seen.append(value)
    if i % every == 0 or i == values.steps:
      found = [
        evaluate(params, x, jax.random.key(j)) for j, x in enumerate(test)
      ]
      report(i, float(np.mean(seen)), float(np.concatenate(found).mean()))
      seen = []
  return params


def without_class(labels, key):
  """i32[b] with a share of them, `DROP`, set to -1, for guidance."""
  return jnp.where(jax.random.bernoulli(key, DROP, labels.shape), -1, labels)


def split(dump, batch):
  """(training rows, held-out rows), of 1 image in 20, at most 1000: datasets
  of {"tokens": i32[b n], "label": i32[b]}, the first without end."""
  images, views = len(dump) // dump.layout.views, dump.layout.views
  order = np.random.default_rng(0).permutation(images)
  held = np.isin(np.arange(images), order[: min(-(-images // 20), 1000)])

  def read(row):
    found = dump[int(row)]
    return dict(tokens=found['tokens'].ravel(), label=np.int32(found['label']))

  rows = [np.flatnonzero(np.repeat(x, views)) for x in (~held, held)]
  train, test = (grain.MapDataset.source(x) for x in rows)
  train_batches = train.shuffle(seed=0).repeat().map(read).batch(batch)
  return train.map(read), train_batches, test.map(read).batch(batch)


def statistics(rows, n, codes):
  """(how many classes there are, {model: nats a token}) of training rows: the
  uniform model, and the entropy of the histogram of all tokens (order 0) and
  of those at each position."""
  counts, classes = np.zeros((n, codes)), 0
  for row in rows:
    counts[np.arange(n), row['tokens']] += 1
    classes = max(classes, int(row['label']) + 1)

  def entropy(counts):
    p = counts / counts.sum(-1, keepdims=True)
    return float(-(p * np.log(np.where(p > 0, p, 1))).sum(-1).mean())

  return classes, dict(
    uniform=math.log(codes),
    order0=entropy(counts.sum(0)),
    order0_position=entropy(counts),
  )
