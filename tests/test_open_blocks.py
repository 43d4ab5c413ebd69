"""Layer-wise rates and an encoder's last blocks, as recipes ask for them."""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common, simvq_siglip_l
from vqrae_jax import optim
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib

BIAS = 'encoder/transformer/blocks/mlp/fc2/bias'
KERNEL = 'encoder/transformer/blocks/attention/out/kernel'
POSITIONS = 'encoder/embed/positions'
HEAD = 'decoder/head/bias'


def test_layerwise():
  assert common.layerwise(1.0, 3) == (1.0, 1.0, 1.0)
  assert common.layerwise(0.5, 4) == (0.125, 0.25, 0.5, 1.0)
  assert common.layerwise(0.5, 4, last=2) == (None, None, 0.5, 1.0)
  assert common.layerwise(0.5, 4, last=1) == (None, None, None, 1.0)


@pytest.fixture(scope='module')
def shapes():
  """{leaf name: shape} of the recipe's model."""
  spec = config_lib.read_config(simvq_siglip_l.get_config())
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), 'float32')
  tokenizer = build_tokenizer(spec.model)
  variables = jax.eval_shape(tokenizer.init, jax.random.key(0), image)
  return trees.flatten(variables['params'])


def moved(shapes, arguments):
  """{leaf name: (which slices kept every bit in three steps of the recipe's
  optimizer, the rate)} of four leaves; absent if frozen.

  The leaves have their names, axes and depth, and few channels. Their values
  are small, as the first steps of the warm-up are.
  """
  spec = config_lib.read_config(simvq_siglip_l.get_config(arguments))
  every = optim.match_schedules(spec.schedule_rows(), list(shapes))
  names = [n for n in (BIAS, KERNEL, POSITIONS, HEAD) if every[n] is not None]
  key = jax.random.key(0)
  sizes = {n: (shapes[n].shape[0], *(4,) * (shapes[n].ndim - 1)) for n in names}
  before = {n: 1e-4 * jax.random.normal(key, sizes[n]) for n in names}
  tx, numbers = optim.make_optimizer(
    spec.optim, {n: every[n] for n in names}, before, 10_000, 1000
  )
  after, state = before, tx.init(before)
  for _ in range(3):
    grads = jax.tree.map(jnp.ones_like, before)
    updates, state = tx.update(numbers, grads, state, after)
    after = optax.apply_updates(after, updates)
  rates, found = tx.rates(numbers, 5000), {}
  for name, index, _ in tx.leaves:
    old, new = np.asarray(before[name]), np.asarray(after[name])
    slices = [a.tobytes() == b.tobytes() for a, b in zip(old, new, strict=True)]
    found[name] = slices, float(rates[index])
  return found


def test_the_last_six_blocks_open(shapes):
  """Of 24 blocks 18 keep every bit, weight decay notwithstanding."""
  found = moved(shapes, 'stage=2,open=6')
  assert found.keys() == {BIAS, KERNEL, HEAD}
  for name in (BIAS, KERNEL):
    still, rate = found[name]
    assert still == [True] * 18 + [False] * 6
    assert rate == found[HEAD][1]


def test_all_blocks_open_by_default(shapes):
  found = moved(shapes, 'stage=2')
  assert found.keys() == {BIAS, KERNEL, POSITIONS, HEAD}
  for still, rate in found.values():
    assert not any(still) and rate == found[HEAD][1]


@pytest.mark.parametrize('last', [6, 24])
def test_each_block_learns_slower_than_the_one_above(shapes, last):
  """The first update of AdamW is the rate itself where there is no decay."""
  arguments = f'stage=2,open={last},decay=0.8'
  spec = config_lib.read_config(simvq_siglip_l.get_config(arguments))
  every = optim.match_schedules(spec.schedule_rows(), list(shapes))
  names = [n for n in (BIAS, POSITIONS, HEAD) if every[n] is not None]
  zeros = {n: jnp.zeros(shapes[n].shape) for n in names}
  tx, numbers = optim.make_optimizer(
    spec.optim, {n: every[n] for n in names}, zeros, 10_000, 1000
  )
  grads = jax.tree.map(jnp.ones_like, zeros)
  updates, _ = tx.update(numbers, grads, tx.init(zeros), zeros)
  unit = float(updates[HEAD][0])
  assert unit < 0
  want = [0.0] * (24 - last) + [0.8**n for n in range(last)][::-1]
  np.testing.assert_allclose(updates[BIAS][:, 0] / unit, want, rtol=1e-5)
  if last == 24:  # the step below the lowest block
    ratio = updates[POSITIONS].ravel()[0] / unit
    np.testing.assert_allclose(ratio, 0.8**24, rtol=1e-5)
  else:
    assert POSITIONS not in names


def test_the_readmes_example_is_the_recipes():
  readme = pathlib.Path(__file__).resolve().parents[1] / 'README.md'
  blocks = re.findall(r'```python\n(.*?)```', readme.read_text(), re.S)
  [example] = [b for b in blocks if 'layerwise' in b]
  config = types.SimpleNamespace()
  exec(example, {'config': config})
  recipe = simvq_siglip_l.get_config('stage=2,open=6,decay=0.8')
  assert config.schedules == config_lib.plain(recipe.schedules)
