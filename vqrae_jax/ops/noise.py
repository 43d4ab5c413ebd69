"""Noise on latents, drawn explicitly (RAE, arXiv 2510.11690).

A decoder that learned on noisy latents forgives a generator's. Each sample's
draws come out of a key and that sample's own number, as in `augment.py`, so
that neither devices nor the parts of a step change them.
"""

import jax
from jaxtyping import Array, Float, Int, Key


def draw(
  key: Key[Array, ''],
  sample_indices: Int[Array, ' b'],
  shape: tuple[int, ...],
) -> Float[Array, 'b ...']:
  """U[0, 1) x N(0, 1): one U a sample, one N(0, 1) a value.

  Args:
    key: of this step and this use.
    sample_indices: each sample's row in the step's whole batch.
    shape: of one sample's latents, [gh gw d].

  Returns:
    f32[b *shape].
  """

  def one(index):
    level, values = jax.random.split(jax.random.fold_in(key, index))
    return jax.random.uniform(level) * jax.random.normal(values, shape)

  return jax.vmap(one)(sample_indices)
