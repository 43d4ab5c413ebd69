"""MaskGIT (arXiv 2202.04200) on a dump of tokens, class by class.

    python -m vqrae_jax.tokenize --tokenizer=DIR --data=DATA --out=DUMP
    python -m examples.maskgit.train --tokens=DUMP --tokenizer=DIR --out=OUT

A transformer without a causal mask predicts the tokens that are masked from
those that are not and from the class. Sampling starts with all of them masked
and keeps the most confident ones at each step. OUT gets samples.png (one row
per class), samples.npy (their indices) and losses.json. `docs/generation.md`
has figures. Left out: label smoothing, dropout, EMA weights, checkpoints,
several devices.
"""

import json
import math
import pathlib
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from PIL import Image

import vqrae_jax
from examples import dumped
from vqrae_jax import cli
from vqrae_jax.errors import UserError, read_json
from vqrae_jax.files import atomic_write
from vqrae_jax.tokens import open_dump

HEAD = 64  # channels
DROP = 0.1  # the share of classes that training drops, for guidance
EVERY = 10  # reports of a run
COLUMNS = 8  # samples of a class


class Transformer(nn.Module):
  """Logits of the tokens of an image.

  Input ids are codes 0 to K - 1, K for a token that is masked, K + 1 for no
  class and K + 2 + c for class c.
  """

  codes: int
  classes: int
  width: int
  depth: int

  @nn.compact
  def __call__(self, tokens, labels):
    """i32[b n], K where masked, i32[b], -1 for no class -> f32[b n K]."""
    ids = jnp.concatenate([self.codes + 2 + labels[:, None], tokens], axis=1)
    small = nn.initializers.normal(0.02)
    rows = self.codes + 2 + self.classes
    x = nn.Embed(rows, self.width, embedding_init=small)(ids)
    x = x + self.param('positions', small, x.shape[1:])
    for _ in range(self.depth):
      y = nn.LayerNorm()(x)
      x = x + nn.MultiHeadDotProductAttention(self.width // HEAD)(y)
      y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
      x = x + nn.Dense(self.width)(nn.gelu(y))
    x = nn.LayerNorm()(x[:, 1:])
    return nn.Dense(self.codes, kernel_init=nn.initializers.zeros)(x)


# -- training ----------------------------------------------------------------
def masks(key, count, n):
  """bool[b n]: of each row, `count` i32[b] tokens at random."""
  order = jnp.argsort(jax.random.uniform(key, (len(count), n)))
  return jnp.argsort(order) < count[:, None]


def losses(model, params, batch, masked):
  """f32[b]: nats a masked token of each row."""
  tokens = jnp.where(masked, model.codes, batch['tokens'])
  logits = model.apply(params, tokens, batch['label'])
  nats = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['tokens']
  )
  return (nats * masked).sum(1) / masked.sum(1)


def train(model, batches, test, n, values, report):
  """The parameters after `values.steps` steps; `report(step, loss, held-out
  loss)` on the way."""
  shape = jnp.zeros((1, n), jnp.int32), jnp.zeros(1, jnp.int32)
  params = jax.jit(model.init)(jax.random.key(values.seed), *shape)
  rate = optax.warmup_cosine_decay_schedule(
    0, values.lr, values.steps // 20, values.steps
  )
  adamw = optax.adamw(rate, b2=0.95, weight_decay=0.03)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)

  @jax.jit
  def step(params, state, batch, key):
    keys, b = jax.random.split(key, 3), len(batch['label'])
    dropped = jax.random.bernoulli(keys[0], DROP, (b,))
    batch['label'] = jnp.where(dropped, -1, batch['label'])
    share = jnp.cos(jnp.pi / 2 * jax.random.uniform(keys[1], (b,)))
    masked = masks(keys[2], jnp.ceil(share * n), n)

    def loss(params):
      return losses(model, params, batch, masked).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  @jax.jit
  def evaluate(params, batch, key):
    # Any number of masked tokens alike: the mean is then a bound of -log p of
    # an image, a token, in random order (arXiv 2110.02037).
    count = 1 + jax.random.permutation(key, len(batch['label'])) % n
    return losses(model, params, batch, masks(key, count, n))

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


# -- sampling ----------------------------------------------------------------
def sample(model, params, labels, n, key, values):
  """i32[b n] of the classes i32[b]."""
  both = jnp.concatenate([labels, jnp.full_like(labels, -1)])

  def step(tokens, inputs):
    left, heat, key = inputs  # so many stay masked
    draw, order = jax.random.split(key)
    logits = model.apply(params, jnp.concatenate([tokens, tokens]), both)
    given, free = jnp.split(logits, 2)
    logits = free + values.guidance * (given - free)
    drawn = jax.random.categorical(draw, logits)
    sure = jnp.take_along_axis(
      jax.nn.log_softmax(logits), drawn[..., None], -1
    )[..., 0]
    sure = sure + heat * jax.random.gumbel(order, sure.shape)
    masked = tokens == model.codes
    tokens = jnp.where(masked, drawn, tokens)
    rank = jnp.argsort(jnp.argsort(jnp.where(masked, sure, jnp.inf)))
    return jnp.where(rank < left, model.codes, tokens), None

  share = np.arange(1, values.sample_steps + 1) / values.sample_steps
  left = np.floor(n * np.cos(np.pi / 2 * share)).astype(np.int32)
  heat = (values.temperature * (1 - share)).astype(np.float32)
  start = jnp.full((len(labels), n), model.codes)
  keys = jax.random.split(key, values.sample_steps)
  return jax.lax.scan(step, start, (left, heat, keys))[0]


def main(argv: list[str]) -> None:
  """Parses flags, trains, samples."""
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
    ('sample_steps', 12, 'steps of sampling'),
  ):
    flags.DEFINE_integer(name, default, text, lower_bound=1, **keys)
  flags.DEFINE_integer('seed', 0, 'seed of weights, masks and samples', **keys)
  flags.DEFINE_float('lr', 1e-3, 'the learning rate', **keys)
  text = 'guidance scale: 1 for no guidance, 0 ignores the class'
  flags.DEFINE_float('guidance', 2.0, text, **keys)
  text = "scale of the Gumbel noise on tokens' log-probabilities; falls to 0"
  flags.DEFINE_float('temperature', 4.5, text, **keys)
  example = (
    'python -m examples.maskgit.train --tokens=DUMP --tokenizer=DIR --out=OUT'
  )
  cli.parse(values, argv, 'examples.maskgit.train', example)
  cli.required(values, 'tokens', 'tokenizer', 'out')
  if values.width % HEAD:
    raise UserError(f'--width={values.width} must be a multiple of {HEAD}')
  folder = pathlib.Path(values.tokenizer)
  tokenizer, variables = vqrae_jax.load_tokenizer(folder)
  fingerprint = read_json(folder / 'config.json')['fingerprint']
  dump = open_dump(values.tokens, fingerprint=fingerprint)
  out = cli.new_folder(values.out)
  out.mkdir(parents=True, exist_ok=True)

  rows, batches, test = dumped.split(dump, values.batch_size)
  codes, shape = dump.layout.codebook_size, dump.layout.index_shape
  n = math.prod(shape)
  classes, models = dumped.statistics(rows, n, codes)
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

  model = Transformer(codes, classes, values.width, values.depth)
  params = train(model, batches, test, n, values, report)
  with atomic_write(out / 'losses.json') as file:
    file.write(json.dumps(dict(models, steps=found), indent=1).encode())

  labels = jnp.repeat(jnp.array([*range(classes)] or [-1]), COLUMNS)
  draw = jax.jit(lambda p, key: sample(model, p, labels, n, key, values))
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


if __name__ == '__main__':
  cli.run(main)
