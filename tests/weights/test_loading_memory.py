"""A sharded model is read block by block, each once."""

import jax
import numpy as np
import pytest

from vqrae_jax import sharding, weights


def test_a_block_is_read_once_for_all_its_replicas():
  """Each device's block alone, while replicas share one read."""
  mesh = sharding.make_mesh('fsdp')
  values = np.arange(48 * 16, dtype=np.float32).reshape(48, 16)
  asked = []

  def fetch(block):
    asked.append(block)
    return values[tuple(slice(*pair) for pair in block)]

  handle = weights.LazyArray(values.shape, values.dtype, fetch)
  source = weights.WeightFile('made', {'a': handle, 'b': handle})
  table = weights.Table((weights.Rule('a', 'x'), weights.Rule('b', 'y')))
  spec = jax.sharding.PartitionSpec

  def target(axes):
    place = jax.sharding.NamedSharding(mesh, spec(*axes))
    return jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=place)

  tree = {'x': target(('fsdp', None)), 'y': target((None, None))}
  found = weights.Pretrained(source, table, tree).load()
  for name, leaf in found.items():
    np.testing.assert_array_equal(leaf, values)
    assert leaf.sharding == tree[name].sharding
  assert len(asked) == 9
  assert {stop - start for (start, stop), _ in asked[:8]} == {6}


@pytest.mark.parametrize('rows', (1, 3, 4))
def test_chunks_make_the_whole(rows, monkeypatch):
  """Of any size, on shards, on all devices and on the default one."""
  from vqrae_jax.weights import load

  monkeypatch.setattr(load, 'CHUNK', rows * 16 * 4)
  values = np.arange(16 * 16, dtype=np.float32).reshape(16, 16)
  asked = []

  def fetch(block):
    asked.append(block[0])
    return values[tuple(slice(*pair) for pair in block)]

  handle = weights.LazyArray(values.shape, values.dtype, fetch)
  source = weights.WeightFile('made', {'a': handle})
  table = weights.Table((weights.Rule('a', 'x'),))
  mesh = sharding.make_mesh('fsdp', devices=jax.devices()[:2])
  for axes in (('fsdp', None), (None, 'fsdp'), (None, None)):
    spec = jax.sharding.PartitionSpec(*axes)
    place = jax.sharding.NamedSharding(mesh, spec)
    leaf = jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=place)
    found = weights.Pretrained(source, table, {'x': leaf}).load()['x']
    np.testing.assert_array_equal(found, values)
    assert found.sharding == place
  bare = jax.ShapeDtypeStruct(values.shape, values.dtype)
  asked.clear()
  found = weights.Pretrained(source, table, {'x': bare}).load_on_device()['x']
  np.testing.assert_array_equal(found, values)
  assert not found.committed
  assert max(stop - start for start, stop in asked) == (
    16 if rows == 4 else rows
  )
