"""The state of a run: made once, placed by the rules, nothing but arrays.

Trainable and frozen leaves part here and only here. What is frozen is an
argument of the step, never in the optimizer, the average or a checkpoint.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqrae_jax import optim, sharding
from vqrae_jax.errors import UserError
from vqrae_jax.losses import FROZEN_TERMS, IMAGE_TERMS, LATENT_TERMS
from vqrae_jax.models.tokenizer import Tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import networks
from vqrae_jax.train import initialize
from vqrae_jax.train.config import RunSpec
from vqrae_jax.train.gan import Adversary, make_adversary
from vqrae_jax.types import Frozen, NetworkState, TrainState


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is static about a run once shapes and lengths are known.

  Attributes:
    tokenizer: the module.
    shapes: {"params": …, "codebook": …} as ShapeDtypeStructs.
    trainable: names of the leaves that move.
    schedules: {leaf name: its schedule} of the trainable ones.
    optimizer: over {leaf name: leaf} of the trainable ones.
    rates: {leaf name: step -> learning rate}.
    weights: {loss name: step -> weight}.
    total_steps: the run's length.
    image_size: (h, w) of a training image.
    accumulate: parts that a step's batch is computed in.
    moves_codebook: whether the `codebook` collection follows its updates.
    teacher: whether a frozen encoder is distilled from.
    noise_tau: the noise on latents in training, at most; 0 for none.
    adversary: the second player, or None.
  """

  tokenizer: Tokenizer
  shapes: Any
  trainable: tuple[str, ...]
  schedules: dict[str, optim.Schedule]
  optimizer: optax.GradientTransformation
  rates: optim.Rates
  weights: dict[str, Any]
  total_steps: int
  image_size: tuple[int, int]
  ema: float
  usage_window: int
  accumulate: int
  moves_codebook: bool
  teacher: bool
  noise_tau: float
  adversary: Adversary | None

  @property
  def image_terms(self) -> list[str]:
    """The losses whose gradient is taken at the reconstruction."""
    return [n for n in self.weights if n in IMAGE_TERMS | FROZEN_TERMS]

  @property
  def networks(self) -> list[str]:
    """The losses that look through a frozen network."""
    return [n for n in self.weights if n in FROZEN_TERMS]

  @property
  def latent_terms(self) -> list[str]:
    """The losses that the forward carries."""
    return [n for n in self.weights if n in LATENT_TERMS]

  @property
  def leaves(self) -> dict[str, Any]:
    """{leaf name: shape} of all parameters, frozen ones too."""
    return trees.flatten(self.shapes['params'])

  @property
  def parts(self) -> set[tuple[Any, str]]:
    """(rate, "encoder" | "quantizer" | "decoder"), one of each kind."""
    return {(rate, name.split('/')[0]) for name, rate in self.rates.items()}


def _check_terms(names: list[str], tokenizer: Tokenizer) -> None:
  given = tokenizer.quantizer.loss_names
  for name in ('commit', 'codebook'):
    if name in names and name not in given:
      kind = type(tokenizer.quantizer).__name__
      has = f'it gives {", ".join(given)}' if given else 'it gives none'
      raise UserError(
        f'losses.{name}: the quantizer {kind} as configured has no such '
        f'loss ({has}); remove the term'
      )


def _check_window(window: int, tokenizer: Tokenizer) -> None:
  q = tokenizer.quantizer
  size = 4 * window * q.codes_per_token * q.codebook_size
  if size > 2**30:
    raise UserError(
      f'log.usage_window={window} steps of {q.codebook_size} counts take '
      f'{size / 2**30:.1f} GiB; shorten the window'
    )


def make_plan(
  spec: RunSpec, tokenizer: Tokenizer, steps_per_epoch: float | None
) -> Plan:
  """Checks a run's config against its model; touches no device memory.

  Raises:
    UserError: a loss the quantizer lacks, a schedule row that claims nothing,
      a leaf no row claims, an image size off the decoder's patch, nothing to
      train.
  """
  tokenizer.grid(*spec.data.size)
  terms = spec.terms()
  _check_terms(list(terms), tokenizer)
  image = jax.ShapeDtypeStruct((1, *spec.data.size, 3), jnp.float32)
  shapes = jax.eval_shape(tokenizer.init, jax.random.key(0), image)
  leaves = trees.flatten(shapes['params'])
  # A table that follows an average has no rate, but may be frozen too.
  tables = [f'quantizer/{n}' for n in tokenizer.quantizer.ema_tables]
  schedules = optim.match_schedules(spec.schedule_rows(), [*leaves, *tables])
  trainable = tuple(n for n in leaves if schedules[n] is not None)
  if not trainable:
    raise UserError('schedules freeze every leaf: there is nothing to train')
  total = optim.steps_of(spec.duration, steps_per_epoch, 'duration')
  epoch = ''
  if steps_per_epoch:
    epoch = (
      f'; one epoch is {steps_per_epoch:.3g} steps: batch_size='
      f'{spec.batch_size}, {steps_per_epoch * spec.batch_size:.0f} images'
    )
  if total < 1:
    raise UserError(f'duration={spec.duration!r} is less than one step{epoch}')
  every = [s for s in schedules.values() if s is not None]
  for schedule in dict.fromkeys(every):
    warmup = optim.steps_of(schedule.warmup, steps_per_epoch, 'warmup')
    if warmup >= total:
      raise UserError(
        f'schedules: warmup={schedule.warmup!r} leaves none of the {total} '
        f'steps of the run{epoch}'
      )
  for name, term in terms.items():
    if term.start_step(steps_per_epoch) >= total:
      raise UserError(
        f'losses.{name} starts at {term.start} {term.unit}, after the '
        f'{total} steps of the run'
      )
    if term.end_step(steps_per_epoch) > total:
      raise UserError(
        f'losses.{name} rises for {term.ramp} {term.unit}, past the {total} '
        'steps of the run: its weight would never be reached'
      )
  if (player := spec.discriminator) is not None:
    start = optim.steps_of(player.start, steps_per_epoch, 'discriminator.start')
    if start >= total:
      raise UserError(
        f'discriminator.start={player.start!r} lies after the {total} steps of '
        'the run; begin earlier, or lengthen duration'
      )
    if terms['gan'].start_step(steps_per_epoch) < start:
      raise UserError(
        f'losses.gan starts before discriminator.start={player.start!r}, which '
        'would still be random; let it start then or later'
      )
  aims = getattr(terms.get('distill'), 'target', None)
  opened = any(n.startswith('encoder/') for n in trainable)
  if aims == 'teacher' and not opened:
    raise UserError(
      'losses.distill holds an encoder that moves, and schedules freeze this '
      'one whole; open it, or leave the term out'
    )
  if aims == 'self' and not tokenizer.codebook_size:
    raise UserError(
      'losses.distill.target="self" draws codes to latents, and this quantizer '
      'has no codes; leave the term out'
    )
  _check_window(spec.log.usage_window, tokenizer)
  moving = {n: schedules[n] for n in trainable}
  optimizer, rates = optim.make_optimizer(
    spec.optim,
    moving,
    {n: leaves[n] for n in trainable},
    total,
    steps_per_epoch,
  )
  adversary = None
  if spec.discriminator is not None:
    adversary = make_adversary(
      spec.discriminator,
      terms['gan'],
      tokenizer.decoder_spec,
      total,
      steps_per_epoch,
    )
  return Plan(
    tokenizer=tokenizer,
    shapes=shapes,
    trainable=trainable,
    schedules=moving,
    optimizer=optimizer,
    rates=rates,
    weights={
      n: t.weight_at(steps_per_epoch) for n, t in terms.items() if n != 'gan'
    },
    total_steps=total,
    image_size=spec.data.size,
    ema=spec.ema,
    usage_window=spec.log.usage_window,
    accumulate=spec.accumulate,
    moves_codebook=any(schedules[n] is not None for n in tables),
    teacher=spec.teacher is not None,
    noise_tau=spec.noise_tau,
    adversary=adversary,
  )


def fresh_state(plan: Plan, seed: Any) -> tuple[TrainState, Frozen]:
  """The state at step 0 and the frozen leaves, from a seed; pure."""
  variables = initialize.from_seed(plan.tokenizer, seed)
  keep = set(plan.trainable)
  params, rest = trees.partition(variables['params'], keep.__contains__)
  quantizer = plan.tokenizer.quantizer
  ring = (
    plan.usage_window,
    quantizer.codes_per_token,
    quantizer.codebook_size,
  )
  discriminator = backbone = None
  if plan.adversary is not None:
    key = jax.random.fold_in(initialize.seed_keys(seed)[0], 1)
    image = jnp.zeros((1, *plan.image_size, 3))
    discriminator, backbone = plan.adversary.fresh(key, image)
  state = TrainState(
    step=jnp.zeros([], jnp.int32),
    tokenizer=NetworkState(params, plan.optimizer.init(params), {}),
    codebook=variables.get('codebook', {}),
    discriminator=discriminator,
    # A copy: both are donated, and a buffer may be donated once.
    ema=jax.tree.map(jnp.copy, params) if plan.ema else None,
    usage=jnp.zeros(ring, jnp.int32),
    rng=initialize.seed_keys(seed)[1],
  )
  teacher = None
  if plan.teacher:
    teacher = jax.tree.map(
      jnp.copy, {'encoder': variables['params']['encoder']}
    )
  # By its place in the table: a config's order changes nothing.
  seen_by = {
    term: networks.random(term, jax.random.fold_in(jax.random.key(seed), n))
    for n, term in enumerate(FROZEN_TERMS)
    if term in plan.networks
  }
  return state, Frozen(
    params=rest,
    losses=seen_by or None,
    teacher=teacher,
    discriminator=backbone or None,
  )


def abstract_state(plan: Plan, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
  """(state, frozen) as shapes with their places on the mesh."""
  shapes = jax.eval_shape(lambda: fresh_state(plan, 0))
  return jax.tree.map(
    lambda leaf, place: leaf.update(sharding=place),
    shapes,
    sharding.shardings_for(shapes, mesh),
  )


def init_state(
  plan: Plan,
  mesh: jax.sharding.Mesh,
  seed: int,
  given: Mapping[str, Any] | None = None,
) -> tuple[TrainState, Frozen]:
  """The state at step 0 and the frozen leaves, laid on the mesh.

  Args:
    plan: from `make_plan`.
    mesh: where they lie.
    seed: of every random weight and of the run's key.
    given: {"params/…", "codebook/…", or "teacher/…" and the other frozen
      trees: array} to begin with instead (`origin.py`).
  """
  places = sharding.shardings_for(
    jax.eval_shape(lambda: fresh_state(plan, seed)), mesh
  )
  fresh = jax.jit(functools.partial(fresh_state, plan), out_shardings=places)
  return with_leaves(*fresh(seed), given or {})


def _replaced(
  leaves: Mapping[str, jax.Array],
  prefix: str,
  given: Mapping[str, Any],
) -> dict[str, jax.Array]:
  """{leaf name: the given one where there is one, laid where the old lay}."""

  def placed(old, new):
    blocks = {}

    def block(index):
      at = tuple((s.start, s.stop) for s in index)
      if at not in blocks:  # replicas share one read
        blocks[at] = new[index]
      # A copy: states are donated, and what was given may be used again.
      return np.array(blocks[at], old.dtype)

    return jax.make_array_from_callback(old.shape, old.sharding, block)

  return {
    name: placed(leaf, given[prefix + name]) if prefix + name in given else leaf
    for name, leaf in leaves.items()
  }


def with_leaves(
  state: TrainState, frozen: Frozen, given: Mapping[str, Any]
) -> tuple[TrainState, Frozen]:
  """Both with the given leaves in place; the average begins at them too."""
  ema = state.ema
  if ema is not None:
    ema = _replaced(ema, 'params/', given)
  tables = _replaced(trees.flatten(state.codebook), 'codebook/', given)
  player = state.tokenizer
  params = _replaced(player.params, 'params/', given)
  state = state.replace(
    tokenizer=player.replace(params=params),
    ema=ema,
    codebook=trees.unflatten(tables),
  )
  params = _replaced(frozen.params, 'params/', given)
  others = {}
  for part in ('losses', 'teacher', 'discriminator'):
    if (tree := getattr(frozen, part)) is not None:
      leaves = _replaced(trees.flatten(tree), f'{part}/', given)
      others[part] = trees.unflatten(leaves)
  return state, frozen.replace(params=params, **others)


def variables_of(
  state: TrainState, frozen: Frozen, ema: bool = False
) -> dict[str, Any]:
  """The tokenizer's variables: trainable (or averaged) and frozen leaves.

  With `ema` the averaged weights where there are any; the codebook is always
  the live one.
  """
  params = state.tokenizer.params
  if ema and state.ema is not None:
    params = state.ema
  variables = {'params': trees.merge(params, frozen.params)}
  if state.codebook:
    variables['codebook'] = state.codebook
  return variables


def init_codebook(
  plan: Plan, state: TrainState, frozen: Frozen, images: jax.Array
) -> TrainState:
  """The state with its codebook set from the first batch of images; pure.

  Quantizers without data-dependent initialisation leave it as it is, and so
  does a schedule that freezes it.
  """
  quantizer = plan.tokenizer.quantizer
  held = quantizer.ema_tables and not plan.moves_codebook
  if 'quantizer' not in state.codebook or held:
    return state
  tokens = plan.tokenizer.apply(
    variables_of(state, frozen), images, method='project_to_code_space'
  )
  key = jax.random.fold_in(state.rng, 2**31 - 1)  # a step no run reaches
  codebook = quantizer.init_codebook(state.codebook['quantizer'], tokens, key)
  return state.replace(codebook=state.codebook | {'quantizer': codebook})
