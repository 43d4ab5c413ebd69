"""AdamW's numbers, rates, frozen slices, durations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqrae_jax import optim, sharding


def adamw(schedule, p, **fields):
  """Ours as optax writes it."""
  tx, numbers = optim.make_optimizer(
    optim.AdamWConfig(**fields), dict.fromkeys(p, schedule), p, 10, 5
  )

  def update(grads, state, params):
    return tx.update(numbers, grads, state, params, tx.norm(grads))

  return optax.GradientTransformation(tx.init, update)


def run(tx, p, grads, steps=1):
  state = tx.init(p)
  for _ in range(steps):
    updates, state = tx.update(grads, state, p)
    p = optax.apply_updates(p, updates)
  return p


def test_equals_optax_adamw():
  draw = functools.partial(jax.random.normal, jax.random.key(0))
  p = {'kernel': draw((3, 4, 5)), 'bias': draw((3, 5)), 'scale': draw((4, 6))}
  grads = jax.tree.map(lambda x: jnp.sin(7 * x) + 0.1, p)
  schedule = optim.Schedule(lr=1e-2, decay='constant')
  mask = {n: n == 'kernel' for n in p}
  peer = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(1e-2, weight_decay=0.1, mask=mask),
  )
  found = run(adamw(schedule, p, weight_decay=0.1, clip=0.5), p, grads, 3)
  for name, want in run(peer, p, grads, 3).items():
    np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-7)


def test_frozen_slices_do_not_count_in_the_clipped_norm():
  """Whatever they hold; the others move by their factors."""
  p = {'blocks': jnp.zeros((3, 3))}
  grads = {'blocks': jnp.array([[jnp.nan] * 3, [1e-3] * 3, [1e-3] * 3])}
  layers = (None, 0.5, 1.0)
  schedule = optim.Schedule(1.0, layers=layers, decay='constant')
  found = run(adamw(schedule, p, clip=1.0, eps=1.0), p, grads)['blocks']
  np.testing.assert_allclose(found[:, 0], [0, -5e-4, -1e-3], rtol=2e-2)


def test_the_norm_gathers_no_gradient():
  """Each device adds up its own part, also of a dimension that is not first."""
  mesh = sharding.make_mesh('fsdp')
  leaf = jax.ShapeDtypeStruct((3, 16, 4), jnp.float32)
  place = jax.sharding.NamedSharding(mesh, jax.P(None, 'fsdp'))
  schedule = optim.Schedule(1.0)
  tx, _ = optim.make_optimizer(
    optim.AdamWConfig(), {'blocks': schedule}, {'blocks': leaf}, 10, 5
  )
  compiled = jax.jit(tx.norm).lower({'blocks': leaf.update(sharding=place)})
  text = compiled.compile().as_text()
  assert 'all-reduce' in text and 'all-gather' not in text


def test_rates():
  numbers = dict(lr=1.0, end_lr=0.1, warmup=4, total=14)

  def rates(*steps, decay='cosine'):
    return [float(optim.learning_rate(decay, numbers, s)) for s in steps]

  np.testing.assert_allclose(rates(*range(4)), [0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(rates(9, 14, 99), [0.55, 0.1, 0.1], rtol=1e-5)
  np.testing.assert_allclose(rates(9, decay='linear'), 0.55, rtol=1e-5)
  assert rates(9, decay='constant') == [1]


def test_durations():
  steps = {7: 7, '7': 7, '1 step': 1, '1.5 epochs': 15, '1 epoch': 10}
  for text, want in steps.items():
    assert optim.steps_of(text, 10, 'duration') == want
