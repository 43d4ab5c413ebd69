"""Placement is a pure function of names, shapes and mesh; all is claimed."""

import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests import tiny
from tests.golden import make_shardings as golden
from tests.train import pieces
from vqrae_jax import sharding
from vqrae_jax.errors import UserError
from vqrae_jax.losses import adversarial
from vqrae_jax.models.tokenizer import build_tokenizer, variable_shapes
from vqrae_jax.nn import discriminators
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import setup as setup_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.types import NetworkState

MIB = 2**20
placed = functools.cache(golden.placed)


@pytest.mark.parametrize(
  'layout, tensor, shape',
  [('dp', 1, (8, 1, 1)), ('fsdp', 1, (1, 8, 1)), ('fsdp+tp', 2, (1, 4, 2))],
)
def test_layouts(layout, tensor, shape):
  mesh = sharding.make_mesh(layout, tensor=tensor)
  assert tuple(mesh.shape.values()) == shape
  assert mesh.axis_names == ('data', 'fsdp', 'model')


@pytest.mark.parametrize('kind', ('fsq-cosmos', 'vq-ema', 'simvq-l2', 'none'))
def test_every_leaf_of_a_state_is_claimed(kind):
  """Optimizer state and averages lie where their parameter lies."""
  state, frozen, _ = pieces.planned(kind).abstract()
  mesh = sharding.make_mesh('fsdp+tp', tensor=2)
  places = trees.flatten(sharding.shardings_for((state, frozen), mesh))
  assert all(p.mesh == mesh for p in places.values())
  for name, place in places.items():
    if '/mu/' in name:
      mine = '0/tokenizer/params/' + name.split('/mu/')[1]
      assert place == places[mine]


@pytest.mark.parametrize('kind', tiny.FORMS)
def test_every_leaf_of_a_tokenizer_is_claimed(kind):
  mesh = sharding.make_mesh('fsdp')
  tokenizer = build_tokenizer(tiny.model(kind, post_quant=dict(kernel=3)))
  for name, leaf in variable_shapes(tokenizer).items():
    sharding.spec_for(name, leaf.shape, mesh)


@pytest.mark.parametrize('name', discriminators.DISCRIMINATORS)
def test_every_leaf_of_a_discriminator_is_claimed(name):
  """As its `NetworkState` holds them: parameters flat, vectors, averages."""
  model = discriminators.build(dict(name=name))
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  made = jax.eval_shape(model.init, jax.random.key(0), image)
  params = trees.flatten(made['params'])
  stats = dict(
    spectral=made.get('spectral', {}), lecam=adversarial.lecam_init()
  )
  state = NetworkState(params, optax.adamw(1e-3).init(params), stats)
  mesh = sharding.make_mesh('fsdp+tp', tensor=2)
  tree = dict(discriminator=state, backbone=made.get('backbone', {}))
  places = trees.flatten(sharding.shardings_for(tree, mesh))
  assert len(places) == len(jax.tree.leaves(tree))
  large = [n for n, leaf in params.items() if leaf.size > 2**16]
  for leaf in large:
    assert 'fsdp' in places[f'discriminator/params/{leaf}'].spec, leaf
  assert large


def test_specs():
  mesh = sharding.make_mesh('fsdp+tp', tensor=2)
  spec = functools.partial(sharding.spec_for, mesh=mesh)
  block = 'params/encoder/transformer/blocks'
  assert spec(f'{block}/attention/query/kernel', (2, 32, 64)) == P(
    None, 'fsdp', 'model'
  )
  assert spec(f'{block}/mlp/fc2/kernel', (2, 64, 32)) == P(
    None, 'model', 'fsdp'
  )
  assert spec(f'{block}/norm1/scale', (2, 32)) == P(None, None)
  assert spec('codebook/quantizer/codes', (64, 7)) == P('fsdp', None)
  # 6 is no multiple of 4 devices: whole on each.
  assert spec('codebook/quantizer/codes', (6, 7)) == P(None, None)
  with pytest.raises(UserError, match='no sharding rule claims'):
    spec('encoder/mystery', (3,))


def test_batches_lie_over_data_and_fsdp():
  mesh = sharding.make_mesh('fsdp+tp', tensor=2)
  batch = sharding.place_batch({'images': tiny.images(8)}, mesh)['images']
  assert batch.sharding.spec == P(('data', 'fsdp'))
  np.testing.assert_array_equal(batch, tiny.images(8))


def test_bad_meshes_say_what_is_right():
  with pytest.raises(UserError, match='did you mean "fsdp"'):
    sharding.make_mesh('fdsp')
  with pytest.raises(UserError, match='must divide the 8 devices'):
    sharding.make_mesh('fsdp+tp', tensor=3)


def test_activations_get_their_axes():
  """The rules reach the step: blocks' activations lie over the batch axes."""
  config = tiny.run('fsq-cosmos', mesh=dict(layout='fsdp'))
  made = setup_lib.setup(config_lib.read_config(config))
  with jax.set_mesh(made.mesh):
    shapes = state_lib.state_shapes(made.step, made.mesh)
    batch = made.place(made.batches.batch(0))
    step = made.train_step()
    text = step.lower(*shapes, setup_lib.f32(made.hparams), batch).as_text()
  lines = [x for x in text.split('\n') if 'sharding_constraint' in x]
  assert any('"data", "fsdp"' in x and '8x16x32' in x for x in lines), lines


@pytest.mark.parametrize('afresh', [True, False])
def test_no_program_for_many_cpus_comes_from_the_cache(afresh, tmp_path):
  """Read back, EMA-VQ's fsdp step aborted its process within 200 steps."""
  code = (
    'import jax, numpy as np\n'
    'from vqrae_jax import sharding\n'
    + 'sharding.compile_afresh_on_cpu()\n'
    * afresh
    + "x = sharding.place_batch({'x': np.ones((8, 4))}, sharding.make_mesh())\n"
    "assert jax.jit(lambda b: b['x'].sum())(x) == 32\n"
  )
  env = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  subprocess.run([sys.executable, '-c', code], env=env, check=True)
  assert any(tmp_path.iterdir()) != afresh


# -- three recipes on 8 devices (tests/golden/make_shardings.py) --------------
def test_tables_are_on_file():
  found = {recipe: golden.table(recipe) for recipe in golden.RECIPES}
  assert found == json.loads(golden.PATH.read_text())


@pytest.mark.parametrize('layout', golden.LAYOUTS)
@pytest.mark.parametrize('recipe', golden.RECIPES)
def test_each_device_holds_its_share(recipe, layout):
  """Moments and averages lie with their parameter; every large leaf is spread
  over all devices; with tensor parallelism, a leaf outside the blocks at least
  over the fsdp axis, 4 of the 8. The networks of image losses are replicated.
  """
  leaves = placed(recipe, layout)
  parameters = {n for n in leaves if n.startswith(golden.PARAMETERS)}
  beside = {n: f for n in leaves if (f := golden.parameter_of(n))}
  wanted = {(part, p) for part in ('mu', 'nu', 'ema') for p in parameters}
  assert set(beside.values()) == wanted and len(beside) == len(wanted)
  for name, (_, parameter) in beside.items():
    assert leaves[name].sharding == leaves[parameter].sharding, name
    assert leaves[name].shape == leaves[parameter].shape, name
  mine, total = 0, 0
  for name, leaf in leaves.items():
    if name.startswith('1/losses/'):
      continue
    size, share = golden.bytes_of(leaf), golden.bytes_per_device(leaf)
    mine, total = mine + share, total + size
    parts = 4 if layout == 'fsdp+tp' and '/blocks/' not in name else 8
    assert size <= MIB or share <= size / parts, name
  assert mine <= 1.1 * total / 8 + MIB
