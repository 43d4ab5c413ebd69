"""Schedules by regex, durations, frozen slices, AdamW's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqrae_jax import optim
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees


def params():
  key = jax.random.key(0)
  return {
    'encoder/blocks/kernel': jax.random.normal(key, (3, 4, 5)),
    'encoder/blocks/bias': jnp.array([[-0.0] * 5] * 3),
    'decoder/head/kernel': jax.random.normal(key, (4, 6)),
  }


def optimizer(rows, p, total=10, **adam):
  schedules = trees.first_match(rows, list(p), 'schedules')
  return optim.make_optimizer(optim.AdamWConfig(**adam), schedules, p, total, 5)


def run(made, p, grads, steps=1):
  tx, numbers = made
  state = tx.init(p)
  for _ in range(steps):
    updates, state = tx.update(numbers, grads, state, p)
    p = optax.apply_updates(p, updates)
  return p


def test_equals_optax_adamw():
  p = params()
  grads = jax.tree.map(lambda x: jnp.sin(7 * x) + 0.1, p)
  schedule = optim.Schedule(lr=1e-2, decay='constant')
  tx = optimizer([('.*', schedule)], p, weight_decay=0.1, clip=0.5)
  mask = {n: n.endswith('kernel') for n in p}
  peer = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(1e-2, weight_decay=0.1, mask=mask),
  )
  state, want = peer.init(p), p
  for _ in range(3):
    updates, state = peer.update(grads, state, want)
    want = optax.apply_updates(want, updates)
  found = run(tx, p, grads, steps=3)
  for name in p:
    np.testing.assert_allclose(found[name], want[name], rtol=1e-5, atol=1e-7)


def test_vector_schedules_over_stacked_blocks():
  """None in `layers` leaves its slice bitwise, also its negative zeros."""
  p = params()
  grads = jax.tree.map(jnp.ones_like, p)
  rows = [
    ('encoder/.*', optim.Schedule(1e-2, layers=(None, 0.5, 1.0))),
    ('.*', optim.Schedule(1e-2)),
  ]
  tx = optimizer(rows, p, weight_decay=0.1)
  found = run(tx, p, grads)
  for name in ('encoder/blocks/kernel', 'encoder/blocks/bias'):
    old, new = np.asarray(p[name]), np.asarray(found[name])
    assert old[0].tobytes() == new[0].tobytes()
    assert (old[1:] != new[1:]).all()
  bias = np.asarray(found['encoder/blocks/bias'])
  np.testing.assert_allclose(bias[1] * 2, bias[2], rtol=1e-5)


def test_frozen_slices_do_not_count_in_the_clipped_norm():
  p = {'blocks': jnp.zeros((2, 3))}
  grads = {'blocks': jnp.array([[1e6] * 3, [1e-3] * 3])}
  rows = [('.*', optim.Schedule(1.0, layers=(None, 1.0), decay='constant'))]
  tx = optimizer(rows, p, clip=1.0, eps=1.0)
  found = run(tx, p, grads)
  np.testing.assert_allclose(found['blocks'][1], -1e-3, rtol=2e-2)


def test_rates():
  numbers = dict(lr=1.0, end_lr=0.1, warmup=4, total=14)

  def rates(*steps, decay='cosine'):
    return [float(optim.learning_rate(decay, numbers, s)) for s in steps]

  np.testing.assert_allclose(rates(*range(4)), [0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(rates(9, 14, 99), [0.55, 0.1, 0.1], rtol=1e-5)
  np.testing.assert_allclose(rates(9, decay='linear'), 0.55, rtol=1e-5)
  assert rates(9, decay='constant') == [1]


def test_a_norm_is_of_what_moves():
  """A slice that a schedule freezes is in no norm, whatever it holds."""
  gradients = {
    'a': jnp.ones(3),
    'b': jnp.stack([jnp.full(4, jnp.nan), jnp.ones(4)]),
  }
  rows = [
    ('a', optim.Schedule(1.0)),
    ('b', optim.Schedule(1.0, layers=(None, 0.5))),
  ]
  tx, _ = optimizer(rows, gradients)
  found = tx.mask_frozen_layers(gradients)
  assert optax.global_norm(found) == np.sqrt(np.float32(7))


@pytest.mark.parametrize(
  'text, steps',
  [
    (7, 7),
    ('7', 7),
    ('7 steps', 7),
    ('1.5 epochs', 15),
    ('1 epoch', 10),
    ('1 step', 1),
  ],
)
def test_durations(text, steps):
  assert optim.steps_of(text, 10, 'duration') == steps


@pytest.mark.parametrize(
  'text', ('epochs', '7 days', -1, 1.5, True, '', '1 2 3', 'x steps')
)
def test_durations_that_are_none(text):
  with pytest.raises(UserError, match='duration='):
    optim.steps_of(text, 10, 'duration')


def test_every_leaf_is_claimed():
  names = list(params())
  with pytest.raises(UserError, match='decoder/head/kernel'):
    trees.first_match([('encoder/.*', None)], names, 'schedules')
  rows = [('encoder/.*', None), ('.*', optim.Schedule(1.0))]
  found = trees.first_match(rows, names, 'schedules')
  assert [n for n, s in found.items() if s is None] == names[:2]


@pytest.mark.parametrize(
  'fields, words',
  [
    (dict(lr=-1.0), 'lr=-1.0'),
    (dict(lr=1.0, decay='cosin'), 'did you mean "cosine"'),
    (dict(lr=1.0, warmup=10), 'warmup=10'),
    (dict(lr=1.0, layers=(1.0, 1.0)), 'which stacks'),
  ],
)
def test_bad_schedules_say_what_is_right(fields, words):
  with pytest.raises(UserError, match=words):
    optimizer([('.*', optim.Schedule(**fields))], params())
