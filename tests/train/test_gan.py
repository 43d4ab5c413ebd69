"""The discriminator in the step: what moves, when, and by how much."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.nn import torch_discriminators as references
from tests.train import pieces
from tests.train.pieces import DINO, GAN, PATCH, assert_close, host, moved
from vqrae_jax.losses import adversarial
from vqrae_jax.ops import trees
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib
from vqrae_jax.train.gan import Alarms, active_metrics

torch = pytest.importorskip('torch')
F = torch.nn.functional

FIELDS = dict(hidden=8, halvings=2, groups=4, pool=2)
R1, LECAM, RATE = 5.0, 0.5, 1e-2
AVERAGES = {'real': 0.3, 'fake': -0.2}


def planned(**keys):
  return pieces.planned('fsq-cosmos', **GAN | keys)


@functools.cache
def first():
  plan = planned()
  state, frozen = pieces.started(plan)
  return plan, state, frozen, plan.step(state, frozen, tiny.images(8))


def test_both_networks_move_and_have_metrics():
  _, state, _, (after, metrics) = first()
  names = set(host(state.discriminator))
  assert moved(state.discriminator, after.discriminator) == names
  assert moved(state.tokenizer, after.tokenizer) == set(host(state.tokenizer))
  for name, value in metrics.items():
    assert np.isfinite(value), name
  assert metrics['adaptive_weight'] > 0
  for side, average in after.discriminator.stats['lecam'].items():
    want = 0.001 * metrics[f'logits/{side}']  # averages start at zero
    np.testing.assert_allclose(average, want, rtol=1e-4, err_msg=side)


def test_the_discriminator_learns_on_8_bits():
  """Its fakes are the step's own reconstruction, clipped and rounded."""
  plan, state, frozen, _ = first()
  images = np.float32(tiny.images(8)) / np.float32(255)
  accumulated = functools.partial(step_lib.accumulated, plan.spec)
  batch, (reals, ids) = jax.jit(accumulated)(
    state, frozen, plan.hparams, images
  )
  np.testing.assert_array_equal(reals[0], images)
  np.testing.assert_array_equal(ids[0], np.arange(8))
  levels = 255 * np.asarray(batch.fakes)[0]
  np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
  variables = state_lib.variables_of(state, frozen)
  recon = jax.jit(plan.spec.tokenizer.apply)(variables, images).images
  off = np.abs(levels - 255 * np.clip(recon, 0, 1))
  assert off.max() < 0.501


def test_before_its_start_each_loss_changes_nothing():
  _, state, frozen, _ = first()
  late = planned(
    losses=dict(l2=1.0, gan=dict(weight=0.5, start=2)),
    discriminator=PATCH | dict(start='1 steps'),
  )
  alone = pieces.planned('fsq-cosmos', losses=dict(l2=1.0))
  images = tiny.images(8)
  one, metrics = late.step(state, frozen, images)
  bare, _ = alone.step(*pieces.started(alone), images)
  assert metrics['loss/gan'] == 0 and metrics['loss/discriminator'] == 0
  assert not moved(state.discriminator, one.discriminator)
  assert not moved(bare.tokenizer, one.tokenizer)
  two, metrics = late.step(one, frozen, images)
  assert metrics['loss/gan'] == 0 and metrics['loss/discriminator'] > 0
  assert moved(one.discriminator, two.discriminator)
  _, metrics = late.step(two, frozen, images)
  assert metrics['loss/gan'] != 0


def test_the_weight_and_the_gradient_are_those_of_two_passes():
  """Two autograd passes to the head's kernel, one to every leaf: 1e-5."""
  plan = planned(discriminator=PATCH | dict(augment=False))
  state, frozen = pieces.started(plan)
  images = np.float32(tiny.images(8)) / np.float32(255)
  rngs = {'quantizer': jax.random.fold_in(state.rng, state.step)}

  def losses(params):
    variables = {'params': trees.merge(params, frozen.params)}
    out = plan.spec.tokenizer.apply(variables, images, train=True, rngs=rngs)
    network = state.discriminator
    logits = plan.spec.gan.logits(
      network.params, network.stats['spectral'], frozen, out.images
    )
    return jnp.mean((out.images - images) ** 2), adversarial.g_hinge(logits)

  rec, gan = jax.jit(jax.jacrev(losses))(state.tokenizer.params)
  head = 'decoder/head/kernel'
  want = adversarial.adaptive_weight(
    jnp.linalg.norm(rec[head]), jnp.linalg.norm(gan[head])
  )
  part = plan.gradients(state, frozen, tiny.images(8))
  np.testing.assert_allclose(part.metrics['adaptive_weight'], want, rtol=1e-5)
  total = {n: rec[n] + 0.5 * want * gan[n] for n in rec}
  assert_close(part.gradients, total, 2e-5)


def test_accumulation_is_one_big_batch(monkeypatch):
  """The adaptive weight is the batch's, spectral norm and LeCam move once, in
  `cond` and `scan` too.

  Adam's moments are compared, sums of gradients: it divides by their size. A
  value between two levels of 8 bits falls to either, so fakes are not rounded.
  """
  monkeypatch.setattr(adversarial, 'to_8_bits', lambda x: jnp.clip(x, 0, 1))
  ends = []
  for count in (1, 4):
    plan = planned(
      accumulate=count,
      losses=dict(l2=1.0, gan=dict(weight=0.5, start=1)),
      discriminator=DINO | dict(start=1),
      # A spec of its own: other tests' programs round their fakes.
      log=dict(usage_window=7),
    )
    # Of a nearly flat image instance norm would make rounding errors large.
    state, frozen = pieces.started(plan, larger=pieces.CONTRAST)
    for _ in range(2):
      state, metrics = plan.step(state, frozen, tiny.images(8))
    ends.append((host(state.discriminator), metrics))
  (one, want), (four, found) = ends
  assert want['loss/gan'] != 0 and want['lr/discriminator'] > 0
  assert found.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(
      found[name], want[name], rtol=5e-5, atol=1e-6, err_msg=name
    )
  # Instance norm takes the mean away: these biases have no true gradient.
  skip = ('enter/bias', 'mix/bias')
  skip += tuple(n for n in one if n.startswith('params/') or '/nu/' in n)
  assert_close(four, one, 5e-5, skip)


def updates_of_torch(reals, fakes):
  """(last losses, mean logits of the real, parameters) after two updates."""
  torch.manual_seed(0)
  model = references.PatchGAN(**FIELDS)
  start = model.leaves()
  adam = torch.optim.Adam(model.parameters(), RATE, (0.9, 0.95), eps=1e-3)
  for _ in range(2):
    adam.zero_grad()
    x, y = (
      torch.tensor(images).double().permute(0, 3, 1, 2) / 255
      for images in (reals, fakes)
    )
    real, fake = model(2 * x.requires_grad_() - 1), model(2 * y - 1)
    hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    above = F.relu(real - AVERAGES['fake']).square().mean()
    lecam = above + F.relu(AVERAGES['real'] - fake).square().mean()
    (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    r1 = slope.square().sum((1, 2, 3)).mean()
    (hinge + LECAM * lecam + R1 / 2 * r1).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
  losses = {'discriminator': hinge, 'lecam': lecam, 'r1': r1}
  losses = {f'loss/{name}': x.item() for name, x in losses.items()}
  return losses, real.mean().item(), start, model.leaves()


def test_two_updates_with_r1_and_lecam_are_torchs():
  """Of two microbatches each; both see the same averages, which move once,
  after the last, and have the rate of the step, the first of a warm-up."""
  spec = PATCH | dict(
    fields=FIELDS, updates=2, r1=R1, lecam=LECAM, augment=False,
    optim=dict(b1=0.9, b2=0.95, eps=1e-3),
    schedule=dict(lr=2 * RATE, warmup=2, decay='constant'),
  )  # fmt: skip
  plan = planned(discriminator=spec)
  rng = np.random.default_rng(0)
  reals, fakes = rng.integers(0, 256, (2, 4, 16, 20, 3), dtype=np.uint8)
  losses, mean, start, want = updates_of_torch(reals, fakes)
  state, frozen = pieces.started(plan)
  network = state.discriminator
  lecam = {n: np.float32(x) for n, x in AVERAGES.items()}
  network = network.replace(
    params=start, stats=network.stats | dict(lecam=lecam)
  )
  network, metrics = jax.jit(plan.spec.gan.discriminator_step)(
    state.replace(discriminator=network), frozen, plan.hparams,
    *(x.reshape(2, 2, 16, 20, 3) / np.float32(255) for x in (reals, fakes)),
    np.arange(4).reshape(2, 2),
  )  # fmt: skip
  for name, value in losses.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
  assert_close(
    {n: np.asarray(x) - start[n] for n, x in network.params.items()},
    {n: x - start[n] for n, x in want.items()},
    1e-4,
  )
  average = 0.999 * AVERAGES['real'] + 0.001 * mean
  np.testing.assert_allclose(network.stats['lecam']['real'], average, rtol=1e-5)
  np.testing.assert_allclose(metrics['lr/discriminator'], RATE, rtol=1e-6)


@pytest.mark.parametrize(
  'kind', ['fsq-cosmos', pytest.param('simvq-l2', marks=pytest.mark.slow)]
)
def test_bf16_is_near_f32(kind):
  """Over f32 parameters, moments and averages, of both networks."""
  found = []
  for dtype in ('float32', 'bfloat16'):
    fields = PATCH['fields'] | dict(dtype=dtype)
    plan = pieces.planned(
      kind,
      model=tiny.model(kind, dtype=dtype),
      losses=tiny.LOSSES[kind] | dict(gan=dict(weight=0.5)),
      discriminator=PATCH | dict(fields=fields),
    )
    state, frozen = pieces.started(plan, larger=pieces.CONTRAST)
    after, metrics = plan.step(state, frozen, tiny.images(8))
    for name, leaf in host(after).items():
      assert leaf.dtype in (np.float32, np.int32), name
    found.append(metrics)
  for name in ('loss/l2', 'loss/discriminator', 'loss/gan'):
    np.testing.assert_allclose(
      found[1][name], found[0][name], rtol=1e-2, atol=2e-3, err_msg=name
    )


def test_random_networks_follow_their_names_not_their_order(monkeypatch):
  """The order of a config's losses changes no network."""
  monkeypatch.setattr(
    state_lib.networks, 'random', lambda term, key: jax.random.key_data(key)
  )

  @functools.partial(jax.jit, static_argnums=0)
  def networks(spec):  # nothing else of the state is drawn
    return state_lib.random_state(spec, 0)[1].losses

  drawn = {}
  for names in (('lpips', 'convnext'), ('convnext', 'lpips'), ('convnext',)):
    plan = pieces.planned(
      losses=dict.fromkeys(('l2', *names), 1.0), init=dict(networks='random')
    )
    for name, key in networks(plan.spec).items():
      np.testing.assert_array_equal(key, drawn.setdefault(name, key))


def test_a_nonfinite_step_moves_nothing_but_its_counter():
  plan = pieces.planned(
    'vq-ema',
    losses=dict(l2=1.0, commit=0.25, gan=dict(weight=0.5)),
    discriminator=DINO | dict(schedule=dict(lr=1e-3, warmup=3)),
  )
  state, frozen = pieces.started(plan)
  images = [np.float32(tiny.images(8, seed=i)) / 255 for i in range(2)]
  state, _ = plan.step(state, frozen, images[0])  # every average has started
  bad = images[1].copy()
  bad[3, 5, 7, 1] = np.nan
  after, metrics = plan.step(state, frozen, bad)
  assert metrics['nonfinite'] == 1 and np.isnan(metrics['loss/l2'])
  assert moved(state, after) == {'step'} and after.step == state.step + 1
  rate = metrics['lr/discriminator']
  after, metrics = plan.step(after, frozen, images[1])
  assert metrics['lr/discriminator'] == rate > 0  # no update was made
  assert metrics['nonfinite'] == 0
  still = host(state).keys() - moved(state, after)
  assert all(n.endswith('/out/u') for n in still)  # one number, ±1
  # A discriminator that breaks skips the tokenizer's step as well.
  network = state.discriminator
  broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), network.params)
  broken = state.replace(discriminator=network.replace(params=broken))
  after, metrics = plan.step(broken, frozen, images[1])
  assert metrics['nonfinite'] == 1 and np.isfinite(metrics['loss/l2'])
  assert moved(broken, after) == {'step'}


SOUND = {
  'loss/discriminator': 0.8, 'logits/real': 0.3, 'logits/fake': -0.2,
  'adaptive_weight': 12.0, 'usage': 0.9, 'perplexity': 50.0, 'nonfinite': 0.0,
}  # fmt: skip


def alarms(loss='hinge'):
  """Of a run whose discriminator starts at 2, the decoder's loss at 4."""
  plan = planned(
    losses=dict(l2=1.0, gan=dict(weight=0.5, start=4)),
    discriminator=PATCH | dict(start=2, loss=loss),
    duration=9,
  )
  return Alarms(plan.spec.gan, plan.numbers, warmup=3)


def sounded(alarms, steps, **metrics):
  for step in steps:
    alarms.add(step, SOUND | metrics)
  return alarms.warnings()


@pytest.mark.parametrize(
  'metrics, word',
  (
    ({'loss/discriminator': 0.001}, 'separates'),
    ({'logits/real': 400.0}, 'logits diverge'),
    ({'logits/fake': -400.0}, 'logits diverge'),
    ({'adaptive_weight': 1e4}, 'adaptive_weight'),
    ({'usage': 0.05, 'perplexity': 3.0}, 'usage 0.05'),
  ),
)
def test_an_alarm_sounds_once_until_it_is_over(metrics, word):
  alarm = alarms()
  assert sounded(alarm, range(1, 5)) == []
  (line,) = sounded(alarm, range(5, 9), **metrics)
  assert word in line
  assert sounded(alarm, range(9, 12), **metrics) == []
  assert sounded(alarm, range(12, 15)) == []
  assert len(sounded(alarm, range(15, 18), **metrics)) == 1


def test_what_has_not_started_and_skipped_steps_are_not_judged():
  lost = {'loss/discriminator': 0.0}
  assert sounded(alarms(), (1, 2), **lost) == []
  assert sounded(alarms(), (3, 4), adaptive_weight=1e4) == []
  assert sounded(alarms(), (1, 2, 3), usage=0.0) == []
  assert sounded(alarms(), (5, 6), nonfinite=1.0, **lost) == []
  silent = dict.fromkeys(SOUND, 0.5) | dict(nonfinite=0.0)
  assert sounded(Alarms(None, {}, 0), (5, 6), **silent) == []
  # A window of few tokens cannot meet many codes.
  few = Alarms(None, {}, 0, reachable=0.1)
  assert sounded(few, (5, 6), **silent | dict(usage=0.05)) == []
  assert len(sounded(few, (7, 8), **silent | dict(usage=0.005))) == 1


def test_metrics_start_with_what_they_measure():
  """By their whole names: those of added losses may begin like others."""
  names = (
    'loss/l2', 'loss/gan', 'loss/gan_more', 'adaptive_weight', 'loss/r1',
    'loss/discriminator', 'logits/real', 'discriminator/grad_norm',
  )  # fmt: skip
  numbers = dict(losses=dict(gan=dict(start=4)), discriminator=dict(start=2))

  def waiting(step):
    kept = active_metrics(step, dict.fromkeys(names, 1.0), numbers)
    return {*names} - kept.keys()

  late = {'loss/gan', 'adaptive_weight'}
  assert waiting(2) == {*names} - {'loss/l2', 'loss/gan_more'}
  assert waiting(3) == waiting(4) == late and not waiting(5)


def test_guessing_depends_on_the_loss():
  """2 % of what guessing gives: 1 for hinge, 2 log 2, log 2."""
  low = {'loss/discriminator': 0.021}
  assert sounded(alarms(), (5, 6), **low) == []
  assert len(sounded(alarms('non_saturating'), (5, 6), **low)) == 1
  assert sounded(alarms('vanilla'), (5, 6), **low) == []
