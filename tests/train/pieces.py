"""A tiny run in pieces: its plan, its state on a mesh, its jitted step."""

import functools
import hashlib
import json
import pathlib

import jax
import numpy as np
from flax import linen as nn

from tests import tiny
from vqrae_jax import sharding
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def planned(kind='fsq-cosmos', **keys):
  spec = config_lib.read_config(tiny.run(kind, **keys))
  return state_lib.make_plan(spec, build_tokenizer(spec.model), 1)


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


# {leaf: by how much it is made larger}. Fresh latents are nearly the same for
# every token, and few codes would occur; fresh reconstructions nearly flat.
APART = {'encoder/embed/positions': 50.0}
PAINTED = {'decoder/head/kernel': 5.0}


def started(plan, mesh=None, images=None, larger=None):
  """(state, frozen) at step 0, the codebook at tokens of `images`.

  Args:
    plan: from `planned`.
    mesh: where they lie; one device by default.
    images: the first batch.
    larger: {leaf name: factor}, of fresh weights.
  """
  mesh = mesh or one_device()
  images = tiny.images(8) if images is None else images
  with jax.set_mesh(mesh):
    state, frozen = state_lib.init_state(plan, mesh, 0)
    if larger:
      leaves = state.tokenizer.params | frozen.params
      wide = {
        f'params/{name}': np.asarray(leaves[name]) * factor
        for name, factor in larger.items()
      }
      state, frozen = state_lib.with_leaves(state, frozen, wide)
    begin = jax.jit(functools.partial(state_lib.init_codebook, plan))
    state = begin(state, frozen, images)
  return state, frozen


def jitted(plan):
  return jax.jit(functools.partial(step_lib.train_step, plan))


def jitted_on(plan, state, mesh, **options):
  """The step as a run compiles it: every leaf stays where the rules say."""

  def step(*args):
    with nn.logical_axis_rules(sharding.ACTIVATION_RULES):
      return step_lib.train_step(plan, *args)

  places = sharding.shardings_for(state, mesh)
  return jax.jit(step, out_shardings=(places, None), **options)


def host(tree):
  """{leaf name: numpy}, but for keys."""
  leaves = trees.flatten(tree).items()
  return {n: np.array(x) for n, x in leaves if n != 'rng'}


def edit_manifests(workdir, change):
  """Calls `change(manifest)` for each checkpoint, and hashes it again."""
  for path in workdir.glob('checkpoints/0*/_CHECKPOINT_METADATA'):
    told = json.loads(path.read_text())
    change(told['custom_metadata'])
    path.write_text(json.dumps(told))
    sums = path.with_name('sha256.0-of-1.json')
    hashed = hashlib.sha256(path.read_bytes()).hexdigest()
    sums.write_text(
      json.dumps(json.loads(sums.read_text()) | {path.name: hashed})
    )
