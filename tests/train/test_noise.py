"""Noise on latents in the step: same in parts, added before quantising."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.train.pieces import host, jitted, planned, started
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.train import step as step_lib

PATCH = dict(name='patch', fields=dict(hidden=8, halvings=2, groups=4, pool=0))
LOSSES = dict(l2=1.0, gan=dict(weight=0.5))
# An eps above the gradients: AdamWConfig would make ±1 of a rounding error.
OPTIM = dict(eps=0.1, clip=None)


@functools.cache
def after(tau, parts=1, kind='none', **keys):
  """Host leaves and metrics after two steps."""
  plan = planned(kind, noise_tau=tau, accumulate=parts, optim=OPTIM, **keys)
  state, frozen = started(plan)
  step = jitted(plan)
  rows = []
  for i in range(2):
    state, metrics = step(state, frozen, tiny.images(8, seed=i))
    rows.append({n: float(v) for n, v in metrics.items()})
  return host(state), rows


@pytest.mark.parametrize(
  'kind', ('none', pytest.param('vq-ema', marks=pytest.mark.slow))
)
def test_accumulation_draws_what_the_whole_batch_does(kind):
  one, one_rows = after(0.8, kind=kind)
  two, two_rows = after(0.8, parts=2, kind=kind)
  for name in one:
    if name.endswith('key/bias') or not one[name].size:
      continue  # its true gradient is zero: softmax does not see it
    scale = np.abs(one[name]).max()
    np.testing.assert_allclose(
      two[name], one[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name
    )
  for a, b in zip(one_rows, two_rows, strict=True):
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)


def test_the_balance_hears_the_same_noise():
  """Its sweep over the parts draws what the gradients' pass does."""
  found = []
  for parts in (1, 2):
    plan = planned(
      'none', noise_tau=0.8, accumulate=parts, losses=LOSSES,
      discriminator=PATCH,
    )  # fmt: skip
    _, metrics = jitted(plan)(*started(plan), tiny.images(8))
    found.append(float(metrics['gan_balance']))
  np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_tau_is_felt_and_zero_is_not():
  clean, rows = after(0.0)
  noisy, noisy_rows = after(0.8)
  assert abs(rows[0]['loss/l2'] - noisy_rows[0]['loss/l2']) > 1e-5
  assert any((clean[n] != noisy[n]).any() for n in clean)


def test_what_is_quantised_is_noisy_and_the_latents_are_not():
  plan = planned('none', noise_tau=0.5)
  state, _ = started(plan)
  targets = jnp.asarray(tiny.images(8), jnp.float32) / 255
  rows = jnp.arange(8)
  added = step_lib._noise(plan, state, targets, rows)
  assert added.shape == (8, 4, 4, 32)
  later = step_lib._noise(plan, state.replace(step=1), targets, rows)
  assert (added != later).all()
  variables = {'params': trees.unflatten(state.tokenizer.params)}
  apply = jax.jit(functools.partial(plan.tokenizer.apply, train=True))
  out = apply(variables, targets, noise=added)
  plain = apply(variables, targets)
  np.testing.assert_array_equal(out.latents, plain.latents)
  np.testing.assert_allclose(
    out.quantizer.codes - plain.quantizer.codes, added, atol=1e-6
  )


@pytest.mark.parametrize('tau', (-0.1, float('nan'), float('inf')))
def test_a_tau_that_is_no_level_is_refused(tau):
  with pytest.raises(UserError, match=f'noise_tau={tau} must be finite'):
    planned(noise_tau=tau)
