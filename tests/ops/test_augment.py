"""DiffAug given its draws, against torch; draws and noise per sample."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.nn.parity import close
from vqrae_jax import sharding
from vqrae_jax.errors import UserError
from vqrae_jax.ops import augment

torch = pytest.importorskip('torch')


def reference(images, draws, cutout):
  """Sample by sample, in f64, by moving slices; images [b h w 3] in [0, 1]."""
  out = []
  for i, image in enumerate(images):
    shift, hole = draws.shift[i], draws.hole[i]
    x = image * 2 - 1
    h, w = x.shape[:2]
    moved = torch.zeros_like(x)
    mh, mw = round(h / 8), round(w / 8)
    dy = int(np.floor(shift[0] * (2 * mh + 1))) - mh
    dx = int(np.floor(shift[1] * (2 * mw + 1))) - mw
    # Row r of the result is row r + dy of the image.
    rows = range(max(0, -dy), min(h, h - dy))
    columns = range(max(0, -dx), min(w, w - dx))
    for r in rows:
      for c in columns:
        moved[r, c] = x[r + dy, c + dx]
    x = moved + float(draws.brightness[i])
    grey = x.mean(2, keepdim=True)
    x = (x - grey) * float(draws.saturation[i]) + grey
    x = (x - x.mean()) * float(draws.contrast[i]) + x.mean()
    if cutout:
      keep = torch.ones(h, w, 1, dtype=x.dtype)
      ch, cw = round(h * cutout), round(w * cutout)
      top = int(np.floor(hole[0] * (h + 1 - ch % 2))) - ch // 2
      left = int(np.floor(hole[1] * (w + 1 - cw % 2))) - cw // 2
      keep[max(top, 0) : top + ch, max(left, 0) : left + cw] = 0
      x = x * keep
    out.append((x + 1) / 2)
  return torch.stack(out)


@pytest.mark.parametrize('cutout', (0.0, 0.3))
def test_it_equals_torch_values_and_gradients(cutout):
  rng = np.random.default_rng(0)
  images = rng.random((6, 16, 24, 3)).astype(np.float32)
  draws = augment.draw(jax.random.key(5), jnp.arange(6))
  # The ends of the ranges, too.
  ends = np.float32(np.nextafter(np.float32(1), np.float32(0)))
  shift = np.asarray(draws.shift).copy()
  shift[0], shift[1] = 0, ends
  draws = draws._replace(
    shift=jnp.asarray(shift), hole=jnp.asarray(shift[::-1])
  )
  held = type(draws)(*map(np.asarray, draws))
  x = torch.tensor(images, dtype=torch.float64, requires_grad=True)
  want = reference(x, held, cutout)
  seed = rng.normal(size=images.shape).astype(np.float32)
  (want * torch.tensor(seed)).sum().backward()
  found, pull = jax.vjp(
    jax.jit(lambda x: augment.apply(x, draws, cutout)), images
  )
  close(found, want.detach())
  close(pull(seed)[0], x.grad)


def test_draws_are_each_samples_own_and_span_their_ranges():
  key = jax.random.key(0)
  whole = augment.draw(key, jnp.arange(4096))
  part = augment.draw(key, jnp.arange(32, 40))
  for a, b in zip(whole, part, strict=True):
    np.testing.assert_array_equal(a[32:40], b)
  for name, low, high in (
    ('shift', 0, 1),
    ('hole', 0, 1),
    ('brightness', -0.5, 0.5),
    ('saturation', 0, 2),
    ('contrast', 0.5, 1.5),
  ):
    values = np.asarray(getattr(whole, name))
    assert values.min() >= low and values.max() < high
    assert values.min() < low + 0.01 and values.max() > high - 0.01
    assert abs(values.mean() - (low + high) / 2) < 0.05
  assert abs(np.corrcoef(whole.brightness, whole.contrast)[0, 1]) < 0.05


def test_no_draw_at_the_middle_changes_an_image():
  images = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32)
  still = augment.Draws(
    shift=jnp.full((1, 2), 0.5),
    brightness=jnp.zeros(1),
    saturation=jnp.ones(1),
    contrast=jnp.ones(1),
    hole=jnp.full((1, 2), 0.5),
  )
  np.testing.assert_allclose(
    augment.apply(jnp.asarray(images), still), images, atol=1e-6
  )


def test_integers_are_refused():
  draws = augment.draw(jax.random.key(0), jnp.arange(1))
  with pytest.raises(UserError, match='type uint8; give floats'):
    augment.apply(jnp.zeros((1, 8, 8, 3), jnp.uint8), draws)


KEY = jax.random.key(3)
SHAPE = (4, 5, 8)


def test_a_samples_noise_is_its_own():
  """Neither other samples nor devices change it."""
  noise = augment.draw_noise(KEY, jnp.arange(8), SHAPE)
  assert noise.shape == (8, *SHAPE) and noise.dtype == jnp.float32
  for ids in ([5], [7, 0, 3], [1, 3, 5, 7]):
    part = augment.draw_noise(KEY, jnp.array(ids), SHAPE)
    np.testing.assert_array_equal(part, noise[jnp.array(ids)])
  assert len({x.tobytes() for x in np.asarray(noise)}) == 8
  assert (
    augment.draw_noise(jax.random.key(4), jnp.arange(8), SHAPE) != noise
  ).all()
  mesh = sharding.make_mesh()
  spread = jax.device_put(jnp.arange(8), sharding.batch_sharding(mesh))
  draw = jax.jit(functools.partial(augment.draw_noise, shape=SHAPE))
  sharded = draw(KEY, spread)
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
