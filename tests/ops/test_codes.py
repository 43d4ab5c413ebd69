"""Counts, sums, lookups and entropies of codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import sharding
from vqrae_jax.ops import codes


def test_a_sharded_tables_gradient_is_scattered():
  """Tokens stay where they are, and no device holds the table's gradient."""
  table = jax.random.normal(jax.random.key(1), (48, 6))
  indices = jax.random.randint(jax.random.key(0), (8, 4, 4), 0, 48)
  weight = jax.random.normal(jax.random.key(2), (8, 4, 4, 6))

  @jax.jit
  def gradient(table, indices, weight):
    return jax.grad(lambda t: (codes.lookup(t, indices) * weight).sum())(table)

  whole = gradient(table, indices, weight)
  with jax.set_mesh(mesh := sharding.make_mesh('fsdp')):
    rows = jax.NamedSharding(mesh, jax.P('fsdp'))
    args = jax.device_put((table, indices, weight), rows)
    np.testing.assert_array_equal(codes.lookup(*args[:2]), table[indices])
    compiled = gradient.lower(*args).compile()
    np.testing.assert_allclose(compiled(*args), whole, rtol=1e-6, atol=1e-6)
    text = compiled.as_text()
  assert 'f32[6,6]{1,0} reduce-scatter(' in text
  assert 'all-gather' not in text and 'f32[48,6]{1,0} all-' not in text


def test_counts_and_sums():
  indices = jnp.array([[0, 2, 2], [-1, 4, 2]])
  np.testing.assert_array_equal(codes.count_codes(indices, 5), [1, 0, 3, 0, 1])
  z = jnp.arange(12.0).reshape(2, 3, 2)
  indices = jnp.array([[0, 1, 1], [0, 2, 2]])
  np.testing.assert_array_equal(
    codes.sum_by_code(z, indices, 3), [[6, 8], [6, 8], [18, 20]]
  )


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
@pytest.mark.parametrize('n', (0, 24))
def test_lookup_is_indexing(n, dtype):
  """Its gradient too: of indices from the end, of none, in the codes' dtype."""
  rng = np.random.default_rng(0)
  table = jnp.asarray(rng.normal(size=(7, 3)), dtype)
  indices = jnp.asarray(rng.integers(-7, 7, (n, 2)), jnp.int32)
  weight = jnp.asarray(rng.normal(size=(n, 2, 3)), dtype)
  found, want = (
    jax.jit(jax.value_and_grad(lambda t, rows=rows: (rows(t) * weight).sum()))(
      table
    )
    for rows in (lambda t: codes.lookup(t, indices), lambda t: t[indices])
  )
  assert found[1].dtype == want[1].dtype
  rough = dict(rtol=1e-6, atol=1e-6) if dtype == 'float32' else dict(atol=0.1)
  for pair in zip(found, want, strict=True):
    np.testing.assert_allclose(*(np.asarray(x, 'f4') for x in pair), **rough)


def as_on(platform, patch):
  """Functions that depend on the platform are that one's."""

  def dependent(*args, default, **branches):
    return branches.get(platform, default)(*args)

  patch.setattr(jax.lax, 'platform_dependent', dependent)


@pytest.mark.parametrize('platform', ('cpu', 'cuda'))
@pytest.mark.parametrize('size', (48, 41))
def test_devices_sum_their_own_tokens(platform, size, monkeypatch):
  """Sums of rows cross devices, tokens do not."""
  as_on(platform, monkeypatch)
  z = jax.random.normal(jax.random.key(0), (64, 4, 6))
  indices = jax.random.randint(jax.random.key(1), (64, 4), 0, size)
  sums = jax.jit(lambda z, i: codes.sum_by_code(z, i, size))
  whole = sums(z, indices)
  with jax.set_mesh(mesh := sharding.make_mesh('fsdp')):
    args = jax.device_put((z, indices), jax.NamedSharding(mesh, jax.P('fsdp')))
    compiled = sums.lower(*args).compile()
    np.testing.assert_allclose(compiled(*args), whole, rtol=1e-6, atol=1e-6)
  text = compiled.as_text()
  assert ('reduce-scatter(' in text) == (size % 8 == 0)
  assert 'all-gather' not in text and 'f32[256,6]' not in text


@pytest.mark.parametrize('n, used', ((1, 1), (37, 1), (64, 5), (100, 40)))
def test_a_gpus_sums_of_tokens_are_the_others(n, used, monkeypatch):
  """By order of code; they are what a table's gradient is too."""
  rng = np.random.default_rng(n)
  z = jnp.asarray(rng.normal(size=(n, 3)), jnp.float32)
  indices = jnp.asarray(rng.integers(0, used, n) * 3 % 41 - 1, jnp.int32)
  table = jnp.asarray(rng.normal(size=(41, 3)), jnp.float32)

  def found(platform):
    as_on(platform, monkeypatch)
    gradient = jax.grad(lambda t: (codes.lookup(t, abs(indices)) * z).sum())
    return codes.sum_by_code(z, indices, 41), gradient(table)

  for ours, others in zip(found('cuda'), found('cpu'), strict=True):
    np.testing.assert_allclose(ours, others, rtol=1e-6, atol=1e-6)


def test_usage_and_perplexity():
  counts = jnp.array([[1, 1, 1, 1], [4, 0, 0, 0], [0, 0, 0, 0]])
  np.testing.assert_allclose(codes.usage(counts), [1, 0.25, 0])
  np.testing.assert_allclose(codes.perplexity(counts), [4, 1, 1], rtol=1e-5)


def softmaxes(z, table, temperature):
  """f64 p[n k] of -distance^2 / temperature."""
  z, table = np.asarray(z, 'f8'), np.asarray(table, 'f8')
  scores = -((z[:, None] - table) ** 2).sum(-1) / temperature
  p = np.exp(scores - scores.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def test_entropies_and_their_gradients(monkeypatch):
  """In nats, the same in chunks, the last of them not full; gradients by finite
  differences in f64."""
  z = jax.random.normal(jax.random.key(0), (23, 5)) + 3
  table = jax.random.normal(jax.random.key(1), (17, 5)) + 3

  def loss(z, table):
    own, spread = codes.code_entropies(z, table, 0.9)
    return own - 0.7 * spread, (own, spread)

  def reference(z, table):
    p = softmaxes(z, table, 0.9)
    q = p.mean(0)
    return -(p * np.log(p)).sum(-1).mean(), -(q * np.log(q)).sum()

  for chunk in (2**24, 17 * 5):
    monkeypatch.setattr(codes, 'SCORES_PER_CHUNK', chunk)
    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    gradients, found = run(z, table)
    np.testing.assert_allclose(found, reference(z, table), rtol=1e-5)
    rng, given = np.random.default_rng(0), [np.asarray(z), np.asarray(table)]
    for i, gradient in enumerate(gradients):
      way = rng.normal(size=given[i].shape)
      values = []
      for sign in (1e-5, -1e-5):
        moved = [np.asarray(x, 'f8') for x in given]
        moved[i] = moved[i] + sign * way
        own, spread = reference(*moved)
        values.append(own - 0.7 * spread)
      slope = (values[0] - values[1]) / 2e-5
      np.testing.assert_allclose((gradient * way).sum(), slope, rtol=1e-4)


def test_entropies_where_nothing_is_left_of_a_probability():
  z, table = jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [1.0], [50.0]])
  value, slope = jax.value_and_grad(
    lambda z: codes.code_entropies(z, table, 1e-3)[1]
  )(z)
  np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
  assert np.isfinite(slope).all()


def test_entropies_of_tokens_on_many_devices_gather_no_scores(monkeypatch):
  monkeypatch.setattr(codes, 'SCORES_PER_CHUNK', 512 * 16)
  mesh = sharding.make_mesh('dp')
  z = jax.random.normal(jax.random.key(0), (1024, 8))
  table = jax.random.normal(jax.random.key(1), (512, 8))
  run = lambda z: codes.code_entropies(z, table, 1.0)  # noqa: E731
  whole = jax.jit(run)(z)
  with jax.set_mesh(mesh):
    placed = jax.device_put(z, sharding.batch_sharding(mesh))
    compiled = jax.jit(run).lower(placed).compile()
    np.testing.assert_allclose(compiled(placed), whole, rtol=1e-5)
    assert 'all-gather' not in compiled.as_text()
    used = compiled.memory_analysis().temp_size_in_bytes
  assert used < 1024 * 512 * 4 / 8, used
