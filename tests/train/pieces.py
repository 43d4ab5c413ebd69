"""A tiny run in pieces: its static step, its numbers, its state on a mesh.

Steps whose static specs are equal share one compiled program, whatever their
numbers.
"""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import numpy as np

from tests import tiny
from vqrae_jax import sharding
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import setup as setup_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib

PATCH = dict(
  name='patch', fields=dict(hidden=8, halvings=2, groups=4, pool=0), lecam=0.01
)
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
GAN = dict(losses=dict(l2=1.0, gan=dict(weight=0.5)), discriminator=PATCH)


@dataclasses.dataclass(frozen=True)
class Pieces:
  """`setup`'s plan of a run without its data."""

  spec: state_lib.StepSpec
  numbers: Any  # on the host
  shapes: Any

  @property
  def hparams(self):
    return setup_lib.f32(self.numbers)

  def abstract(self):
    """(state, frozen, hparams) as shapes."""
    shapes = jax.eval_shape(lambda: state_lib.random_state(self.spec, 0))
    return *shapes, jax.eval_shape(lambda: self.hparams)

  def step(self, state, frozen, images):
    """(next state, metrics) of `train_step`, jitted."""
    step = _jitted(step_lib.train_step, self.spec)
    return step(state, frozen, self.hparams, images)

  def update_norms(self, state):
    """Of the update that led to `state`."""
    return _jitted(step_lib.update_norms, self.spec)(state, self.hparams)

  def gradients(self, state, frozen, images):
    """`loss_gradients` of uint8 images, jitted."""
    images = np.asarray(images, np.float32) / np.float32(255)
    ids = np.arange(len(images))
    gradients = _jitted(step_lib.loss_gradients, self.spec)
    return gradients(state, frozen, self.hparams, images, ids)


@functools.lru_cache(maxsize=192)
def _jitted(fn, spec):
  return jax.jit(functools.partial(fn, spec))


def planned(kind='fsq-cosmos', steps_per_epoch=1, **keys) -> Pieces:
  """The pieces of `tiny.run(kind, **keys)`."""
  config = config_lib.read_config(tiny.run(kind, **keys))
  spec, numbers, shapes, _ = setup_lib.plan_step(
    config, build_tokenizer(config.model), steps_per_epoch
  )
  return Pieces(spec, numbers, shapes)


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


# {leaf: by how much it is made larger}. Fresh latents are nearly the same for
# every token, and few codes would occur; fresh reconstructions nearly flat.
APART = {'encoder/embed/positions': 50.0}
CONTRAST = {'decoder/head/kernel': 5.0}


def drawn(spec, mesh):
  """(state, frozen) at step 0, about as `random_state` draws them
  (`tiny.draw`)."""
  rng, params = np.random.default_rng(0), {}

  def draw(name, leaf):
    if name.endswith('/rng'):
      return jax.random.key(0)
    if (held := name.removeprefix('0/ema/')) in params:
      return params[held]
    if '/opt_state/' in name:
      return np.zeros(leaf.shape, leaf.dtype)
    found = tiny.draw(rng, name, leaf)
    params[name.removeprefix('0/tokenizer/params/')] = found
    return found

  def placed(name, leaf):
    return jax.device_put(draw(name, leaf), leaf.sharding)

  return trees.map_named(placed, state_lib.state_shapes(spec, mesh))


def started(plan, mesh=None, larger=None, draw=drawn):
  """(state, frozen) at step 0, the codebook at tokens of images.

  Args:
    plan: from `planned`.
    mesh: where they lie; one device by default.
    larger: {leaf name: factor}, of fresh weights.
    draw: (spec, mesh) -> both before that.
  """
  mesh = mesh or one_device()
  with jax.set_mesh(mesh):
    state, frozen = draw(plan.spec, mesh)
    leaves = state.tokenizer.params | frozen.params
    wide = {
      f'params/{name}': np.asarray(leaves[name]) * factor
      for name, factor in (larger or {}).items()
    }
    state, frozen = state_lib.with_leaves(state, frozen, wide)
    if state_lib.inits_codebook(plan.spec, state):
      begin = _jitted(state_lib.init_codebook, plan.spec.tokenizer)
      variables = state_lib.variables_of(state, frozen)
      codebook = begin(variables, state.rng, tiny.images(8))
      state = state.replace(codebook=codebook)
    return state, frozen


def jitted_on(plan, state, mesh):
  """The step as a run compiles it: every leaf stays where the rules say."""
  step = functools.partial(step_lib.train_step, plan.spec)
  places = sharding.shardings_for(state, mesh)
  step = jax.jit(setup_lib.with_rules(step), out_shardings=(places, None))
  return lambda state, frozen, images: step(state, frozen, plan.hparams, images)


def host(tree):
  """{leaf name: numpy}, but for keys."""
  leaves = trees.flatten(tree).items()
  return {n: np.array(x) for n, x in leaves if n != 'rng'}


def moved(before, after):
  """Names of the leaves that are no longer the same, bit for bit."""
  before, after = host(before), host(after)
  return {n for n in before if before[n].tobytes() != after[n].tobytes()}


def assert_close(found, want, tolerance=1e-5, skip=('attention/key/bias',)):
  """Two {leaf: array} are equal to the scale of each leaf.

  Args:
    tolerance: of each leaf's largest value.
    skip: ends of names whose true gradient is zero: softmax does not see a
      bias of keys, and Adam makes ±1 of a rounding error.
  """
  assert found.keys() == want.keys()
  for name, leaf in want.items():
    if name.endswith(skip) or not leaf.size:
      continue
    if leaf.dtype == np.int32:
      np.testing.assert_array_equal(found[name], leaf, err_msg=name)
      continue
    scale = np.abs(leaf).max() + 1e-12
    np.testing.assert_allclose(
      found[name], leaf, rtol=0, atol=tolerance * scale, err_msg=name
    )


def edit_manifests(workdir, change):
  """Calls `change(manifest)` for each checkpoint, and hashes it again."""
  for path in workdir.glob('checkpoints/0*/_CHECKPOINT_METADATA'):
    found = json.loads(path.read_text())
    change(found['custom_metadata'])
    path.write_text(json.dumps(found))
    sums = path.with_name('sha256.0-of-1.json')
    hashed = hashlib.sha256(path.read_bytes()).hexdigest()
    sums.write_text(
      json.dumps(json.loads(sums.read_text()) | {path.name: hashed})
    )
