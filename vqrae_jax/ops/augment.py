"""Random perturbations in training: of a discriminator's images, of latents.

DiffAug (arXiv 2006.10738): translation, brightness, saturation, contrast and
optional cutout; `apply` is a pure function of images and draws. Noise on
latents (RAE, arXiv 2510.11690): a decoder trained on noisy latents tolerates a
generator's. Each sample's draws come from a key and that sample's id, so that
neither its device nor its microbatch changes them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from vqrae_jax.ops.images import need_floats

TRANSLATION = 0.125  # of a side, at most, in either direction


def draw(
  key: Key[Array, ''], sample_ids: Int[Array, ' b']
) -> Float[Array, 'b 7']:
  """Seven uniform numbers in [0, 1) per sample, for `apply`.

  Args:
    key: of this step and use: real and reconstructed images need two.
    sample_ids: each sample's row in the step's full batch.
  """

  def draw_one(index):
    return jax.random.uniform(jax.random.fold_in(key, index), (7,))

  return jax.vmap(draw_one)(sample_ids)


def _translate(x: Array, shift: Array) -> Array:
  """Shifts each image by up to TRANSLATION of a side, padded with zeros."""
  h, w = x.shape[1:3]
  most = (round(h * TRANSLATION), round(w * TRANSLATION))
  steps = jnp.asarray([2 * m + 1 for m in most], shift.dtype)
  start = jnp.floor(shift * steps).astype(jnp.int32)
  start = jnp.minimum(start, steps.astype(jnp.int32) - 1)
  padded = jnp.pad(x, ((0, 0), (most[0],) * 2, (most[1],) * 2, (0, 0)))

  def cut(image, at):
    return jax.lax.dynamic_slice(image, (at[0], at[1], 0), x.shape[1:])

  return jax.vmap(cut)(padded, start)


def _cut_out(x: Array, hole: Array, share: float) -> Array:
  """Zeroes a rectangle, `share` of each side; it may cross the border."""

  def inside(n, u):
    side = round(n * share)
    middle = jnp.floor(u * (n + 1 - side % 2)).astype(jnp.int32)
    first = (middle - side // 2)[:, None]
    at = jnp.arange(n)[None]
    return (at >= first) & (at < first + side)

  rows, columns = (inside(x.shape[1 + i], hole[:, i]) for i in range(2))
  masked = rows[:, :, None] & columns[:, None, :]
  return jnp.where(masked[..., None], 0.0, x)


def apply(
  images: Shaped[Array, 'b h w 3'],
  draws: Float[Array, 'b 7'],
  cutout: float = 0.0,
) -> Float[Array, 'b h w 3']:
  """Augmented images, differentiable in `images`.

  The published numbers are for images in [-1, 1], so images are scaled to it
  and back: padding and the hole are grey, and a brightness of ±.5 is ±.25 in
  [0, 1].

  Args:
    images: f32 in [0, 1]; values outside are not clipped.
    draws: from `draw`, one row per image: the shift within ±.125 of a side
      (rows, columns); the brightness that is added, within ±.5; the factors of
      the distance from a pixel's grey (saturation), 0 to 2, and from the
      image's mean (contrast), .5 to 1.5; the centre of the hole (rows,
      columns).
    cutout: the hole's side as a share of the image's; 0 for none.

  Returns:
    f32, not clipped.

  Raises:
    UserError: images of an integer type.
  """
  need_floats(images, 'images to augment')

  brightness, saturation, contrast = draws.T[2:5, :, None, None, None]
  x = 2 * images.astype(jnp.float32) - 1
  x = _translate(x, draws[:, :2])
  x = x + (brightness - 0.5)
  grey = x.mean(-1, keepdims=True)
  x = 2 * saturation * (x - grey) + grey
  mean = x.mean((1, 2, 3), keepdims=True)
  x = (contrast + 0.5) * (x - mean) + mean
  if cutout:
    x = _cut_out(x, draws[:, 5:], cutout)
  return (x + 1) / 2


def draw_noise(
  key: Key[Array, ''],
  sample_ids: Int[Array, ' b'],
  shape: tuple[int, ...],
) -> Float[Array, 'b ...']:
  """U[0, 1) x N(0, 1): one U per sample, one N(0, 1) per value.

  Args:
    key: of this step and use.
    sample_ids: each sample's row in the step's full batch.
    shape: of one sample's latents, [gh gw d].

  Returns:
    f32[b *shape].
  """

  def one(index):
    level, values = jax.random.split(jax.random.fold_in(key, index))
    return jax.random.uniform(level) * jax.random.normal(values, shape)

  return jax.vmap(one)(sample_ids)
