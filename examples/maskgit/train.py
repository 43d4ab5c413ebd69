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

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from examples import training
from vqrae_jax import cli


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
      x = x + nn.MultiHeadDotProductAttention(self.width // training.HEAD)(y)
      y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
      x = x + nn.Dense(self.width)(nn.gelu(y))
    x = nn.LayerNorm()(x[:, 1:])
    return nn.Dense(self.codes, kernel_init=nn.initializers.zeros)(x)


def masks(key, count, n):
  """bool[b n]: of each row, `count` i32[b] tokens at random."""
  order = jnp.argsort(jax.random.uniform(key, (len(count), n)))
  return jnp.argsort(order) < count[:, None]


def nats(model, params, tokens, labels, masked):
  """f32[b]: nats a masked token of each row of i32[b n], of classes i32[b]."""
  logits = model.apply(params, jnp.where(masked, model.codes, tokens), labels)
  found = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  return (found * masked).sum(1) / masked.sum(1)


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


def define(values: flags.FlagValues) -> None:
  """The flags of sampling."""
  keys = dict(flag_values=values)
  flags.DEFINE_integer('sample_steps', 12, 'steps of sampling', 1, **keys)
  text = "scale of the Gumbel noise on tokens' log-probabilities; falls to 0"
  flags.DEFINE_float('temperature', 4.5, text, **keys)


def build(codes, classes, n, values) -> training.Prior:
  """The model of images of n tokens."""
  model = Transformer(codes, classes, values.width, values.depth)

  def loss(params, batch, key):
    keys, labels = jax.random.split(key, 3), batch['label']
    share = jnp.cos(jnp.pi / 2 * jax.random.uniform(keys[1], labels.shape))
    masked = masks(keys[2], jnp.ceil(share * n), n)
    labels = training.without_class(labels, keys[0])
    return nats(model, params, batch['tokens'], labels, masked).mean()

  def held_out(params, batch, key):
    # Any number of masked tokens alike: the mean is then a bound of -log p of
    # an image, a token, in random order (arXiv 2110.02037).
    count = 1 + jax.random.permutation(key, len(batch['label'])) % n
    masked = masks(key, count, n)
    return nats(model, params, batch['tokens'], batch['label'], masked)

  ids = jnp.zeros((1, n), jnp.int32), jnp.zeros(1, jnp.int32)
  return training.Prior(
    init=lambda key: model.init(key, *ids),
    loss=loss,
    nats=held_out,
    sample=lambda params, x, key: sample(model, params, x, n, key, values),
  )


def main(argv: list[str]) -> None:
  """Parses flags, trains, samples."""
  training.main(argv, 'examples.maskgit.train', define, build)


if __name__ == '__main__':
  cli.run(main)
