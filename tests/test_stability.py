"""Indices depend neither on their batch nor on devices, up to the margin.

The same images one by one, at once, and at once over 8 devices in every layout,
equal parameters, f32: wherever the score of the best code beats the second by
more than 1e-4 of the score scale, the index must be the same. One quantizer per
kind of assignment.
"""

import functools

import jax
import numpy as np
import pytest

import vqrae_jax
from tests import tiny
from vqrae_jax import sharding

LAYOUTS = {'dp': 1, 'fsdp': 1, 'fsdp+tp': 2}


def margins(tokenizer, variables, images):
  """(margin f64[n], scale): gaps between the two best choices of a token."""

  @jax.jit
  def search(variables, images):
    (found,) = tokenizer.apply(variables, images, method='search_codes')
    return found.tokens, found.table

  z, table = search(variables, images)
  z = np.asarray(z, np.float64).reshape(-1, z.shape[-1])
  if table is not None:
    table = np.asarray(table, np.float64)
    scores = ((z[:, None] - table[None]) ** 2).sum(-1)
    best = np.sort(scores, axis=1)
    return best[:, 1] - best[:, 0], np.abs(scores).mean()
  # FSQ: how far a channel is from the next rounding border, in its step.
  z = z * (np.array(tokenizer.quantizer.levels) // 2)  # "cosmos"
  return np.abs(z - np.floor(z) - 0.5).min(-1), 1.0


@pytest.mark.parametrize(
  'kind',
  [
    pytest.param('fsq-cosmos', marks=pytest.mark.slow),
    'vq-ema',
    'simvq-cosine',
  ],
)
def test_indices_at_any_batch_size_and_layout(kind):
  tokenizer, variables = tiny.built(tiny.model(kind, depth=1))
  images = tiny.images(24)
  encode = jax.jit(
    functools.partial(vqrae_jax.encode_to_indices, tokenizer),
    compiler_options=tiny.AS_USERS,
  )
  want = np.ravel([encode(variables, image[None]) for image in images])
  found = {'at once': encode(variables, images)}
  for layout, tensor in LAYOUTS.items():
    mesh = sharding.make_mesh(layout, tensor=tensor)
    places = sharding.shardings_for(variables, mesh)
    batch = sharding.place_batch({'images': images}, mesh)['images']
    with jax.set_mesh(mesh):
      # Read at once: two programs that run side by side on fake devices can
      # each wait for threads that the other holds.
      found[layout] = np.asarray(
        encode(jax.device_put(variables, places), batch)
      )
  margin, scale = margins(tokenizer, variables, images)
  clear = margin > 1e-4 * scale
  assert clear.mean() > 0.9, 'the test has too few clear choices'
  for name, indices in found.items():
    np.testing.assert_array_equal(np.ravel(indices)[clear], want[clear], name)
