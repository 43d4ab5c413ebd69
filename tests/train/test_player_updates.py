"""Updates of the second player: against torch, in parts, in bf16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.nn import torch_discriminators as references
from tests.train import pieces
from tests.train.test_adversary import PATCH, planned
from vqrae_jax.losses import adversarial
from vqrae_jax.ops import trees
from vqrae_jax.train import state as state_lib

FIELDS = dict(hidden=8, halvings=2, groups=4, pool=2)
ADAM = dict(b1=0.9, b2=0.95, eps=1e-3)
R1, LECAM, RATE = 5.0, 0.5, 1e-2
AVERAGES = {'real': 0.3, 'fake': -0.2}
# Two heads on a frozen backbone, with spectral norm.
DINO = dict(
  name='dino',
  fields=dict(
    vit=dict(width=16, depth=2, mlp_dim=32, num_heads=2, grid=(2, 2)),
    taps=(1, 0),
    kernel=3,
  ),
  lecam=0.01,
)


def updates_of_torch(reals, fakes):
  """(last losses, mean logits of the real, parameters) after two updates."""
  torch.manual_seed(0)
  model = references.PatchGAN(**FIELDS)
  first = model.leaves()
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
  losses = dict(discriminator=hinge, lecam=lecam, r1=r1)
  said = {f'loss/{n}': float(x.detach()) for n, x in losses.items()}
  return said, float(real.detach().mean()), first, model.leaves()


@pytest.mark.parametrize('parts', (1, 2))
def test_two_updates_with_r1_and_lecam_are_torchs(parts):
  """Both see the same averages, which move once, after the last."""
  spec = PATCH | dict(
    fields=FIELDS, updates=2, r1=R1, lecam=LECAM, augment=False, optim=ADAM
  )
  spec['schedule'] = dict(lr=RATE, decay='constant')
  adversary = planned(discriminator=spec).adversary
  rng = np.random.default_rng(0)
  reals, fakes = rng.integers(0, 256, (2, 4, 16, 20, 3), dtype=np.uint8)
  said, mean, first, want = updates_of_torch(reals, fakes)

  @jax.jit
  def step(params, reals, fakes, rows):
    state, frozen = state_lib.fresh_state(planned(discriminator=spec), 0)
    player = state.discriminator
    lecam = {n: jnp.float32(x) for n, x in AVERAGES.items()}
    player = player.replace(
      params=params, stats=player.stats | {'lecam': lecam}
    )
    state = state.replace(discriminator=player)
    return adversary.step(state, frozen, reals, fakes, rows)

  def split(x):
    return x.reshape(parts, -1, *x.shape[1:])

  player, metrics = step(first, *map(split, (reals, fakes, np.arange(4))))
  for name, value in said.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
  for name in want:
    moved = want[name] - first[name]
    found = np.asarray(player.params[name]) - first[name]
    off = np.abs(found - moved).max() / np.abs(moved).max()
    assert off < 1e-4, (name, off)
  average = 0.999 * AVERAGES['real'] + 0.001 * mean
  np.testing.assert_allclose(player.stats['lecam']['real'], average, rtol=1e-5)
  np.testing.assert_allclose(metrics['lr/discriminator'], RATE, rtol=1e-6)


def test_parts_are_one_batch_for_a_player_that_starts_late(monkeypatch):
  """Its vectors of spectral norm move once a step, inside `cond` and `scan`.

  Adam's moments are compared, sums of gradients: it divides by their size. A
  value between two levels of 8 bits falls to either, so fakes are not rounded.
  """
  monkeypatch.setattr(adversarial, 'to_8_bits', lambda x: jnp.clip(x, 0, 1))
  late = dict(
    losses=dict(l2=1.0, gan=dict(weight=0.5, start=1)),
    discriminator=DINO | dict(start=1),
  )
  images, ends = tiny.images(8), []
  for accumulate in (1, 4):
    plan = planned(accumulate=accumulate, **late)
    step = pieces.jitted(plan)
    state, frozen = pieces.started(plan)
    for _ in range(2):
      state, metrics = step(state, frozen, images)
    ends.append((pieces.host(state.discriminator), metrics))
  (one, said), (four, told) = ends
  assert said['loss/gan'] != 0 and said['lr/discriminator'] > 0
  assert said.keys() == told.keys()
  for name in said:
    np.testing.assert_allclose(
      told[name], said[name], rtol=5e-5, atol=1e-6, err_msg=name
    )
  assert any(n.startswith('stats/spectral/') for n in one)
  for name in one:
    if name.startswith('params/') or name.endswith(ZERO):
      continue
    scale = np.abs(one[name]).max() + 1e-12
    np.testing.assert_allclose(
      four[name], one[name], atol=5e-5 * scale, err_msg=name
    )


# Instance norm takes the mean away: these biases have no true gradient.
ZERO = ('enter/bias', 'mix/bias')


def test_bf16_is_near_f32():
  found = []
  for dtype in ('float32', 'bfloat16'):
    fields = PATCH['fields'] | dict(dtype=dtype)
    plan = planned(
      model=tiny.model('fsq-cosmos', dtype=dtype),
      discriminator=PATCH | dict(fields=fields),
    )
    state, frozen = pieces.started(plan, larger=pieces.PAINTED)
    after, metrics = pieces.jitted(plan)(state, frozen, tiny.images(8))
    for leaf in jax.tree.leaves((after.tokenizer, after.discriminator)):
      assert leaf.dtype in (jnp.float32, jnp.int32)
    found.append(metrics)
  for name in ('loss/l2', 'loss/discriminator', 'loss/gan'):
    np.testing.assert_allclose(
      found[1][name], found[0][name], rtol=1e-2, atol=2e-3, err_msg=name
    )


def test_random_networks_are_their_names_not_their_places(monkeypatch):
  """The order of a config's losses changes no network."""
  monkeypatch.setattr(
    state_lib.networks, 'random', lambda term, key: jax.random.key_data(key)
  )
  random = dict(init=dict(networks='random'))
  terms = dict(l2=1.0, lpips=1.0, convnext=0.1)
  keys = []
  for names in (list(terms), list(terms)[::-1], ['l2', 'convnext']):
    plan = pieces.planned(losses={n: terms[n] for n in names}, **random)
    made = jax.jit(functools.partial(state_lib.fresh_state, plan))(0)[1]
    leaves = trees.flatten(made.losses)
    keys.append({n: np.asarray(x) for n, x in leaves.items()})
  one, two, three = keys
  for other in (two, three):
    for name, key in other.items():
      np.testing.assert_array_equal(key, one[name])
