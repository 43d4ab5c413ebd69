"""Stage 2 of a run: from its config to everything static, checked.

`setup(config)` opens the data, builds the modules, the optimizers and the mesh,
and looks at shapes only. Whatever can be checked now is an error here, not
after days of training. Weights are loaded in the next stage (`initialize.py`).
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jax.experimental import multihost_utils

from vqrae_jax import export, optim, plugins, quantizers, sharding
from vqrae_jax.data.decode import EncodedImages
from vqrae_jax.data.pipeline import Augment, TrainBatches
from vqrae_jax.data.sources import open_source, spread
from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import evaluator
from vqrae_jax.losses import QUANTIZER_TERMS
from vqrae_jax.models.tokenizer import Tokenizer, build_tokenizer, describe
from vqrae_jax.nn import discriminators
from vqrae_jax.ops import trees
from vqrae_jax.quantizers.base import check_indices
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib
from vqrae_jax.train.gan import Gan
from vqrae_jax.train.state import StepSpec


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything static about a run but its data.

  Attributes:
    config: as `read_config` gives it.
    step: what is static about its train step.
    hparams: the step's numbers, Python numbers on the host; the step takes
      `f32(hparams)`.
    shapes: {"params": …, "codebook": …} as ShapeDtypeStructs.
    total_steps: the run's length.
    mesh: the devices.
  """

  config: config_lib.RunConfig
  step: StepSpec
  hparams: dict[str, Any]
  shapes: Any
  total_steps: int
  mesh: jax.sharding.Mesh

  @property
  def tokenizer(self) -> Tokenizer:
    """The module."""
    return self.step.tokenizer

  def rates_at(self, step: int, skipped: int = 0) -> dict[str, float]:
    """{"lr/PART": the highest rate} of encoder, quantizer, decoder, …,
    {"weight/LOSS": its weight}, "temperature" of a Gumbel quantizer.

    Args:
      step: completed steps before the one that is asked for.
      skipped: those of them that were skipped: no optimizer counts them.
    """
    numbers = f32(self.hparams)
    optimizer = self.step.optimizer
    now = optimizer.rates(numbers['optimizer'], step - skipped)
    rates: dict[str, float] = {}
    for name, index, _ in optimizer.leaves:
      part = f'lr/{name.split("/")[0]}'
      factors = numbers['optimizer']['schedules'][index].get('layers', 1.0)
      rate = float(now[index] * np.max(factors))
      rates[part] = max(rates.get(part, 0.0), rate)
    if self.step.temperature is not None:
      rates['temperature'] = float(
        optim.learning_rate(self.step.temperature, numbers['temperature'], step)
      )
    return rates | {
      f'weight/{name}': float(optim.loss_weight(loss, step))
      for name, loss in numbers['losses'].items()
    }

  def train_step(self) -> Callable:
    """(state, frozen, hparams, batch) -> (state, metrics), jitted for the
    mesh; equal step specs share it."""
    return _jitted_step(self.step, self.mesh)

  def update_norms(self) -> Callable:
    """(state, hparams) -> the norms of its last update, jitted; equal step
    specs share it."""
    return functools.partial(_update_norms, self.step)


@dataclasses.dataclass(frozen=True)
class Setup(Plan):
  """Everything static about a run.

  Attributes:
    source: the training images.
    held_out: the evaluation's images, or None.
    batches: sample i = f(seed, i).
  """

  source: EncodedImages
  held_out: EncodedImages | None
  batches: TrainBatches

  def identity(self) -> dict[str, Any]:
    """What must stay as it is when a run resumes: plain JSON."""
    config = self.config
    return {
      'seed': config.seed,
      'batch_size': config.batch_size,
      'images': len(self.source),
      'image_size': list(config.data.size)
      if len(config.data.sizes) == 1
      else [list(size) for size in config.data.sizes],
      'decoder': config.data.decoder,
      'model': json.loads(export.canonical_json(describe(self.tokenizer))),
    }

  def check_agreement(self) -> None:
    """All hosts have one run: else they would train on, each its own.

    Raises:
      UserError: on every host, with what they differ in.
    """
    if jax.process_count() == 1:
      return
    sources = [s for s in (self.source, self.held_out) if s is not None]
    config = dataclasses.asdict(self.config)
    for section in ('data', 'eval'):
      (config[section] or {}).pop('source', None)  # a disk of each host's own
    seen = {
      'settings': config,
      'images': [
        [len(s), *(s.name(i) for i in spread(len(s), 1000))] for s in sources
      ],
    }
    digests = [hashlib.sha256(repr(x).encode()).digest() for x in seen.values()]
    mine = np.stack([np.frombuffer(x, np.uint8) for x in digests])
    found = multihost_utils.process_allgather(mine)
    for i, what in enumerate(seen):
      others = np.flatnonzero((found[:, i] != found[0, i]).any(-1))
      if len(others):
        raise UserError(
          f'hosts {", ".join(map(str, others))} have other {what} than host 0 '
          f'(this is host {jax.process_index()}: {len(self.source)} images, '
          f'{self.total_steps} steps); start all with the same command on the '
          'same files'
        )

  def describe(self) -> str:
    """One line: what is trained, on what, where."""
    leaves = trees.flatten(self.shapes['params'])
    sizes = {name: math.prod(leaf.shape) for name, leaf in leaves.items()}
    trained = 0.0
    for name, index, _ in self.step.optimizer.leaves:
      moves = self.step.optimizer.schedules[index][1]
      trained += sizes[name] * (1 if moves is None else np.mean(moves))
    pixels = ', '.join(f'{h}x{w}' for h, w in self.config.data.sizes)
    k, q = self.tokenizer.codebook_size, self.tokenizer.quantizer
    codes = f' with {k} codes' if k else ''
    if q.codes_per_token > 1:
      codes = f' with {q.codes_per_token} x {k} codes'
    return (
      f'{sum(sizes.values()) / 1e6:.1f}M parameters, {trained / 1e6:.1f}M of '
      f'them trained, {type(q).__name__}{codes}, '
      f'{len(self.source)} images at {pixels}, batch {self.config.batch_size}, '
      f'{self.total_steps} steps on {self.mesh.size} '
      f'{jax.devices()[0].platform} device(s)'
    )

  def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's batch from `batches`, as the step takes it."""
    rows = {name: batch[name] for name in ('images', 'skipped')}
    return sharding.place_batch(rows, self.mesh)


def f32(hparams: optim.Numbers) -> Any:
  """The numbers as the step takes them: every one, or list of them that a
  schedule has for its blocks, one f32 array."""
  return jax.tree.map(
    lambda x: np.asarray(x, np.float32),
    dict(hparams),
    is_leaf=lambda x: isinstance(x, list) and not isinstance(x[0], dict),
  )


def with_rules(fn: Callable) -> Callable:
  """fn traced under the rules that give activations their mesh axes."""

  @functools.wraps(fn)
  def traced(*args):
    with nn.logical_axis_rules(sharding.ACTIVATION_RULES):
      return fn(*args)

  return traced


_update_norms = jax.jit(step_lib.update_norms, static_argnums=0)


@functools.lru_cache(maxsize=64)
def _jitted_step(spec: StepSpec, mesh: jax.sharding.Mesh) -> Callable:
  def step(state, frozen, hparams, batch):
    state, metrics = step_lib.train_step(
      spec, state, frozen, hparams, batch['images']
    )
    # Unreadable images over all hosts.
    metrics['skipped'] = batch['skipped'].sum()
    return state, metrics

  state, _ = state_lib.state_shapes(spec, mesh)
  return jax.jit(
    with_rules(step),
    out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
    donate_argnums=0,
  )


def setup(
  config: config_lib.RunConfig, mesh: jax.sharding.Mesh | None = None
) -> Setup:
  """Everything static about a run; shapes only, no device memory.

  Args:
    config: from `read_config`.
    mesh: the devices; all of them, in the config's layout, if None.

  Raises:
    UserError: as `plan`, or data that is not there.
  """
  config_lib.check_placeholders(config)
  tokenizer = _build_model(config)
  source = open_images(config, 'data')
  held_out = open_held_out(config, source)
  planned = _plan(config, tokenizer, len(source), mesh)
  data = config.data
  augments = [Augment(s, data.resize, data.crop, data.flip) for s in data.sizes]
  ample = max(augment.ample for augment in augments)
  batches = TrainBatches(
    source.decoded_by(data.decoder, ample),
    augments,
    batch_size=config.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  return Setup(
    **vars(planned), source=source, held_out=held_out, batches=batches
  )


def plan(
  config: config_lib.RunConfig,
  images: int,
  mesh: jax.sharding.Mesh | None = None,
) -> Plan:
  """`setup` without its data.

  Args:
    config: from `read_config`; placeholders may be left in it.
    images: of the source, where `data.examples` does not say; the length of
      an epoch.
    mesh: the devices, of any host; all of them, in the config's layout, if
      None.

  Raises:
    UserError: a model, losses or schedules that do not fit one another, a
      batch that does not divide over the devices, a leaf that no schedule
      claims or no loss reaches.
  """
  return _plan(config, _build_model(config), images, mesh)


def _build_model(config: config_lib.RunConfig) -> Tokenizer:
  """The module, checked against the config; opens no file."""
  tokenizer = build_tokenizer(config.model)
  config_lib.check_latents(config, tokenizer)
  if plugins.is_name(quantizers.name_of(tokenizer.quantizer)):
    check_indices(tokenizer.quantizer, 'model.quantizer')
  if warning := config_lib.config_warnings(config, tokenizer):
    logging.warning(warning)
  return tokenizer


def _plan(
  config: config_lib.RunConfig,
  tokenizer: Tokenizer,
  images: int,
  mesh: jax.sharding.Mesh | None,
) -> Plan:
  mesh = mesh or sharding.make_mesh(
    config.mesh.layout, tensor=config.mesh.tensor
  )
  sharding.check_batch(config.batch_size, mesh, config.accumulate)
  examples = config.data.examples or images
  step, hparams, shapes, total = plan_step(
    config, tokenizer, examples / config.batch_size
  )
  state = state_lib.state_shapes(step, mesh)
  for size in config.data.sizes:
    image = jax.ShapeDtypeStruct((config.batch_size, *size, 3), jnp.uint8)
    step_lib.check_reach(step, *state, f32(hparams), image)
  return Plan(config, step, hparams, shapes, total, mesh)


def open_images(config: config_lib.RunConfig, section: str) -> EncodedImages:
  """The images of "data" or "eval"."""
  spec = getattr(config, section)
  try:
    return open_source(spec.source, spec.include, spec.exclude)
  except UserError as e:
    keys = f'--config.{section}.source, .include, .exclude'
    raise UserError(f'{e} ({keys})') from None


def open_held_out(
  config: config_lib.RunConfig, source: EncodedImages
) -> EncodedImages | None:
  """The held-out images of a run that trains on `source`, looked at before
  training; None without `eval`."""
  if config.eval is None:
    return None
  held_out = open_images(config, 'eval')
  evaluator.check_tiles(held_out, config.eval.tile)
  if shared := held_out.shared_with(source):
    logging.warning(
      '%d of the %d held-out images are trained on too: leave them out with '
      'data.exclude, or choose others with eval.include',
      shared, len(held_out),
    )  # fmt: skip
  return held_out


def plan_step(
  config: config_lib.RunConfig, tokenizer: Tokenizer, steps_per_epoch: float
) -> tuple[StepSpec, dict[str, Any], Any, int]:
  """(the step's static spec, its numbers, the tokenizer's shapes, the run's
  steps), the config checked against the model.

  Raises:
    UserError: a loss the quantizer lacks, a schedule row that claims nothing,
      a leaf no row claims, an image size off the decoder's patch, nothing to
      train, a start after the end.
  """
  for size in config.data.sizes:
    tokenizer.index_shape(*size)
  shapes = jax.eval_shape(lambda: state_lib.random_variables(tokenizer, 0))
  leaves = trees.flatten(shapes['params'])
  # A table that follows an average has no rate, but may be frozen too.
  tables = [f'quantizer/{n}' for n in tokenizer.quantizer.ema_tables]
  schedules = trees.first_match(
    config.schedule_rows(), [*leaves, *tables], 'schedules'
  )
  trainable = {n: leaf for n, leaf in leaves.items() if schedules[n]}
  frozen = [name for name in tables if schedules[name] is None]
  if 0 < len(frozen) < len(tables):
    raise UserError(
      f'schedules freeze {", ".join(frozen)}, but {", ".join(tables)} are '
      'updated together: freeze all or none'
    )
  if not trainable:
    raise UserError('schedules freeze every leaf: there is nothing to train')
  total = optim.steps_of(config.duration, steps_per_epoch, 'duration')
  epoch = (
    f' (one epoch is {steps_per_epoch:.3g} steps: batch_size='
    f'{config.batch_size}, {steps_per_epoch * config.batch_size:.0f} images)'
  )
  if total < 1:
    raise UserError(f'duration={config.duration!r} is below one step{epoch}')
  terms = config.terms()
  _check_terms(terms, tokenizer, trainable)
  q = tokenizer.quantizer
  window = 4 * config.log.usage_window * q.codes_per_token * q.codebook_size
  if window > 2**30:
    raise UserError(
      f'log.usage_window={config.log.usage_window} steps of '
      f'{q.codes_per_token * q.codebook_size} counts take '
      f'{window / 2**30:.1f} GiB, more than 1; count fewer '
      'steps, or use fewer codes'
    )
  optimizer, numbers = optim.make_optimizer(
    config.optim, schedules, trainable, total, steps_per_epoch, epoch=epoch
  )
  hparams: dict[str, Any] = {'optimizer': numbers, 'losses': {}}
  for name, term in terms.items():
    start, ramp = term.steps(steps_per_epoch)
    if start >= total or start + ramp > total:
      raise UserError(
        f'losses.{name} starts at step {start} and reaches its weight at step '
        f'{start + ramp}, after the {total} steps of the run; lower start or '
        'ramp, or lengthen duration'
      )
    hparams['losses'][name] = dict(weight=term.weight, start=start, ramp=ramp)
  hparams |= {n: x for n in ('ema', 'noise_tau') if (x := getattr(config, n))}
  temperature = _temperature(config, tokenizer)
  if temperature is not None:
    over = temperature.duration
    if over is not None:
      over = optim.steps_of(over, steps_per_epoch, 'temperature.duration')
    hparams['temperature'] = dict(
      lr=temperature.start,
      end_lr=temperature.end,
      warmup=0,
      total=total if over is None else over,
    )
  gan = None
  if config.discriminator is not None:
    start = hparams['losses']['gan']['start']
    gan, hparams['discriminator'] = _plan_gan(
      config, tokenizer, start, total, steps_per_epoch, epoch
    )
  spec = StepSpec(
    tokenizer=tokenizer,
    optimizer=optimizer,
    losses=tuple(name for name in terms if name != 'gan'),
    other_losses=tuple(
      (name, term.on, term.load(name))
      for name, term in terms.items()
      if isinstance(term, config_lib.OtherTerm)
    ),
    image_size=config.data.size,
    accumulate=config.accumulate,
    ema=bool(config.ema),
    noise=bool(config.noise_tau),
    temperature=temperature and temperature.decay,
    teacher=config.teacher is not None,
    usage_window=config.log.usage_window,
    networks_run=config.networks.over(config.model),
    updates_codebook=len(frozen) < len(tables),
    gan=gan,
  )
  return spec, hparams, shapes, total


def _temperature(
  config: config_lib.RunConfig, tokenizer: Tokenizer
) -> config_lib.Temperature | None:
  """Of a Gumbel quantizer."""
  if isinstance(tokenizer.quantizer, quantizers.Gumbel):
    return config.temperature or config_lib.Temperature()
  if config.temperature is not None:
    raise UserError(
      'temperature is that of model.quantizer.name="gumbel", but the quantizer '
      f'is "{quantizers.name_of(tokenizer.quantizer)}"; remove it'
    )
  return None


def _check_terms(
  terms: Mapping[str, Any], tokenizer: Tokenizer, trainable: Mapping[str, Any]
) -> None:
  """The losses can be had from this quantizer and these schedules."""
  given = tokenizer.quantizer.loss_names
  for name in QUANTIZER_TERMS:
    if name in terms and name not in given:
      raise UserError(
        f'losses.{name}: the quantizer {type(tokenizer.quantizer).__name__} as '
        f'configured has no such loss (it has {", ".join(given) or "none"}); '
        'remove the term'
      )
  spec = tokenizer.features_spec
  has = ('deep', *['shallow'] * spec.shallow) if spec else ()
  for name in terms:
    section, _, feature = name.partition('/')
    if section == 'features' and feature not in has:
      raise UserError(
        f'losses.features.{feature} needs a model.feature_decoder that '
        f'predicts it (this one predicts: {", ".join(has) or "none"})'
      )
  target = getattr(terms.get('distill'), 'target', None)
  if target == 'teacher' and not any(
    name.startswith('encoder/') for name in trainable
  ):
    raise UserError(
      'losses.distill keeps a trained encoder near its teacher, and schedules '
      'freeze this encoder; train it, or remove the term'
    )
  if target == 'self' and not tokenizer.codebook_size:
    raise UserError(
      'losses.distill.target="self" draws codes to latents, and this quantizer '
      'has no codes; remove the term'
    )


def _plan_gan(
  config: config_lib.RunConfig,
  tokenizer: Tokenizer,
  loss_start: int,
  total: int,
  steps_per_epoch: float,
  epoch: str,
) -> tuple[Gan, dict[str, Any]]:
  """(what is static about the discriminator, its numbers)."""
  spec, term = config.discriminator, config.terms()['gan']
  start = optim.steps_of(spec.start, steps_per_epoch, 'discriminator.start')
  if loss_start < start:
    raise UserError(
      f'losses.gan starts at step {loss_start} of {total}, before '
      f'discriminator.start={spec.start!r}, with an untrained discriminator; '
      'start the loss later, or the discriminator earlier'
    )
  module = discriminators.build(
    {'name': spec.name, **spec.fields},
    run=config_lib.NetworksSpec().over(config.model),
  )
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), image)
  leaves = trees.flatten(shapes['params'])
  optimizer, numbers = optim.make_optimizer(
    spec.optim,
    dict.fromkeys(leaves, spec.schedule),
    leaves,
    total - start,
    steps_per_epoch,
    spec.updates,
    'discriminator.schedule',
    epoch,
  )
  gan = Gan(
    module=module,
    optimizer=optimizer,
    decoder=tokenizer.decoder_spec,
    loss=spec.loss,
    adaptive=term.adaptive,
    generator_waits=loss_start > 0,
    waits=start > 0,
    augment=spec.augment,
    cutout=spec.cutout,
    lecam=bool(spec.lecam),
    r1=bool(spec.r1),
  )
  numbers = {'start': start, 'optimizer': numbers}
  numbers |= {n: x for n in ('lecam', 'r1') if (x := getattr(spec, n))}
  return gan, numbers
