"""A decoder-only transformer on a dump of tokens, class by class.

    python -m vqrae_jax.tokenize --tokenizer=DIR --data=DATA --out=DUMP
    python -m examples.ar.train --tokens=DUMP --tokenizer=DIR --out=OUT

It reads the class, then the tokens in raster order, and predicts each from
those before it, as LlamaGen does (arXiv 2406.06525) on a plain ViT's blocks.
Sampling caches keys and values. OUT gets samples.png (one row per class),
samples.npy (their indices) and losses.json. `docs/generation.md` has figures.
Left out: rotary positions, dropout, EMA weights, checkpoints, several devices.
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
  """Logits of each token from the class and the tokens before it.

  Input ids are codes 0 to K - 1, K for no class and K + 1 + c for class c.
  With `decode` they come one at a time, and the collection `cache` has the keys
  and values of those before.
  """

  codes: int
  classes: int
  width: int
  depth: int
  length: int
  decode: bool = False

  @nn.compact
  def __call__(self, ids, places):
    """i32[b m] at places i32[m] -> f32[b m K]."""
    small = nn.initializers.normal(0.02)
    rows = self.codes + 1 + self.classes
    x = nn.Embed(rows, self.width, embedding_init=small)(ids)
    x = x + self.param('positions', small, (self.length, self.width))[places]
    mask = None if self.decode else nn.make_causal_mask(ids)
    for _ in range(self.depth):
      y = nn.LayerNorm()(x)
      attend = nn.MultiHeadDotProductAttention(
        self.width // HEAD, decode=self.decode
      )
      x = x + attend(y, mask=mask)
      y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
      x = x + nn.Dense(self.width)(nn.gelu(y))
    x = nn.LayerNorm()(x)
    return nn.Dense(self.codes, kernel_init=nn.initializers.zeros)(x)


# -- training ----------------------------------------------------------------
def losses(model, params, tokens, labels):
  """f32[b]: nats a token of each row of i32[b n], of classes i32[b]."""
  first = model.codes + 1 + labels[:, None]
  ids = jnp.concatenate([first, tokens[:, :-1]], axis=1)
  logits = model.apply(params, ids, jnp.arange(model.length))
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  return nats.mean(1)


def train(model, batches, test, values, report):
  """The parameters after `values.steps` steps; `report(step, loss, held-out
  loss)` on the way."""
  ids = jnp.zeros((1, model.length), jnp.int32), jnp.arange(model.length)
  params = jax.jit(model.init)(jax.random.key(values.seed), *ids)
  rate = optax.warmup_cosine_decay_schedule(
    0, values.lr, values.steps // 20, values.steps
  )
  adamw = optax.adamw(rate, b2=0.95, weight_decay=0.03)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)

  @jax.jit
  def step(params, state, batch, key):
    dropped = jax.random.bernoulli(key, DROP, batch['label'].shape)
    labels = jnp.where(dropped, -1, batch['label'])

    def loss(params):
      return losses(model, params, batch['tokens'], labels).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  @jax.jit
  def evaluate(params, batch):
    return losses(model, params, batch['tokens'], batch['label'])

  state = jax.jit(optimizer.init)(params)
  key, seen = jax.random.key(values.seed + 1), []
  every = max(values.steps // EVERY, 1)
  for i, batch in zip(range(1, values.steps + 1), batches, strict=False):
    params, state, value = step(
      params, state, batch, jax.random.fold_in(key, i)
    )
    seen.append(value)
    if i % every == 0 or i == values.steps:
      found = [evaluate(params, x) for x in test]
      report(i, float(np.mean(seen)), float(np.concatenate(found).mean()))
      seen = []
  return params


# -- sampling ----------------------------------------------------------------
def nucleus(logits, mass):
  """Logits, -inf but for the likeliest codes, whose probabilities come to
  `mass`."""
  ordered = jnp.sort(logits, descending=True)
  p = jax.nn.softmax(ordered)
  kept = jnp.cumsum(p, axis=-1) - p < mass
  least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
  return jnp.where(logits < least, -jnp.inf, logits)


def sample(model, params, labels, key, values):
  """i32[b n] of the classes i32[b]."""
  model = model.clone(decode=True)
  none = jnp.full_like(labels, -1)
  first = model.codes + 1 + jnp.concatenate([labels, none])

  def step(carry, inputs):
    cache, ids = carry
    place, key = inputs
    logits, changed = model.apply(
      params | cache, ids[:, None], place[None], mutable=['cache']
    )
    given, free = jnp.split(logits[:, 0], 2)
    logits = (free + values.guidance * (given - free)) / values.temperature
    drawn = jax.random.categorical(key, nucleus(logits, values.top_p))
    return (changed, jnp.concatenate([drawn, drawn])), drawn

  shape = jnp.zeros((len(first), model.length), jnp.int32)
  places = jnp.arange(model.length)
  made = jax.eval_shape(model.init, key, shape, places)
  cache = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), dict(cache=made['cache'])
  )
  keys = jax.random.split(key, model.length)
  return jax.lax.scan(step, (cache, first), (places, keys))[1].T


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
  ):
    flags.DEFINE_integer(name, default, text, lower_bound=1, **keys)
  flags.DEFINE_integer('seed', 0, 'seed of weights and samples', **keys)
  flags.DEFINE_float('lr', 1e-3, 'the learning rate', **keys)
  text = 'guidance scale: 1 for no guidance, 0 ignores the class'
  flags.DEFINE_float('guidance', 2.0, text, **keys)
  text = 'divides the logits'
  flags.DEFINE_float('temperature', 1.0, text, lower_bound=1e-3, **keys)
  text = 'nucleus sampling: probability mass of the codes kept; 1 keeps all'
  flags.DEFINE_float('top_p', 0.95, text, 1e-3, 1, **keys)
  example = (
    'python -m examples.ar.train --tokens=DUMP --tokenizer=DIR --out=OUT'
  )
  cli.parse(values, argv, 'examples.ar.train', example)
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

  model = Transformer(codes, classes, values.width, values.depth, n)
  params = train(model, batches, test, values, report)
  with atomic_write(out / 'losses.json') as file:
    file.write(json.dumps(dict(models, steps=found), indent=1).encode())

  labels = jnp.repeat(jnp.array([*range(classes)] or [-1]), COLUMNS)
  draw = jax.jit(lambda p, key: sample(model, p, labels, key, values))
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
