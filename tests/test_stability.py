"""Indices do not depend on the batch they travel in, up to the margin.

The same images at batch 1, 3 and 24, equal parameters, f32: wherever the
score of the best code beats the second by more than 1e-4 of the score scale,
the index must be the same. One quantizer per kind of assignment.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqrae_jax
from tests import tiny

BATCHES, IMAGES = (1, 3, 24), 24


def margins(tokenizer, variables, images):
  """(margin f64[n], scale): gaps between the two best choices of a token."""
  latents = vqrae_jax.encode(tokenizer, variables, images)

  def code_space(t, z):
    y = t.quantizer.to_code_space(z)
    surrogate = t.quantizer(z).codes, t.quantizer._assign(y, False, None)[0]
    return surrogate[1], t.quantizer.baked_codebook()

  z, baked = tokenizer.apply(variables, latents, method=code_space)
  z = np.asarray(z, np.float64).reshape(-1, z.shape[-1])
  if baked:
    table = np.asarray(baked['codes'], np.float64)
    scores = ((z[:, None] - table[None]) ** 2).sum(-1)
    best = np.sort(scores, axis=1)
    return best[:, 1] - best[:, 0], np.abs(scores).mean()
  # FSQ: how far a channel is from the next rounding border, in its step.
  q = tokenizer.quantizer
  step = 1.0
  if q.convention == 'cosmos':
    z = z * (np.array(q.levels) // 2)
  else:
    z = z + (np.array(q.levels) - 1) / 2
  return np.abs(z - np.floor(z) - 0.5).min(-1), step


@pytest.mark.parametrize('kind', ('fsq-cosmos', 'vq-ema', 'simvq-cosine'))
def test_indices_at_any_batch_size(kind):
  tokenizer, variables = tiny.built(tiny.model(kind, depth=1))
  images = tiny.images(IMAGES)
  encode = jax.jit(
    functools.partial(vqrae_jax.encode_to_indices, tokenizer),
    compiler_options=tiny.AS_USERS,
  )
  found = {
    b: np.concatenate(
      [encode(variables, images[i : i + b]) for i in range(0, IMAGES, b)]
    ).ravel()
    for b in BATCHES
  }
  margin, scale = margins(tokenizer, variables, jnp.asarray(images))
  clear = margin > 1e-4 * scale
  assert clear.mean() > 0.9, 'the test has too few clear choices'
  for b in BATCHES[1:]:
    np.testing.assert_array_equal(found[b][clear], found[1][clear])
