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
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib

# Of the recipe's leaves, three with their depth and any width.
BIAS, POSITIONS, HEAD = LEAVES = (
  'encoder/transformer/blocks/mlp/fc2/bias',
  'encoder/embed/positions',
  'decoder/head/bias',
)


@pytest.mark.parametrize(
  'arguments, want',
  [
    ('stage=2', [1] * 24),
    ('stage=2,open=6', [0] * 18 + [1] * 6),
    ('stage=2,open=6,decay=0.8', [0] * 18 + [0.8**n for n in range(6)][::-1]),
    ('stage=2,open=24,decay=0.8', [0.8**n for n in range(24)][::-1]),
  ],
)
def test_rates_of_blocks(arguments, want):
  """The first update of AdamW is the rate itself where there is no decay."""
  spec = config_lib.read_config(simvq_siglip_l.get_config(arguments))
  rows = trees.first_match(spec.schedule_rows(), LEAVES, 'schedules')
  zeros = {n: jnp.zeros((24, 2)) for n in LEAVES if rows[n] is not None}
  tx, numbers = optim.make_optimizer(
    spec.optim, {n: rows[n] for n in zeros}, zeros, 10_000, 1000
  )
  grads = jax.tree.map(jnp.ones_like, zeros)
  norm = tx.norm(grads)
  updates, _ = tx.update(numbers, grads, tx.init(zeros), zeros, norm)
  unit = float(updates[HEAD][0, 0])
  assert unit < 0
  np.testing.assert_allclose(updates[BIAS][:, 0] / unit, want, rtol=1e-5)
  assert (POSITIONS in zeros) == all(want)
  if all(want):  # one step below the lowest block, if they differ
    lowest = want[0] * (0.8 if 'decay' in arguments else 1)
    found = updates[POSITIONS][0, 0] / unit
    np.testing.assert_allclose(found, lowest, rtol=1e-5)


def test_the_documents_example_is_the_recipes():
  page = pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'stages.md'
  blocks = re.findall(r'```python\n(.*?)```', page.read_text(), re.S)
  [example] = [b for b in blocks if 'layerwise' in b]
  config = types.SimpleNamespace()
  exec(example, {'config': config})
  recipe = simvq_siglip_l.get_config('stage=2,open=6,decay=0.8')
  assert config.schedules == config_lib.plain(recipe.schedules)
