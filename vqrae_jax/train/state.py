"""What a train step moves, and what is static about it.

Trainable and frozen leaves part here and only here. What is frozen is an
argument of the step, never in the optimizer, the EMA weights or a checkpoint.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax import optim, sharding
from vqrae_jax.losses import FROZEN_TERMS, IMAGE_TERMS, LATENT_TERMS
from vqrae_jax.models.tokenizer import Tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import networks
from vqrae_jax.specs import RunOptions
from vqrae_jax.train.gan import Gan
from vqrae_jax.types import (
  Frozen,
  LatentInputs,
  LossInputs,
  NetworkState,
  TrainState,
)


@dataclasses.dataclass(frozen=True)
class StepSpec:
  """The static part of a train step: what changes the program or the state.

  Hashable, so that equal specs share one compiled step; the numbers that a
  user tunes are the step's traced `hparams`.

  Attributes:
    tokenizer: the module.
    optimizer: over {leaf name: leaf} of the trainable leaves.
    losses: names of the losses, "gan" left out.
    other_losses: (name, "images" or "latents", function) of those of another
      package.
    image_size: (h, w) of a training image.
    accumulate: microbatches that a step's batch is computed in.
    ema: whether there are EMA weights.
    noise: whether noise is added to the latents.
    temperature: the decay of the Gumbel temperature, or None.
    teacher: whether latents are distilled from a frozen encoder.
    networks_run: how the losses' networks are run.
    usage_window: steps over which codes are counted.
    updates_codebook: whether the `codebook` collection follows its updates.
    gan: the discriminator and its losses, or None.
  """

  tokenizer: Tokenizer
  optimizer: optim.Optimizer
  losses: tuple[str, ...]
  other_losses: tuple[tuple[str, str, Callable[[Any], Any]], ...]
  image_size: tuple[int, int]
  accumulate: int
  ema: bool
  noise: bool
  temperature: str | None
  teacher: bool
  networks_run: RunOptions
  usage_window: int
  updates_codebook: bool
  gan: Gan | None

  @property
  def trainable(self) -> tuple[str, ...]:
    """Names of the leaves that the optimizer moves."""
    return tuple(name for name, *_ in self.optimizer.leaves)

  @property
  def trains_encoder(self) -> bool:
    """Whether any leaf of the encoder moves."""
    return any(name.startswith('encoder/') for name in self.trainable)

  def _terms(self, on: str, ours: Mapping[str, Any]) -> dict[str, Any]:
    known = dict(ours) | {n: fn for n, o, fn in self.other_losses if o == on}
    return {name: known[name] for name in self.losses if name in known}

  @property
  def image_losses(self) -> dict[str, Callable[[LossInputs], jax.Array]]:
    """The losses whose gradient is taken at the reconstruction."""
    return self._terms('images', IMAGE_TERMS | FROZEN_TERMS)

  @property
  def networks(self) -> list[str]:
    """The losses that look through a frozen network."""
    return [n for n in self.losses if n in FROZEN_TERMS]

  @property
  def latent_losses(self) -> dict[str, Callable[[LatentInputs], jax.Array]]:
    """The losses that are part of the forward pass."""
    return self._terms('latents', LATENT_TERMS)


def seed_keys(seed: Any) -> tuple[jax.Array, jax.Array]:
  """(the key of a run's random weights, the key of its steps)."""
  init_key, run_key = jax.random.split(jax.random.key(seed))
  return init_key, run_key


@functools.partial(jax.jit, static_argnums=0)  # traced once
def random_variables(tokenizer: Tokenizer, seed: Any) -> Any:
  """The variables of a run that starts from this seed alone; pure."""
  image = jnp.zeros((1, tokenizer.patch_size, tokenizer.patch_size, 3))
  return tokenizer.init(seed_keys(seed)[0], image)


def random_state(spec: StepSpec, seed: Any) -> tuple[TrainState, Frozen]:
  """The state at step 0 and the frozen leaves, from a seed; pure."""
  variables = random_variables(spec.tokenizer, seed)
  rest = trees.flatten(variables['params'])
  params = {name: rest.pop(name) for name in spec.trainable}
  quantizer = spec.tokenizer.quantizer
  discriminator = backbone = teacher = None
  if spec.gan is not None:
    key = jax.random.fold_in(seed_keys(seed)[0], 1)
    image = jnp.zeros((1, *spec.image_size, 3))
    discriminator, backbone = spec.gan.init(key, image)
  if spec.teacher:
    teacher = jax.tree.map(
      jnp.copy, {'encoder': variables['params']['encoder']}
    )
  # By its place in the table: a config's order changes nothing.
  loss_networks = {
    term: networks.random(term, jax.random.fold_in(jax.random.key(seed), n))
    for n, term in enumerate(FROZEN_TERMS)
    if term in spec.networks
  }
  state = TrainState(
    step=jnp.zeros([], jnp.int32),
    tokenizer=NetworkState(params, spec.optimizer.init(params), {}),
    codebook=variables.get('codebook', {}),
    discriminator=discriminator,
    # A copy: both are donated, and a buffer may be donated once.
    ema=jax.tree.map(jnp.copy, params) if spec.ema else None,
    usage=jnp.zeros(
      (spec.usage_window, quantizer.codes_per_token, quantizer.codebook_size),
      jnp.int32,
    ),
    rng=seed_keys(seed)[1],
  )
  return state, Frozen(
    params=rest,
    losses=loss_networks or None,
    teacher=teacher,
    discriminator=backbone or None,
  )


@functools.lru_cache(maxsize=64)
def state_shapes(spec: StepSpec, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
  """(state, frozen) as ShapeDtypeStructs with their shardings."""
  shapes = jax.eval_shape(lambda: random_state(spec, 0))
  return jax.tree.map(
    lambda leaf, place: leaf.update(sharding=place),
    shapes,
    sharding.shardings_for(shapes, mesh),
  )


def _brought(name: str) -> str:
  """The name by which weights from elsewhere bring a leaf of (state, frozen):
  "params/…", "codebook/…", "teacher/…" and so on; '' of one that none do."""
  name = re.sub('^0/(tokenizer/params|ema)/', '1/params/', name)
  name = re.sub('^0/codebook/', '1/codebook/', name)
  return name.removeprefix('1/') if name.startswith('1/') else ''


def _piece(name: str) -> str:
  """What a leaf of (state, frozen) is drawn with: its network; "zeros" of all
  that needs no draw."""
  where = _brought(name) or name.removeprefix('0/')
  if where.startswith('discriminator/'):
    return 'discriminator'
  return '/'.join(where.split('/')[:2]) if _brought(name) else 'zeros'


@functools.lru_cache(maxsize=64)
def _every_leaf(spec: StepSpec):
  return jax.jit(lambda seed: trees.flatten(random_state(spec, seed)))


@functools.lru_cache(maxsize=256)
def _compiled_piece(
  spec: StepSpec, mesh: jax.sharding.Mesh, names: tuple[str, ...]
):
  """seed -> {leaf name: array}, jitted, each leaf made where it lies."""
  shapes = trees.flatten(state_shapes(spec, mesh))

  def draw(seed):
    leaves = _every_leaf(spec)(seed)  # traced once for all pieces
    return {name: leaves[name] for name in names}

  name = _piece(names[0]).replace('/', '_')
  draw.__name__ = f'draw_{name}'  # for whoever lists programs
  return jax.jit(
    draw, out_shardings={name: shapes[name].sharding for name in names}
  )


def sharded_state(
  spec: StepSpec,
  mesh: jax.sharding.Mesh,
  seed: int,
  leaves: Mapping[str, Any] | None = None,
  tree: tuple[TrainState | None, Frozen] | None = None,
) -> tuple[TrainState | None, Frozen]:
  """The state at step 0 and the frozen leaves, laid on the mesh; a program
  draws those of each network.

  Args:
    spec: the step's.
    mesh: where they lie.
    seed: of every random weight and of the run's key.
    leaves: {"params/…", "codebook/…", or "teacher/…" and the other frozen
      trees: array} to start from instead (`initialize.py`); what they bring is
      not drawn.
    tree: the part of `state_shapes` that is wanted; None: all of it.
  """
  leaves, shapes = leaves or {}, state_shapes(spec, mesh)
  tree = tree or shapes
  pieces: dict[str, list[str]] = {}
  # Of the whole state, so that a run that resumes draws frozen leaves by the
  # programs that it started with: bitwise the same.
  for name in trees.flatten(shapes):
    if _brought(name) not in leaves:
      pieces.setdefault(_piece(name), []).append(name)
  wanted, drawn = trees.flatten(tree).keys(), {}
  for names in pieces.values():
    if not wanted.isdisjoint(names):
      drawn |= _compiled_piece(spec, mesh, tuple(names))(seed)
  tree = trees.map_named(lambda name, leaf: drawn.get(name, leaf), tree)
  return with_leaves(*tree, leaves)


def with_leaves(
  state: TrainState | None, frozen: Frozen, given: Mapping[str, Any]
) -> tuple[TrainState, Frozen]:
  """Both with the given leaves in place, laid where the old lie, which may be
  shapes with shardings; the EMA weights start at the given parameters too."""

  def replaced(name, old):
    if (name := _brought(name)) not in given:
      return old
    new = np.asarray(given[name])  # one read of a file's leaf

    def block(index):
      # A copy: states are donated, and what was given may be used again.
      return np.array(new[index], old.dtype)

    return jax.make_array_from_callback(old.shape, old.sharding, block)

  return trees.map_named(replaced, (state, frozen))


def variables_of(
  state: TrainState, frozen: Frozen, ema: bool = False
) -> dict[str, Any]:
  """The tokenizer's variables: trainable (or EMA) and frozen leaves.

  With `ema` the EMA weights where there are any; the codebook is always the
  live one.
  """
  params = state.tokenizer.params
  if ema and state.ema is not None:
    params = state.ema
  variables = {'params': trees.merge(params, frozen.params)}
  if state.codebook:
    variables['codebook'] = state.codebook
  return variables


def inits_codebook(spec: StepSpec, state: TrainState) -> bool:
  """Whether the first batch sets the codebook: there is one, and no schedule
  freezes it."""
  moves = spec.updates_codebook or not spec.tokenizer.quantizer.ema_tables
  return moves and 'quantizer' in state.codebook


def init_codebook(
  tokenizer: Tokenizer,
  variables: Mapping[str, Any],
  run_key: jax.Array,
  images: jax.Array,
) -> dict[str, Any]:
  """The collection "codebook" set from the first batch of images; pure.

  Quantizers without data-dependent initialisation leave it as it is.
  """
  tokens = tokenizer.apply(variables, images, method='project_to_code_space')
  key = jax.random.fold_in(run_key, 2**31 - 1)  # a step no run reaches
  old = variables['codebook']
  new = tokenizer.quantizer.init_codebook(old['quantizer'], tokens, key)
  return old | {'quantizer': new}
