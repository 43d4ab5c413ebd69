"""RunningStats merge to those of the whole, in any split and order."""

import numpy as np
import pytest

from vqrae_jax.latent_stats import RunningStats


def close(found, rows):
  assert found.count == len(rows)
  np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(found.variance, rows.var(0), rtol=1e-12)


@pytest.mark.parametrize('shape', ((8,), (2, 3, 4)))
@pytest.mark.parametrize('seed', range(4))
def test_any_split_in_any_order_is_the_whole(seed, shape):
  """Against numpy in f64, means as large as a hundred stds beside small."""
  rng = np.random.default_rng(seed)
  mean, std = rng.normal(0, 100, shape), rng.uniform(0.1, 3, shape)
  rows = rng.normal(mean, std, (500, *shape)).astype(np.float32)
  rows = rows.astype(np.float64)
  close(RunningStats.of(rows), rows)
  cuts = np.sort(rng.choice(np.arange(1, 500), rng.integers(1, 60), False))
  parts = [RunningStats.of(part) for part in np.split(rows, cuts)]
  rng.shuffle(parts)
  total = RunningStats.none(shape)
  for part in parts:
    total = total.merge(part)
  close(total, rows)
  while len(parts) > 1:  # as a tree, not a chain
    parts.append(parts.pop(0).merge(parts.pop(0)))
  close(parts[0], rows)


def test_nothing_changes_nothing():
  some = RunningStats.of(np.arange(12.0).reshape(4, 3))
  none = RunningStats.none((3,))
  for merged in (some.merge(none), none.merge(some)):
    assert merged.count == 4
    np.testing.assert_array_equal(merged.mean, some.mean)
    np.testing.assert_array_equal(merged.m2, some.m2)
  assert none.merge(none).count == 0


def test_packing_keeps_every_bit():
  rng = np.random.default_rng(0)
  some = RunningStats.of(rng.normal(size=(7, 2, 3)))
  back = RunningStats.unpacked(some.packed(), (2, 3))
  assert back.count == 7
  assert back.mean.tobytes() == some.mean.tobytes()
  assert back.m2.tobytes() == some.m2.tobytes()
