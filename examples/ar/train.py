"""A decoder-only transformer on a dump of tokens, class by class.

    python -m vqrae_jax.tokenize --tokenizer=DIR --data=DATA --out=DUMP
    python -m examples.ar.train --tokens=DUMP --tokenizer=DIR --out=OUT

It reads the class, then the tokens in raster order, and predicts each from
those before it, as LlamaGen does (arXiv 2406.06525) on a plain ViT's blocks.
Sampling caches keys and values. OUT gets samples.png (one row per class),
samples.npy (their indices) and losses.json. `docs/generation.md` has figures.
Left out: rotary positions, dropout, EMA weights, checkpoints, several devices.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from absl import flags

from examples import training
from vqrae_jax import cli


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
        self.width // training.HEAD, decode=self.decode
      )
      x = x + attend(y, mask=mask)
      y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
      x = x + nn.Dense(self.width)(nn.gelu(y))
    x = nn.LayerNorm()(x)
    return nn.Dense(self.codes, kernel_init=nn.initializers.zeros)(x)


def nats(model, params, tokens, labels):
  """f32[b]: nats a token of each row of i32[b n], of classes i32[b]."""
  first = model.codes + 1 + labels[:, None]
  ids = jnp.concatenate([first, tokens[:, :-1]], axis=1)
  logits = model.apply(params, ids, jnp.arange(model.length))
  found = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  return found.mean(1)


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


def define(values: flags.FlagValues) -> None:
  """The flags of sampling."""
  text = 'divides the logits'
  flags.DEFINE_float('temperature', 1.0, text, 1e-3, flag_values=values)
  text = 'nucleus sampling: probability mass of the codes kept; 1 keeps all'
  flags.DEFINE_float('top_p', 0.95, text, 1e-3, 1, flag_values=values)


def build(codes, classes, n, values) -> training.Prior:
  """The model of images of n tokens."""
  model = Transformer(codes, classes, values.width, values.depth, n)

  def loss(params, batch, key):
    labels = training.without_class(batch['label'], key)
    return nats(model, params, batch['tokens'], labels).mean()

  ids = jnp.zeros((1, n), jnp.int32)
  return training.Prior(
    init=lambda key: model.init(key, ids, jnp.arange(n)),
    loss=loss,
    nats=lambda params, x, _: nats(model, params, x['tokens'], x['label']),
    sample=lambda params, x, key: sample(model, params, x, key, values),
  )


def main(argv: list[str]) -> None:
  """Parses flags, trains, samples."""
  training.main(argv, 'examples.ar.train', define, build)


if __name__ == '__main__':
  cli.run(main)
