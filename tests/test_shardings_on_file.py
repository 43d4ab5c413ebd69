"""Where the leaves of three recipes lie on 8 devices; no large one is whole."""

import functools
import json

import pytest

from tests.golden import make_shardings as golden

MIB = 2**20
placed = functools.cache(golden.placed)


def test_tables_are_on_file():
  found = {recipe: golden.table(recipe) for recipe in golden.RECIPES}
  assert found == json.loads(golden.PATH.read_text())


@pytest.mark.parametrize('layout', golden.LAYOUTS)
@pytest.mark.parametrize('recipe', golden.RECIPES)
def test_moments_and_averages_lie_with_their_parameter(recipe, layout):
  leaves = placed(recipe, layout)
  parameters = {n for n in leaves if n.startswith(golden.PARAMETERS)}
  beside = {n: f for n in leaves if (f := golden.parameter_of(n))}
  wanted = {(part, p) for part in ('mu', 'nu', 'ema') for p in parameters}
  assert set(beside.values()) == wanted and len(beside) == len(wanted)
  for name, (_, parameter) in beside.items():
    assert leaves[name].sharding == leaves[parameter].sharding, name
    assert leaves[name].shape == leaves[parameter].shape, name


@pytest.mark.parametrize('layout', golden.LAYOUTS)
@pytest.mark.parametrize('recipe', golden.RECIPES)
def test_a_device_holds_its_share(recipe, layout):
  """Every large leaf is spread over all devices; with tensor parallelism, a
  leaf outside the blocks at least over the fsdp axis, 4 of the 8. The networks
  of image losses are whole everywhere, as their rule says."""
  leaves = {
    name: leaf
    for name, leaf in placed(recipe, layout).items()
    if not name.startswith('1/losses/')
  }
  for name, leaf in leaves.items():
    if golden.bytes_of(leaf) > MIB:
      parts = 4 if layout == 'fsdp+tp' and '/blocks/' not in name else 8
      share = golden.bytes_of(leaf) / parts
      assert golden.bytes_per_device(leaf) <= share, name
  whole = sum(map(golden.bytes_of, leaves.values()))
  mine = sum(map(golden.bytes_per_device, leaves.values()))
  assert mine <= 1.1 * whole / 8 + MIB
