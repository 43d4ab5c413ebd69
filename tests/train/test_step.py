"""The step: what moves, what stays, and that one pullback is the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.train import pieces
from tests.train.pieces import assert_close, host, moved, planned, started
from vqrae_jax import optim
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib

# The encoder is frozen.
FROZEN = dict(schedules=(('encoder/.*', None), ('.*', dict(lr=1e-3))))


def base(kind='vq-ema', **keys):
  """A plan whose program most tests share: only numbers differ."""
  model = tiny.model(kind, post_quant=dict(kernel=3))
  return planned(kind, **dict(model=model, log=dict(usage_window=2)) | keys)


@pytest.mark.parametrize(
  'kind, keys',
  [
    ('fsq-cosmos', FROZEN),
    ('vq-ema', {}),
    pytest.param('vq-ema', FROZEN, marks=pytest.mark.slow),
    pytest.param('vq-gradient', {}, marks=pytest.mark.slow),
    ('simvq-l2', {}),
    pytest.param('simvq-cosine', {}, marks=pytest.mark.slow),
    pytest.param('none', FROZEN, marks=pytest.mark.slow),
  ],
)
def test_exactly_what_should_move_moves(kind, keys):
  """After one step every trainable leaf has moved and nothing else has."""
  plan = base(kind, **keys)
  step_lib.check_reach(plan.spec, *plan.abstract(), tiny.images(8))
  state, frozen = started(plan)
  after, _ = plan.step(state, frozen, tiny.images(8))
  leaves = set(trees.flatten(plan.shapes['params']))
  assert any('post_conv' in n for n in leaves)
  still = {n for n in leaves if keys and n.startswith('encoder/')}
  assert set(frozen.params) == still
  tokenizer = state.tokenizer.params
  assert set(tokenizer) == moved(tokenizer, after.tokenizer.params)
  assert set(tokenizer) == moved(state.ema, after.ema) == leaves - still
  tables = {'quantizer/codes', 'quantizer/counts', 'quantizer/sums'}
  found = moved(state.codebook, after.codebook)
  assert found == (tables if kind == 'vq-ema' else set())
  assert int(after.step) == 1


@pytest.mark.parametrize(
  'kind, losses, lost',
  [
    ('simvq-l2', dict(l2=1.0, commit=0.25), 'quantizer/bias, quantizer/kernel'),
    ('vq-gradient', dict(l2=1.0, commit=0.25), 'quantizer/codes'),
    ('vq-ema', dict(commit=1.0), 'decoder/embed/linear/bias'),
  ],
)
def test_a_leaf_without_gradient_is_named(kind, losses, lost):
  plan = planned(kind, losses=losses)
  with pytest.raises(UserError, match=lost):
    step_lib.check_reach(plan.spec, *plan.abstract(), tiny.images(8))


@pytest.mark.parametrize(
  'kind',
  (
    'fsq-cosmos',
    'vq-ema',
    'vq-gradient',
    'simvq-l2',
    pytest.param('lfq', marks=pytest.mark.slow),
    pytest.param('bsq', marks=pytest.mark.slow),
  ),
)
def test_gradients_equal_one_loss(kind):
  """The pullback of cotangents is the gradient of the weighted sum."""
  plan, losses = planned(kind), tiny.LOSSES[kind]
  state, frozen = started(plan)
  images = tiny.images(8)
  part = plan.gradients(state, frozen, images)

  def total(params):
    variables = state_lib.variables_of(state, frozen) | {
      'params': trees.unflatten(params)
    }
    out = plan.spec.tokenizer.apply(
      variables, images, train=True, losses=tuple(losses)
    )
    error = out.images - images.astype(jnp.float32) / 255
    values = out.quantizer.losses | {
      'l1': jnp.abs(error).mean(),
      'l2': (error**2).mean(),
    }
    return sum(w * values[n] for n, w in losses.items())

  value, want = jax.jit(jax.value_and_grad(total))(state.tokenizer.params)
  weighted = sum(w * part.metrics[f'loss/{n}'] for n, w in losses.items())
  np.testing.assert_allclose(weighted, value, rtol=1e-5)
  scale = max(float(jnp.abs(g).max()) for g in want.values())
  for name in want:
    np.testing.assert_allclose(
      part.gradients[name], want[name], rtol=1e-4, atol=1e-5 * scale
    )


def test_the_codebook_moves_once_from_the_steps_sums():
  plan = base()
  state, frozen = started(plan)
  after, _ = plan.step(state, frozen, tiny.images(8))
  apply = jax.jit(functools.partial(plan.spec.tokenizer.apply, train=True))
  out = apply(state_lib.variables_of(state, frozen), tiny.images(8))
  want = plan.spec.tokenizer.quantizer.update_codebook(
    state.codebook['quantizer'], out.quantizer.stats
  )
  assert_close(after.codebook['quantizer'], want)


def test_ema_follows_the_weights():
  plan = base(ema=0.5)
  state, frozen = started(plan)
  want = host(state.tokenizer.params)
  for t in range(3):
    state, _ = plan.step(state, frozen, tiny.images(8))
    d = min(0.5, (1 + t) / (10 + t))
    now = host(state.tokenizer.params)
    want = {n: d * want[n] + (1 - d) * now[n] for n in want}
  for name, value in host(state.ema).items():
    np.testing.assert_allclose(value, want[name], rtol=1e-4, atol=1e-6)
  assert planned(ema=0.0).abstract()[0].ema is None


def test_usage_counts_the_last_steps_only():
  plan = base(schedules=(('.*', dict(lr=1e-9)),))
  state, frozen = started(plan)
  for i in range(3):
    state, metrics = plan.step(state, frozen, tiny.images(8, seed=i))
  assert state.usage.shape == (2, 1, 64)
  assert state.usage.sum() == 2 * 8 * 16
  window = np.asarray(state.usage).sum((0, 1))
  np.testing.assert_allclose(metrics['usage'], (window > 0).mean())


def test_a_loss_weight_starts_and_rises_when_its_config_says():
  losses = dict(
    l2=1.0,
    l1=dict(weight=2.0, start=3, unit='steps'),
    commit=dict(weight=2.0, start=1, ramp=3, unit='epochs'),
  )
  plan = planned('vq-ema', steps_per_epoch=10, losses=losses, duration=99)
  numbers = plan.hparams['losses']

  def weights(name, *steps):
    return [float(optim.loss_weight(numbers[name], s)) for s in steps]

  assert weights('l1', *range(5)) == [0, 0, 0, 2, 2]
  found = weights('commit', 9, 10, 24, 40, 98)
  np.testing.assert_allclose(found, [0, 2 / 31, 30 / 31, 2, 2], rtol=1e-6)


def test_vector_schedules_reach_the_step():
  """The first block keeps every bit, -0.0 too, and is in no norm that is
  logged; the second moves."""
  rows = (
    ('encoder/transformer/.*', dict(lr=1e-3, layers=(None, 1.0))),
    ('.*', dict(lr=1e-3)),
  )
  optim = dict(weight_decay=0.1, clip=None)
  plan = planned(schedules=rows, optim=optim)
  state, frozen = started(plan)
  negative = {
    n: -jnp.zeros_like(x) if n.endswith('fc2/bias') else x
    for n, x in state.tokenizer.params.items()
  }
  state = state.replace(tokenizer=state.tokenizer.replace(params=negative))
  after, metrics = plan.step(state, frozen, tiny.images(8))
  before, now = host(state.tokenizer.params), host(after.tokenizer.params)
  for name in before:
    if name.startswith('encoder/transformer/'):
      assert before[name][0].tobytes() == now[name][0].tobytes(), name
      assert (before[name][1] != now[name][1]).any(), name
  tenths = {n: x for n, x in host(after).items() if '/mu/' in n}
  norm = 10 * sum(np.square(x).sum() for x in tenths.values()) ** 0.5
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)


def test_changing_a_number_compiles_nothing(programs):
  """Rates, decays, weights, clips, later starts, regularisers' weights; what
  changes the program or the state compiles."""
  late = dict(
    losses=dict(l2=1.0, gan=dict(weight=0.5, start=2)),
    discriminator=pieces.PATCH | dict(start=1, schedule=dict(lr=1e-3)),
    schedules=(('.*', dict(lr=1e-3, warmup=1)),),
    optim=dict(weight_decay=0.1),
    duration=8,
  )
  other = dict(
    losses=dict(l2=2.0, gan=dict(weight=0.1, start=5, ramp=2)),
    discriminator=pieces.PATCH
    | dict(start=3, lecam=0.5, schedule=dict(lr=2e-3, end_lr=1e-4, warmup=2)),
    schedules=(('.*', dict(lr=5e-4, end_lr=1e-5, warmup=3)),),
    optim=dict(weight_decay=0.2, clip=0.3, eps=1e-6),
    ema=0.5,
    duration=9,
  )
  plan = planned(**late)
  state, frozen = started(plan)
  plan.step(state, frozen, tiny.images(8))
  known = programs()
  changed = planned(**other)
  assert changed.spec == plan.spec and changed.numbers != plan.numbers
  _, metrics = changed.step(state, frozen, tiny.images(8))
  assert np.isfinite(metrics['loss/l2'])
  assert programs() == known
  for static in (
    dict(optim=dict(weight_decay=0.1, clip=None)),
    dict(optim=dict()),
    dict(ema=0.0),
    dict(noise_tau=0.5),
    dict(accumulate=2),
    dict(schedules=(('.*', dict(lr=1e-3, decay='linear')),)),
  ):
    assert planned(**late | static).spec != plan.spec, static


def test_accumulation_is_one_big_batch():
  """Four microbatches give the step of the batch: weights, codebook, figures,
  noise too. Each stage's idle codes are revived, and its codes affine."""
  inner = dict(name='vq', num_codes=64, code_dim=8, affine=True)
  model, ends = tiny.model('residual-vq', quantizer=inner), []
  for count in (1, 4):
    # An eps above the gradients: Adam would make ±1 of a rounding error.
    plan = planned(
      'residual-vq', model=model, accumulate=count, ema=0.5,
      optim=dict(eps=0.1, clip=None), noise_tau=0.8,
    )  # fmt: skip
    state, frozen = started(plan)
    parts = state.codebook['quantizer']['parts']
    idle = parts['counts'].at[:, :40].set(1e-3)  # these are revived
    parts = parts | {'counts': idle}
    state = state.replace(codebook={'quantizer': {'parts': parts}})
    rows = []
    for i in range(2):
      state, metrics = plan.step(state, frozen, tiny.images(8, seed=i))
      rows.append({n: np.asarray(v) for n, v in metrics.items()})
    ends.append((host(state), rows))
  (one, one_rows), (four, four_rows) = ends
  assert_close(four, one)
  for a, b in zip(one_rows, four_rows, strict=True):
    assert_close(b, a)


def test_noise_is_added_before_quantising_and_only_there():
  plan, clean = planned('none', noise_tau=0.5), planned('none')
  state, frozen = started(clean)
  images = tiny.images(8)
  quiet = clean.gradients(state, frozen, images)
  noisy = plan.gradients(state, frozen, images)
  later = plan.gradients(state.replace(step=jnp.int32(1)), frozen, images)
  found = {float(p.metrics['loss/l2']) for p in (quiet, noisy, later)}
  assert len(found) == 3
  variables = state_lib.variables_of(state, frozen)
  added = jnp.full((8, 4, 4, 32), 0.25)
  apply = jax.jit(functools.partial(plan.spec.tokenizer.apply, train=True))
  plain, out = (
    apply(variables, images, noise=noise) for noise in (None, added)
  )
  np.testing.assert_array_equal(out.latents, plain.latents)
  np.testing.assert_allclose(
    out.quantizer.codes - plain.quantizer.codes, added, atol=1e-6
  )


def test_a_stochastic_step_draws_by_sample_and_step(programs):
  """Of the global batch, whatever the order; the temperature is a number."""
  schedule = dict(start=2.0, end=0.5, duration=4)
  plan = planned('gumbel', temperature=schedule, duration=8)
  state, frozen = started(plan)
  images = np.asarray(tiny.images(8), 'f4') / 255
  ids = np.arange(8)
  run = jax.jit(functools.partial(step_lib.loss_gradients, plan.spec))
  first = run(state, frozen, plan.hparams, images, ids)
  turned = run(state, frozen, plan.hparams, images[::-1], ids[::-1])
  assert_close(turned.gradients, first.gradients)
  np.testing.assert_array_equal(turned.stats['counts'], first.stats['counts'])
  later = state.replace(step=jnp.int32(1))
  for other, part in (
    ('sample', run(state, frozen, plan.hparams, images[::-1], ids)),
    ('step', run(later, frozen, plan.hparams, images, ids)),
  ):
    assert (part.stats['counts'] != first.stats['counts']).any(), other
  known = programs()
  colder = planned('gumbel', temperature=schedule | dict(start=0.5), duration=9)
  assert colder.spec == plan.spec
  part = run(state, frozen, colder.hparams, images, ids)
  assert programs() == known
  np.testing.assert_array_equal(part.stats['counts'], first.stats['counts'])
  moved_by = 'quantizer/kernel'
  assert (part.gradients[moved_by] != first.gradients[moved_by]).any()
  linear = planned('gumbel', temperature=schedule | dict(decay='linear'))
  assert linear.spec != plan.spec


def test_frozen_trees_are_apart_and_hashed_alike():
  """A frozen leaf is in no part of the state; equal trees hash equally."""
  from vqrae_jax.train.initialize import hash_frozen

  plan = planned('vq-ema', **FROZEN)
  (state, frozen), (_, again) = started(plan), started(plan)
  assert not [n for n in trees.flatten(state) if 'encoder/' in n]
  stacked = (2, 48, 32)  # the encoder's fc2, and the decoder's
  held = [x.shape for x in jax.tree.leaves(state)].count(stacked)
  assert held == 4  # the decoder's: parameter, average, two moments
  assert hash_frozen(frozen) == hash_frozen(again)
  name = next(iter(frozen.params))
  other = np.array(frozen.params[name])
  other.flat[0] = np.nextafter(other.flat[0], 2, dtype='f4')
  other = frozen.replace(params=frozen.params | {name: other})
  assert hash_frozen(other) != hash_frozen(frozen)


SPECIALS = np.array(
  [0.0, -0.0, 1e-45, -1e-40, 1e-38, 1.0, np.inf, -np.inf, np.nan], 'f4'
)


@pytest.mark.parametrize('where', ('cpu', 'default'))
def test_a_skipped_update_keeps_every_bit(where, monkeypatch):
  """-0.0 and denormals too, which arithmetic on a CPU would lose."""

  def dependent(*args, **branches):
    return branches[where](*args)

  monkeypatch.setattr(jax.lax, 'platform_dependent', dependent)

  @functools.partial(jax.jit, donate_argnums=1)
  def step(finite, state):
    def update(state):
      return jax.tree.map(lambda x: x * 0.5 + 1, state)

    return step_lib.updated_if(finite, update, state)

  kept = step(jnp.array(False), {'a': jnp.array(SPECIALS)})['a']
  assert np.asarray(kept).tobytes() == SPECIALS.tobytes()
  moved = step(jnp.array(True), {'a': jnp.array(SPECIALS[:6])})['a']
  np.testing.assert_allclose(moved, SPECIALS[:6] * 0.5 + 1)
