"""DiffAug given its draws, against torch; draws and noise per sample."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import sharding
from vqrae_jax.ops import augment

torch = pytest.importorskip('torch')
F = torch.nn.functional

SHIFTS = (-0.5, 0, 0.5)  # of brightness, saturation, contrast


def reference(images, draws, cutout):
  """Sample by sample, in f64; images [b h w 3] in [0, 1]."""
  out = []
  for x, draw in zip(2 * images - 1, draws.astype(float), strict=True):
    h, w = x.shape[:2]
    most = round(h / 8), round(w / 8)
    down, right = (
      int(u * (2 * m + 1)) for u, m in zip(draw[:2], most, strict=True)
    )
    x = F.pad(x, (0, 0, most[1], most[1], most[0], most[0]))
    x = x[down : down + h, right : right + w]
    brightness, saturation, contrast = draw[2:5] + SHIFTS
    x = x + brightness
    grey = x.mean(2, keepdim=True)
    x = (x - grey) * 2 * saturation + grey
    x = (x - x.mean()) * contrast + x.mean()
    if cutout:
      keep = torch.ones_like(x)
      ch, cw = round(h * cutout), round(w * cutout)
      top = int(draw[5] * (h + 1 - ch % 2)) - ch // 2
      left = int(draw[6] * (w + 1 - cw % 2)) - cw // 2
      keep[max(top, 0) : top + ch, max(left, 0) : left + cw] = 0
      x = x * keep
    out.append((x + 1) / 2)
  return torch.stack(out)


@pytest.mark.parametrize('cutout', (0.0, 0.3))
def test_it_equals_torch_values_and_gradients(cutout):
  rng = np.random.default_rng(0)
  images = rng.random((6, 16, 24, 3)).astype(np.float32)
  draws = np.array(augment.draw(jax.random.key(5), jnp.arange(6)))
  # The ends of the ranges, too.
  draws[0, :2], draws[1, :2] = 0, np.nextafter(np.float32(1), np.float32(0))
  draws[:, 5:] = draws[::-1, :2]
  x = torch.tensor(images, dtype=torch.float64, requires_grad=True)
  want = reference(x, draws, cutout)
  seed = rng.normal(size=images.shape).astype(np.float32)
  (want * torch.tensor(seed)).sum().backward()
  found, pull = jax.vjp(
    jax.jit(lambda x: augment.apply(x, jnp.asarray(draws), cutout)), images
  )
  np.testing.assert_allclose(found, want.detach(), atol=1e-5)
  np.testing.assert_allclose(pull(seed)[0], x.grad, atol=2e-5)


def test_draws_are_each_samples_own_and_span_their_ranges():
  key = jax.random.key(0)
  whole = augment.draw(key, jnp.arange(4096))
  part = augment.draw(key, jnp.arange(32, 40))
  np.testing.assert_array_equal(whole[32:40], part)
  whole = np.asarray(whole)
  assert whole.min() >= 0 and whole.max() < 1
  assert (whole.min(0) < 0.01).all() and (whole.max(0) > 0.99).all()
  assert (np.abs(whole.mean(0) - 0.5) < 0.03).all()
  assert (np.abs(np.corrcoef(whole.T) - np.eye(7)) < 0.06).all()


KEY = jax.random.key(3)
SHAPE = (4, 5, 8)


def test_a_samples_noise_is_its_own():
  """Neither other samples nor devices change it."""
  noise = augment.draw_noise(KEY, jnp.arange(8), SHAPE)
  assert noise.shape == (8, *SHAPE) and noise.dtype == jnp.float32
  ids = jnp.array([7, 0, 3])
  part = augment.draw_noise(KEY, ids, SHAPE)
  np.testing.assert_array_equal(part, noise[ids])
  assert len({x.tobytes() for x in np.asarray(noise)}) == 8
  spread = sharding.batch_sharding(sharding.make_mesh())
  draw = jax.jit(functools.partial(augment.draw_noise, shape=SHAPE))
  assert (draw(jax.random.key(4), jnp.arange(8)) != noise).all()
  sharded = draw(KEY, jax.device_put(jnp.arange(8), spread))
  assert len(sharded.sharding.device_set) == 8
  np.testing.assert_array_equal(sharded, draw(KEY, jnp.arange(8)))


def test_levels_are_uniform_and_values_normal():
  """Over 4000 samples: a sample's spread is its U, whose moments are known."""
  x = np.asarray(augment.draw_noise(KEY, jnp.arange(4000), (16, 16, 4)))
  level = x.std((1, 2, 3))  # of 1024 values: U to about 2 %
  assert level.max() < 1.08
  np.testing.assert_allclose(level.mean(), 0.5, atol=0.02)
  np.testing.assert_allclose((level**2).mean(), 1 / 3, atol=0.02)
  share = np.histogram(level, bins=4, range=(0, 1))[0] / 4000
  np.testing.assert_allclose(share, 0.25, atol=0.03)
  unit = x / level[:, None, None, None]
  np.testing.assert_allclose(unit.mean(), 0, atol=0.01)
  np.testing.assert_allclose((unit**4).mean(), 3, atol=0.05)
