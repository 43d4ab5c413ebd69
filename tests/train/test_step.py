"""The step: what moves, what stays, and that one pullback is the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.train.pieces import host, jitted, planned, started
from vqrae_jax.errors import UserError
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib

FROZEN_ENCODER = (('encoder/.*', None), ('.*', dict(lr=1e-3)))


def changed(before, after):
  return {n for n in before if before[n].tobytes() != after[n].tobytes()}


@pytest.mark.parametrize(
  ('kind', 'schedule'),
  [(kind, 'all') for kind in tiny.LOSSES]
  + [
    pytest.param(
      kind,
      'frozen encoder',
      marks=() if kind in ('fsq-cosmos', 'vq-ema') else pytest.mark.slow,
    )
    for kind in tiny.LOSSES
  ],
)
def test_exactly_what_should_move_moves(kind, schedule):
  """After one step every trainable leaf has moved and nothing else has."""
  rows = (
    FROZEN_ENCODER if schedule == 'frozen encoder' else (('.*', dict(lr=1e-3)),)
  )
  post = dict(post_quant=dict(kernel=3))
  plan = planned(kind, schedules=rows, model=tiny.model(kind, **post))
  state, frozen = started(plan)
  step_lib.check_reach(plan, state, frozen, tiny.images(8))
  after, _ = jitted(plan)(state, frozen, tiny.images(8))

  leaves = set(trees.flatten(plan.shapes['params']))
  encoder = {n for n in leaves if n.startswith('encoder/')}
  frozen_names = encoder if schedule == 'frozen encoder' else set()
  assert set(frozen.params) == frozen_names
  trainable = leaves - frozen_names
  assert set(state.tokenizer.params) == trainable
  moved = changed(host(state.tokenizer.params), host(after.tokenizer.params))
  assert moved == trainable
  assert changed(host(state.ema), host(after.ema)) == trainable
  assert any('post_conv' in n for n in trainable)
  if kind.startswith(('fsq', 'simvq', 'vq-gradient')):
    assert any('project_in' in n for n in trainable)
    assert any('project_out' in n for n in trainable)
  if kind.startswith('simvq'):
    assert {'quantizer/kernel', 'quantizer/bias'} <= trainable
  tables = changed(host(state.codebook), host(after.codebook))
  table = {'quantizer/codes', 'quantizer/counts', 'quantizer/sums'}
  assert tables == (table if kind == 'vq-ema' else set())
  assert int(after.step) == 1


@pytest.mark.parametrize(
  'kind, losses, lost',
  [
    ('simvq-l2', dict(l2=1.0, commit=0.25), 'quantizer/bias, quantizer/kernel'),
    ('vq-gradient', dict(l2=1.0, commit=0.25), 'quantizer/codes'),
    ('vq-ema', dict(commit=1.0), 'decoder/embed/linear/bias'),
    ('simvq-l2', dict(codebook=1.0), 'decoder/'),
  ],
)
def test_a_leaf_without_gradient_is_named(kind, losses, lost):
  plan = planned(kind, losses=losses)
  fresh = functools.partial(state_lib.fresh_state, plan, 0)
  state, frozen = jax.eval_shape(fresh)
  with pytest.raises(UserError, match=f'no loss moves .*{lost}'):
    step_lib.check_reach(plan, state, frozen, tiny.images(8))


@pytest.mark.parametrize('kind', tiny.LOSSES)
def test_gradients_equal_one_loss(kind):
  """The pullback of cotangents is the gradient of the weighted sum."""
  plan = planned(kind)
  state, frozen = started(plan)
  images = tiny.images(8)
  part = jax.jit(functools.partial(step_lib.loss_gradients, plan))(
    state, frozen, images
  )
  found, metrics = part.gradients, part.metrics

  def total(params):
    variables = {'params': trees.merge(params, frozen.params)}
    if state.codebook:
      variables['codebook'] = state.codebook
    out = plan.tokenizer.apply(variables, images, train=True)
    error = out.images - images.astype(jnp.float32) / 255
    values = out.quantizer.losses | {
      'l1': jnp.abs(error).mean(),
      'l2': (error**2).mean(),
    }
    return sum(w * values[n] for n, w in tiny.LOSSES[kind].items())

  value, want = jax.jit(jax.value_and_grad(total))(state.tokenizer.params)
  weighted = sum(w * metrics[f'loss/{n}'] for n, w in tiny.LOSSES[kind].items())
  np.testing.assert_allclose(weighted, value, rtol=1e-5)
  scale = max(float(jnp.abs(g).max()) for g in want.values())
  for name in want:
    np.testing.assert_allclose(
      found[name], want[name], rtol=1e-4, atol=1e-5 * scale
    )


def test_a_frozen_encoder_gets_no_backward():
  """Compiled FLOPs: at least 1.8 encoder forwards fewer than trainable."""
  model = tiny.model('fsq-cosmos', depth=4, scan=False)
  flops = {}
  for name, rows in (('free', (('.*', dict(lr=1e-3)),)),
                     ('frozen', FROZEN_ENCODER)):  # fmt: skip
    plan = planned(schedules=rows, model=model)
    fresh = functools.partial(state_lib.fresh_state, plan, 0)
    shapes = jax.eval_shape(fresh)
    images = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.uint8)
    compiled = jitted(plan).lower(*shapes, images).compile()
    flops[name] = compiled.cost_analysis()['flops']
  params = plan.shapes['params']
  encode = jax.jit(
    lambda p, x: plan.tokenizer.apply({'params': p}, x, method='encode')
  )
  forward = encode.lower(params, images).compile().cost_analysis()['flops']
  assert flops['free'] - flops['frozen'] > 1.8 * forward, (flops, forward)


def test_the_codebook_moves_once_from_the_steps_sums():
  plan = planned('vq-ema')
  state, frozen = started(plan)
  after, _ = jitted(plan)(state, frozen, tiny.images(8))
  out = plan.tokenizer.apply(
    state_lib.variables_of(state, frozen), tiny.images(8), train=True
  )
  want = plan.tokenizer.quantizer.update_codebook(
    state.codebook['quantizer'], out.quantizer.stats
  )
  for name, table in want.items():
    np.testing.assert_allclose(
      after.codebook['quantizer'][name], table, rtol=1e-4, atol=1e-5
    )


def test_ema_follows_the_weights():
  plan = planned(ema=0.5)
  state, frozen = started(plan)
  step = jitted(plan)
  want = host(state.tokenizer.params)
  for t in range(3):
    state, _ = step(state, frozen, tiny.images(8))
    d = min(0.5, (1 + t) / (10 + t))
    now = host(state.tokenizer.params)
    want = {n: d * want[n] + (1 - d) * now[n] for n in want}
  for name, value in host(state.ema).items():
    np.testing.assert_allclose(value, want[name], rtol=1e-4, atol=1e-6)
  assert planned(ema=0.0).ema == 0
  assert started(planned(ema=0.0))[0].ema is None


def test_usage_counts_the_last_steps_only():
  log = dict(usage_window=2)
  plan = planned('vq-ema', log=log, schedules=(('.*', dict(lr=1e-9)),))
  state, frozen = started(plan)
  step = jitted(plan)
  for i in range(3):
    state, metrics = step(state, frozen, tiny.images(8, seed=i))
  assert state.usage.shape == (2, 1, 64)
  assert state.usage.sum() == 2 * 8 * 16
  window = np.asarray(state.usage).sum((0, 1))
  np.testing.assert_allclose(metrics['usage'], (window > 0).mean())


def test_a_loss_starts_when_its_config_says():
  losses = dict(l2=1.0, l1=dict(weight=2.0, start=3, unit='steps'))
  plan = planned(losses=losses)
  assert [float(plan.weights['l1'](s)) for s in range(5)] == [0, 0, 0, 2, 2]
  epochs = dict(l2=dict(weight=1.0, start=2, unit='epochs'))
  spec = config_lib.read_config(tiny.run(losses=epochs, duration='9 epochs'))
  plan = state_lib.make_plan(spec, build_tokenizer(spec.model), 10)
  assert [float(plan.weights['l2'](s)) for s in (19, 20)] == [0, 1]


def test_bf16_computes_over_f32_parameters():
  plan = planned('simvq-l2', model=tiny.model('simvq-l2', dtype='bfloat16'))
  state, frozen = started(plan)
  after, metrics = jitted(plan)(state, frozen, tiny.images(8))
  for leaf in jax.tree.leaves((after.tokenizer, after.codebook, after.ema)):
    assert leaf.dtype in (jnp.float32, jnp.int32)
  full = planned('simvq-l2')
  _, exact = jitted(full)(*started(full), tiny.images(8))
  np.testing.assert_allclose(metrics['loss/l2'], exact['loss/l2'], rtol=1e-2)


def test_vector_schedules_reach_the_step():
  """The first block keeps every bit, the second moves."""
  rows = (
    ('encoder/transformer/.*', dict(lr=1e-3, layers=(None, 1.0))),
    ('.*', dict(lr=1e-3)),
  )
  plan = planned(schedules=rows)
  state, frozen = started(plan)
  after, _ = jitted(plan)(state, frozen, tiny.images(8))
  before, now = host(state.tokenizer.params), host(after.tokenizer.params)
  for name in before:
    if name.startswith('encoder/transformer/'):
      assert before[name][0].tobytes() == now[name][0].tobytes(), name
      assert (before[name][1] != now[name][1]).any(), name


@pytest.mark.parametrize('kind', ('vq-ema', 'simvq-l2'))
def test_accumulation_is_one_big_batch(kind):
  """Four parts give the step of the whole: weights, codebook, figures."""
  ends = []
  for parts in (1, 4):
    # An eps above the gradients: AdamWConfig would make ±1 of a rounding error.
    plan = planned(
      kind, accumulate=parts, ema=0.5, optim=dict(eps=0.1, clip=None)
    )
    state, frozen = started(plan)
    step = jitted(plan)
    rows = []
    for i in range(2):
      state, metrics = step(state, frozen, tiny.images(8, seed=i))
      rows.append({n: float(v) for n, v in metrics.items()})
    ends.append((host(state), rows))
  (one, one_rows), (four, four_rows) = ends
  assert one.keys() == four.keys()
  for name in one:
    if name.endswith('key/bias'):
      continue  # its true gradient is zero: softmax does not see it
    if one[name].dtype == np.int32:
      np.testing.assert_array_equal(four[name], one[name], err_msg=name)
      continue
    scale = np.abs(one[name]).max()
    np.testing.assert_allclose(
      four[name], one[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name
    )
  for a, b in zip(one_rows, four_rows, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
