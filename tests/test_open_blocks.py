"""Layer-wise rates and an encoder's last blocks, as recipes ask for them."""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import simvq_siglip_l
from vqrae_jax import optim
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib

BIAS = 'encoder/transformer/blocks/mlp/fc2/bias'
POSITIONS = 'encoder/embed/positions'
HEAD = 'decoder/head/bias'


@pytest.fixture(scope='module')
def shapes():
  """{leaf name: shape} of the recipe's model."""
  spec = config_lib.read_config(simvq_siglip_l.get_config())
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), 'float32')
  tokenizer = build_tokenizer(spec.model)
  variables = jax.eval_shape(tokenizer.init, jax.random.key(0), image)
  return trees.flatten(variables['params'])


@pytest.mark.parametrize(
  'arguments, want',
  [
    ('stage=2', [1] * 24),
    ('stage=2,open=6', [0] * 18 + [1] * 6),
    ('stage=2,open=6,decay=0.8', [0] * 18 + [0.8**n for n in range(6)][::-1]),
    ('stage=2,open=24,decay=0.8', [0.8**n for n in range(24)][::-1]),
  ],
)
def test_rates_of_blocks(shapes, arguments, want):
  """The first update of AdamW is the rate itself where there is no decay."""
  spec = config_lib.read_config(simvq_siglip_l.get_config(arguments))
  every = trees.first_match(spec.schedule_rows(), list(shapes), 'schedules')
  names = [n for n in (BIAS, POSITIONS, HEAD) if every[n] is not None]
  zeros = {n: jnp.zeros(shapes[n].shape) for n in names}
  tx, numbers = optim.make_optimizer(
    spec.optim, {n: every[n] for n in names}, zeros, 10_000, 1000
  )
  grads = jax.tree.map(jnp.ones_like, zeros)
  updates, _ = tx.update(numbers, grads, tx.init(zeros), zeros)
  unit = float(updates[HEAD][0])
  assert unit < 0
  np.testing.assert_allclose(updates[BIAS][:, 0] / unit, want, rtol=1e-5)
  assert (POSITIONS in names) == all(want)
  if all(want):  # one step below the lowest block, if they differ
    ratio = updates[POSITIONS].ravel()[0] / unit
    lowest = want[0] * (0.8 if 'decay' in arguments else 1)
    np.testing.assert_allclose(ratio, lowest, rtol=1e-5)


def test_the_readmes_example_is_the_recipes():
  readme = pathlib.Path(__file__).resolve().parents[1] / 'README.md'
  blocks = re.findall(r'```python\n(.*?)```', readme.read_text(), re.S)
  [example] = [b for b in blocks if 'layerwise' in b]
  config = types.SimpleNamespace()
  exec(example, {'config': config})
  recipe = simvq_siglip_l.get_config('stage=2,open=6,decay=0.8')
  assert config.schedules == config_lib.plain(recipe.schedules)
