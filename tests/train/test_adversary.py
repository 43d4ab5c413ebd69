"""The second player in the step: what moves, when, and by how much."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.train import pieces
from vqrae_jax import optim
from vqrae_jax.errors import UserError
from vqrae_jax.losses import adversarial
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import step as step_lib

PATCH = dict(
  name='patch', fields=dict(hidden=8, halvings=2, groups=4, pool=0), lecam=0.01
)
LOSSES = dict(l2=1.0, gan=dict(weight=0.5))


def planned(**keys):
  keys = dict(losses=LOSSES, discriminator=PATCH) | keys
  return pieces.planned('fsq-cosmos', **keys)


@functools.cache
def begun():
  plan = planned()
  return plan, *pieces.started(plan)


def moved(before, after):
  before, after = pieces.host(before), pieces.host(after)
  return {n for n in before if before[n].tobytes() != after[n].tobytes()}


def test_both_players_move_and_say_so():
  plan, state, frozen = begun()
  after, metrics = pieces.jitted(plan)(state, frozen, tiny.images(8))
  names = set(pieces.host(state.discriminator))
  assert moved(state.discriminator, after.discriminator) == names
  assert moved(state.tokenizer.params, after.tokenizer.params)
  for name in (
    'loss/gan', 'loss/discriminator', 'loss/lecam', 'logits/real',
    'logits/fake', 'gan_balance', 'discriminator/grad_norm', 'update_norm',
  ):  # fmt: skip
    assert np.isfinite(metrics[name]), name
  assert metrics['gan_balance'] > 0
  for side, average in after.discriminator.stats['lecam'].items():
    want = 0.001 * metrics[f'logits/{side}']  # averages begin at zero
    np.testing.assert_allclose(average, want, rtol=1e-4, err_msg=side)


def test_the_discriminator_learns_on_8_bits():
  """Its fakes are the step's own reconstruction, clipped and rounded."""
  plan, state, frozen = begun()
  images = tiny.images(8)
  learn_on = jax.jit(lambda *args: step_lib.accumulated(plan, *args)[1])
  reals, fakes, rows = learn_on(state, frozen, images)
  assert fakes.dtype == np.uint8 and fakes.shape == (1, *images.shape)
  np.testing.assert_array_equal(reals[0], images)
  np.testing.assert_array_equal(rows[0], np.arange(8))
  variables = {'params': trees.merge(state.tokenizer.params, frozen.params)}
  painted = jax.jit(
    lambda v: plan.tokenizer.apply(v, images / np.float32(255)).images
  )(variables)
  off = np.abs(fakes[0] - 255 * np.clip(painted, 0, 1))
  assert off.max() < 0.501


def test_starts_are_kept_to_the_bit():
  """Before its start each player's loss changes nothing."""
  _, state, frozen = begun()
  late = planned(
    losses=dict(l2=1.0, gan=dict(weight=0.5, start=2)),
    discriminator=PATCH | dict(start='1 steps'),
  )
  alone = pieces.planned('fsq-cosmos', losses=dict(l2=1.0))
  bare, _ = pieces.started(alone)
  images = tiny.images(8)
  step, plain = pieces.jitted(late), pieces.jitted(alone)
  one, metrics = step(state, frozen, images)
  bare, _ = plain(bare, frozen, images)
  assert metrics['loss/gan'] == 0 and metrics['loss/discriminator'] == 0
  assert not moved(state.discriminator, one.discriminator)
  assert not moved(bare.tokenizer, one.tokenizer)
  assert metrics['lr/discriminator'] == 0
  two, metrics = step(one, frozen, images)
  assert metrics['lr/discriminator'] > 0
  assert metrics['loss/gan'] == 0 and metrics['loss/discriminator'] > 0
  assert moved(one.discriminator, two.discriminator)
  _, metrics = step(two, frozen, images)
  assert metrics['loss/gan'] != 0


def test_several_updates_do_not_hurry_its_schedule():
  """A warm-up in steps lasts as many, whatever the updates in each."""
  schedule = optim.Schedule(lr=1.0, warmup=4, decay='constant')
  leaf = {'w': np.ones(3, np.float32)}
  free = optim.Adam(clip=None)
  once, twice = (
    optim.make_optimizer(free, {'w': schedule}, leaf, 8, None, n)[0]
    for n in (1, 2)
  )
  a, b = once.init(leaf), twice.init(leaf)
  for _ in range(6):
    step, a = once.update(leaf, a, leaf)
    for _ in range(2):
      half, b = twice.update(leaf, b, leaf)
      np.testing.assert_allclose(half['w'], step['w'], rtol=1e-5)


def test_the_balance_and_the_gradient_are_those_of_two_passes():
  """Two autograd passes to the head's kernel, one to every leaf: 1e-5."""
  plan, state, frozen = begun()
  adversary = plan.adversary
  images = jnp.asarray(tiny.images(8), jnp.float32) / 255
  rows = jnp.arange(8)
  rngs = {'quantizer': jax.random.fold_in(state.rng, state.step)}

  def losses(params):
    variables = {'params': trees.merge(params, frozen.params)}
    out = plan.tokenizer.apply(variables, images, train=True, rngs=rngs)
    rec = jnp.mean((out.images - images) ** 2)
    player = state.discriminator
    seen = adversary._seen(state, out.images, rows, 101)
    said = adversary.logits(
      player.params, player.stats['spectral'], frozen, seen
    )
    return rec, adversarial.g_hinge(said)

  params = state.tokenizer.params
  rec = jax.grad(lambda p: losses(p)[0])(params)
  gan = jax.grad(lambda p: losses(p)[1])(params)
  head = 'decoder/head/kernel'
  want = adversarial.adaptive_weight(
    jnp.linalg.norm(rec[head]), jnp.linalg.norm(gan[head])
  )
  part = jax.jit(functools.partial(step_lib.loss_gradients, plan))(
    state, frozen, images
  )
  np.testing.assert_allclose(part.metrics['gan_balance'], want, rtol=1e-5)
  for name, found in part.gradients.items():
    if name.endswith('attention/key/bias'):
      continue  # softmax does not see it: its true gradient is zero
    total = rec[name] + 0.5 * want * gan[name]
    scale = np.abs(total).max() + 1e-6
    np.testing.assert_allclose(found, total, atol=2e-5 * scale, err_msg=name)


def test_accumulation_is_one_big_batch():
  plan, state, frozen = begun()
  images = tiny.images(8)
  one, said = pieces.jitted(plan)(state, frozen, images)
  parts = planned(accumulate=4)
  four, told = pieces.jitted(parts)(state, frozen, images)
  assert said.keys() == told.keys()
  for name in said:
    np.testing.assert_allclose(
      told[name], said[name], rtol=2e-5, atol=1e-7, err_msg=name
    )
  # Adam divides by a gradient's size: sums are compared through its moments.
  for player in ('tokenizer', 'discriminator'):
    a, b = (pieces.host(getattr(s, player).opt_state) for s in (one, four))
    for name in a:
      if name.endswith('attention/key/bias'):
        continue  # its true gradient is zero
      scale = np.abs(a[name]).max() + 1e-12
      np.testing.assert_allclose(
        b[name], a[name], atol=2e-5 * scale, err_msg=f'{player} {name}'
      )
  a, b = (pieces.host(s.discriminator.stats) for s in (one, four))
  for name in a:
    np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  'keys, words',
  [
    (dict(discriminator=None), 'losses.gan wants a discriminator'),
    (dict(losses=dict(l2=1.0)), 'has no losses.gan to learn for'),
    (dict(losses=dict(gan=1.0)), 'no image loss to balance it'),
    (dict(discriminator=PATCH | dict(loss='hing')), 'did you mean "hinge"'),
    (dict(discriminator=PATCH | dict(updates=0)), 'updates=0 must be above 0'),
    (dict(discriminator=PATCH | dict(name='path')), 'did you mean "patch"'),
    (dict(discriminator=PATCH | dict(fields=dict(hiden=8))), 'hiden'),
    (dict(discriminator=PATCH | dict(cutout=1.0)), r'must lie in \[0, 1\)'),
    (dict(discriminator=PATCH | dict(lecam=-1.0)), 'must not be negative'),
    (
      dict(losses=dict(l2=1.0, gan=dict(weight=1.0, start=99999))),
      'losses.gan starts at',
    ),
    (dict(init=dict(networks='randm')), 'did you mean "random"'),
  ],
)
def test_what_cannot_play_is_said(keys, words):
  with pytest.raises(UserError, match=words):
    planned(**keys)


def test_config_sections_build():
  spec = config_lib.read_config(
    tiny.run('fsq-cosmos', losses=LOSSES, discriminator=PATCH)
  )
  assert spec.discriminator.loss == 'hinge' and spec.terms()['gan'].adaptive
  assert build_tokenizer(spec.model).codebook_size == 64000
