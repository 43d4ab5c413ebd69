"""Placement is a pure function of names, shapes and mesh; all is claimed."""

import functools
import importlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests import tiny
from vqrae_jax import sharding
from vqrae_jax.errors import UserError
from vqrae_jax.losses import adversarial
from vqrae_jax.models.tokenizer import build_tokenizer, variable_shapes
from vqrae_jax.nn import discriminators
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import setup as setup_lib
from vqrae_jax.train import state as state_lib

MIB = 2**20


@pytest.mark.parametrize(
  'layout, tensor, shape',
  [('dp', 1, (8, 1, 1)), ('fsdp', 1, (1, 8, 1)), ('fsdp+tp', 2, (1, 4, 2))],
)
def test_layouts(layout, tensor, shape):
  mesh = sharding.make_mesh(layout, tensor=tensor)
  assert tuple(mesh.shape.values()) == shape
  assert mesh.axis_names == ('data', 'fsdp', 'model')


@pytest.mark.parametrize('kind', tiny.FORMS)
def test_every_leaf_of_a_tokenizer_is_claimed(kind, monkeypatch):
  """By a row of its own: the last is for leaves of other packages."""
  monkeypatch.setattr(sharding, 'PARAM_RULES', sharding.PARAM_RULES[:-1])
  mesh = sharding.make_mesh('fsdp')
  tokenizer = build_tokenizer(tiny.model(kind, post_quant=dict(kernel=3)))
  for name, leaf in variable_shapes(tokenizer).items():
    sharding.spec_for(name, leaf.shape, mesh)


@pytest.mark.parametrize('name', discriminators.DISCRIMINATORS)
def test_every_leaf_of_a_discriminator_is_claimed(name):
  """Large ones are spread, the backbone's among them."""
  model = discriminators.build(dict(name=name))
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  made = jax.eval_shape(model.init, jax.random.key(0), image)
  made = dict(made) | dict(lecam=adversarial.lecam_init())
  places = trees.flatten(
    sharding.shardings_for(made, sharding.make_mesh('fsdp'))
  )
  for leaf, shape in trees.flatten(made).items():
    assert shape.size <= 2**16 or 'fsdp' in places[leaf].spec, leaf


@pytest.mark.parametrize(
  'leaf, shape, spec',
  [
    ('encoder/blocks/mlp/gate/kernel', (2, 32, 64), P(None, 'fsdp', 'model')),
    ('encoder/mystery', (7, 7, 8, 16), P(None, None, 'fsdp', None)),
    # 6 is no multiple of 4 devices: whole on each.
    ('codebook/quantizer/codes', (6, 7), P(None, None)),
    ('codebook/latents/mean', (4, 4, 32), P(None, None, None)),
  ],
)
def test_specs(leaf, shape, spec):
  """Of leaves that the recipes below do not have."""
  mesh = sharding.make_mesh('fsdp+tp', tensor=2)
  assert sharding.spec_for(leaf, shape, mesh) == spec


def test_an_unknown_leaf_is_named():
  with pytest.raises(UserError, match='no sharding rule claims'):
    sharding.spec_for('decoder/mystery', (3,), sharding.make_mesh())


def test_batches_lie_over_data_and_fsdp():
  mesh = sharding.make_mesh('fsdp+tp', tensor=2)
  batch = sharding.place_batch({'images': tiny.images(8)}, mesh)['images']
  assert batch.sharding.spec == P(('data', 'fsdp'))
  np.testing.assert_array_equal(batch, tiny.images(8))


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


# -- three recipes on 8 devices ------------------------------------------------
RECIPES = ('simvq_siglip_l', 'vq_dinov2_b', 'fsq_cosmos_64k')
PARAMETERS = '0/tokenizer/params/'


@functools.cache
def placed(recipe, layout):
  """{leaf name: its shape with its sharding} of the state and the frozen."""
  mesh = sharding.make_mesh(layout, tensor=2 if 'tp' in layout else 1)
  module = importlib.import_module(f'configs.{recipe}')
  spec = config_lib.read_config(module.get_config())
  step, *_ = setup_lib.plan_step(spec, build_tokenizer(spec.model), 1000)
  return trees.flatten(state_lib.state_shapes(step, mesh))


def size(leaf, shape):
  """Bytes; a key counts as nothing."""
  key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return 0 if key else math.prod(shape) * leaf.dtype.itemsize


def words(leaf):
  axes = [*leaf.sharding.spec, *[None] * len(leaf.shape)][: len(leaf.shape)]
  return ' '.join(axis or '.' for axis in axes) or '-'


@pytest.mark.parametrize('recipe', RECIPES)
def test_every_leafs_place_is_on_file(recipe):
  """Type and shape, the spec of each layout; "." is a dimension that is not
  split. Moments and averages lie as their parameter does (the next test)."""
  golden = pathlib.Path(__file__).with_name('golden') / 'shardings.json'
  want = json.loads(golden.read_text())[recipe]
  one, two = placed(recipe, 'fsdp'), placed(recipe, 'fsdp+tp')
  found = {
    name: f'{leaf.dtype} {"x".join(map(str, leaf.shape)) or "scalar"}'
    f' | fsdp: {words(leaf)} | fsdp+tp: {words(two[name])}'
    for name, leaf in one.items()
    if not re.match(r'0/(tokenizer/opt_state/.*/(mu|nu)|ema)/', name)
  }
  assert found == {name: row.partition(' (+')[0] for name, row in want.items()}


@pytest.mark.parametrize('layout', ('fsdp', 'fsdp+tp'))
@pytest.mark.parametrize('recipe', RECIPES)
def test_each_device_holds_its_share(recipe, layout):
  """Moments and averages lie with their parameter; every large leaf is spread
  over all devices; with tensor parallelism, a leaf outside the blocks at least
  over the fsdp axis, 4 of the 8. The networks of image losses are replicated.
  """
  leaves = placed(recipe, layout)
  for name in leaves:
    if name.startswith(PARAMETERS):
      end = f'/{name.removeprefix(PARAMETERS)}'
      like = [x for n, x in leaves.items() if n[0] == '0' and n.endswith(end)]
      assert len(like) == 4, name  # and its average and two moments
      assert len({(x.shape, x.sharding) for x in like}) == 1, name
  mine, total = 0, 0
  for name, leaf in leaves.items():
    if name.startswith('1/losses/'):
      continue
    whole = size(leaf, leaf.shape)
    share = size(leaf, leaf.sharding.shard_shape(leaf.shape))
    mine, total = mine + share, total + whole
    parts = 4 if layout == 'fsdp+tp' and '/blocks/' not in name else 8
    assert whole <= MIB or share <= whole / parts, name
  assert mine <= 1.1 * total / 8 + MIB
