"""A run's config as frozen dataclasses: every key known, checked before use.

`read_config` turns the `ml_collections` config of a file in `configs/` into a
`RunSpec`; an unknown key fails with the nearest right name.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vqrae_jax import quantizers
from vqrae_jax.data.pipeline import CROPS, Augment
from vqrae_jax.errors import UserError, choose, did_you_mean
from vqrae_jax.losses import FROZEN_TERMS, IMAGE_TERMS, LATENT_TERMS
from vqrae_jax.losses.adversarial import D_LOSSES
from vqrae_jax.models import latents
from vqrae_jax.models import latents as latent_files
from vqrae_jax.models.tokenizer import Tokenizer
from vqrae_jax.optim import UNITS, AdamWConfig, Schedule, steps_of
from vqrae_jax.specs import build_spec

# ----------------------------------------------------------------------------
# A config's losses and its discriminator as frozen dataclasses.
#
# A loss is a weight and when it counts; two have more to say. The second player
# is a section of its own, since a run that has none builds none.

Duration = int | str
DISTILL_TARGETS = ('teacher', 'self')


@dataclasses.dataclass(frozen=True)
class LossTerm:
  """A weight, and when it counts.

  Attributes:
    weight: of the loss, from the ramp's end on.
    start: the step or epoch from which it counts.
    unit: "steps" or "epochs", of `start` and `ramp`.
    ramp: how long the weight rises, linearly, from zero.
  """

  weight: float
  start: int | float = 0
  unit: str = 'steps'
  ramp: int | float = 0

  def check(self, where: str) -> 'LossTerm':
    """Itself, if a run can have it.

    Args:
      where: its section of the config, for the errors.

    Raises:
      UserError: a weight that trains nothing, or no time to start.
    """
    if not 0 < self.weight < float('inf'):
      raise UserError(
        f'{where}.weight={self.weight} trains nothing; give a number above 0, '
        'or leave the term out'
      )
    if self.unit not in UNITS:
      raise UserError(
        f'{where}.unit={self.unit!r}{did_you_mean(self.unit, UNITS)}'
      )
    for name in ('start', 'ramp'):  # an epoch's length does not matter here
      steps_of(f'{getattr(self, name)} {self.unit}', 1, f'{where}.{name}')
    return self

  def start_step(self, steps_per_epoch: float | None) -> int:
    """The first step that counts."""
    return steps_of(f'{self.start} {self.unit}', steps_per_epoch, 'losses')

  def end_step(self, steps_per_epoch: float | None) -> int:
    """The step from which the weight is whole."""
    ramp = steps_of(f'{self.ramp} {self.unit}', steps_per_epoch, 'losses')
    return self.start_step(steps_per_epoch) + ramp

  def weight_at(self, steps_per_epoch: float | None):
    """step -> f32[]: zero before the start, whole when the ramp is over."""
    start = self.start_step(steps_per_epoch)
    ramp = self.end_step(steps_per_epoch) - start

    def at(step):
      if not ramp:
        return self.weight * (step >= start)
      return self.weight * jnp.clip((step - start + 1) / (ramp + 1), 0.0, 1.0)

    return at


@dataclasses.dataclass(frozen=True)
class DistillTerm(LossTerm):
  """`target`: "teacher", the latents of a frozen encoder (the config's
  `teacher` says which), or "self", those of the encoder as it is."""

  target: str = 'teacher'

  def check(self, where: str) -> LossTerm:
    if self.target not in DISTILL_TARGETS:
      near = did_you_mean(self.target, DISTILL_TARGETS)
      raise UserError(f'{where}.target={self.target!r}{near}')
    return super().check(where)


@dataclasses.dataclass(frozen=True)
class GanTerm(LossTerm):
  """`adaptive`: the weight is scaled so that, at the decoder's head, this
  loss's gradient is as long as that of the weighted image losses."""

  adaptive: bool = True


# Losses with more to say than a weight and a start.
TERMS = {'distill': DistillTerm, 'gan': GanTerm}


@dataclasses.dataclass(frozen=True)
class DiscriminatorSpec:
  """The second player.

  Attributes:
    name: "patch" or "dino" (`nn/discriminators.py`).
    fields: of that module.
    loss: "hinge", "non_saturating" or "vanilla", of both players.
    schedule: its learning rate, from its start to the run's end.
    optim: its own AdamW.
    start: a duration; before it the discriminator rests.
    updates: its updates in one step.
    augment: whether it sees images augmented at random (DiffAug).
    cutout: the share of each side that is cut out then; 0 for none.
    lecam: weight of LeCam's regulariser.
    r1: gamma of R1, the penalty on its gradient at real images.
  """

  name: str
  fields: Mapping = dataclasses.field(default_factory=dict, hash=False)
  loss: str = 'hinge'
  schedule: Schedule = Schedule(lr=2e-4)
  optim: AdamWConfig = AdamWConfig(b1=0.9, b2=0.95)
  start: Duration = 0
  updates: int = 1
  augment: bool = True
  cutout: float = 0.0
  lecam: float = 0.0
  r1: float = 0.0

  def __post_init__(self):
    choose(D_LOSSES, self.loss, 'discriminator.loss')
    if self.updates < 1:
      raise UserError(f'discriminator.updates={self.updates} must be above 0')
    if not (0 <= self.lecam < float('inf') and 0 <= self.r1 < float('inf')):
      raise UserError(
        f'discriminator.lecam={self.lecam} and discriminator.r1={self.r1} '
        'must be finite and must not be negative'
      )
    if not 0 <= self.cutout < 1:
      raise UserError(f'discriminator.cutout={self.cutout} must lie in [0, 1)')


NETWORKS = ('published', 'random')
INIT_PARTS = ('encoder', 'decoder', 'latents')  # from files of their own
INIT = 'init'  # the teacher that a run begins with


def _sides(value, length: int) -> bool:
  """Whether `value` is a positive whole number, or a tuple of `length`."""
  numbers = value if isinstance(value, tuple) else (value,) * length
  return len(numbers) == length and all(
    isinstance(n, int) and n > 0 for n in numbers
  )


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """What is trained on.

  Attributes:
    source: a DATA word (`data.sources.open_source`).
    image_size: pixels, or (h, w).
    include, exclude: globs of photographs' names.
    resize, crop, flip: as in `data.pipeline.Augment`.
    examples: the length of a source without one.
    max_skipped: the share of photographs that may be unreadable and are then
      replaced; more stop the run.
  """

  source: str
  image_size: int | tuple[int, int]
  include: tuple[str, ...] = ()
  exclude: tuple[str, ...] = ()
  resize: int | tuple[int, int] | None = None
  crop: str = 'random'
  flip: bool = True
  examples: int | None = None
  max_skipped: float = 0.01

  def __post_init__(self):
    if not 0 <= self.max_skipped <= 1:
      raise UserError(
        f'data.max_skipped={self.max_skipped} must be a share in [0, 1]'
      )
    if self.crop not in CROPS:
      raise UserError(
        f'data.crop={self.crop!r}{did_you_mean(self.crop, CROPS)}'
      )
    if not _sides(self.image_size, 2):
      raise UserError(
        f'data.image_size={self.image_size} must be pixels, or (h, w)'
      )
    if self.resize is not None and not (
      _sides(self.resize, 2)
      and (isinstance(self.resize, int) or self.resize[0] <= self.resize[1])
    ):
      raise UserError(
        f'data.resize={self.resize} must be pixels of the shorter side, or '
        '(lowest, highest)'
      )
    if self.examples is not None and self.examples < 1:
      raise UserError(f'data.examples={self.examples} must be above 0')

  @property
  def size(self) -> tuple[int, int]:
    """(h, w) of a training image."""
    s = self.image_size
    return s if isinstance(s, tuple) else (s, s)

  def augment(self) -> Augment:
    """The host-side half of this section."""
    return Augment(self.size, self.resize, self.crop, self.flip)


@dataclasses.dataclass(frozen=True)
class MeshSpec:
  """The layout's word, and the devices that share a block's width."""

  layout: str = 'dp'
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class LogSpec:
  """What is written, and how often.

  Attributes:
    every: steps between rows of metrics.jsonl, log lines and scalars.
    images_every: steps between grids of reconstructions, of held-out tiles
      if there are any, in workdir/pictures and TensorBoard; 0: none.
    usage_window: steps over which usage and perplexity are counted.
    tensorboard: write event files at all.
  """

  every: int = 50
  images_every: int = 1000
  usage_window: int = 100
  tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
  """Checkpoints in workdir/checkpoints.

  Attributes:
    every: steps between them; the last step always has one. 0: none at all,
      and the run starts over when it is started again.
    keep: how many of the newest stay.
  """

  every: int = 1000
  keep: int = 3

  def __post_init__(self):
    if self.every < 0 or self.keep < 1:
      raise UserError(
        f'checkpoint.every={self.every} must not be negative and '
        f'checkpoint.keep={self.keep} must be above 0'
      )


@dataclasses.dataclass(frozen=True)
class InitSpec:
  """Where parts of a new run's weights come from; None or "": its seed.

  Attributes:
    encoder: a published encoder: a row of the table, "hf:ORG/NAME[@REV]", a
      folder or a file; or that of a tokenizer's directory or a run.
    decoder: "rae:FILE", a published RAE decoder.
    latents: a file of latents' mean and var, where `model.latents` has a norm.
    networks: "published" or "random": the frozen networks that losses and the
      discriminator look through. Random features still tell images apart, but
      worse, and a run on them says so.
  """

  encoder: str | None = None
  decoder: str | None = None
  latents: str | None = None
  networks: str = 'published'

  def __post_init__(self):
    for part in INIT_PARTS:  # cleared on a command line
      if getattr(self, part) == '':
        object.__setattr__(self, part, None)
    if self.networks not in NETWORKS:
      near = did_you_mean(self.networks, NETWORKS)
      raise UserError(f'init.networks={self.networks!r}{near}')


@dataclasses.dataclass(frozen=True)
class EvalSpec:
  """The evaluation: held-out photographs cut into square tiles.

  Attributes:
    source: a DATA word; None or "": no evaluation, and pictures on the way are
      of training images. Tiles of all its photographs are held in memory.
    tile: pixels of a tile's side; None for the shorter one of
      `data.image_size`.
    include, exclude: globs of photographs' names.
    batch_size: tiles at once.
    every: steps between evaluations of the averaged weights; 0: at the end
      only, where it is the exported tokenizer that is measured.
  """

  source: str | None = None
  tile: int | None = None
  include: tuple[str, ...] = ()
  exclude: tuple[str, ...] = ()
  batch_size: int = 32
  every: int = 0

  def __post_init__(self):
    if self.every < 0:
      raise UserError(
        f'eval.every={self.every} must not be negative; 0 for the end only'
      )
    if (self.tile is not None and self.tile < 1) or self.batch_size < 1:
      raise UserError(
        f'eval.tile={self.tile} and eval.batch_size={self.batch_size} must be '
        'above 0'
      )


@dataclasses.dataclass(frozen=True)
class RunSpec:
  """A whole run.

  Attributes:
    model: `build_tokenizer`'s mapping.
    losses: {term: weight or LossTerm fields}.
    schedules: rows (regex, None or Schedule fields).
    duration: "30 epochs", "2000 steps" or a number of steps.
    batch_size: B, images of one optimizer step over all hosts.
    accumulate: micro-batches that a step's batch is computed in, one after
      another; the result is that of the whole batch.
    ema: decay of the weights' moving average; 0 for none.
    noise_tau: noise on latents in training, U[0, tau) x N(0, 1), one U a
      sample, before they are normalised and quantised; .8 for RAE, 0 for
      discrete tokens.
    init_from: a run's workdir or a tokenizer's directory whose weights the
      run begins with; its optimizer and step count begin anew.
    init: parts of the weights from elsewhere.
    teacher: the frozen encoder that losses.distill keeps to: "init", the one
      that this run begins with (from `init_from` or `init.encoder`), or a
      published encoder as in `init.encoder`.
    discriminator: the second player, where losses.gan asks for one.
    max_nonfinite: steps in a row that are left out, their losses or gradients
      being no number, before the run stops.
  """

  model: Mapping
  data: DataSpec
  losses: Mapping
  schedules: tuple
  duration: Duration
  batch_size: int
  accumulate: int = 1
  seed: int = 0
  optim: AdamWConfig = AdamWConfig()
  ema: float = 0.999
  noise_tau: float = 0.0
  init_from: str | None = None
  init: InitSpec = InitSpec()
  teacher: str | None = None
  discriminator: DiscriminatorSpec | None = None
  mesh: MeshSpec = MeshSpec()
  log: LogSpec = LogSpec()
  checkpoint: CheckpointSpec = CheckpointSpec()
  eval: EvalSpec | None = None
  max_nonfinite: int = 10

  def __post_init__(self):
    if self.accumulate < 1:
      raise UserError(f'accumulate={self.accumulate} must be above 0')
    if self.max_nonfinite < 0:
      raise UserError(
        f'max_nonfinite={self.max_nonfinite} must not be negative; 0 stops at '
        'the first'
      )
    for word in ('init_from', 'teacher'):  # cleared on a command line
      if getattr(self, word) == '':
        object.__setattr__(self, word, None)
    for part in INIT_PARTS:
      if self.init_from is not None and getattr(self.init, part) is not None:
        raise UserError(
          f'init_from brings a whole tokenizer, so init.{part} has no place; '
          f'give one of the two (--config.init.{part}= clears it)'
        )
    if self.eval is not None:
      object.__setattr__(self, 'eval', self._evaluation(self.eval))
    if self.batch_size < 1:
      raise UserError(f'batch_size={self.batch_size} must be above 0')
    if not 0 <= self.seed < 2**31:
      raise UserError(f'seed={self.seed} must lie in [0, 2147483648)')
    if not 0 <= self.ema < 1:
      raise UserError(f'ema={self.ema} must lie in [0, 1)')
    if not 0 <= self.noise_tau < math.inf:
      raise UserError(
        f'noise_tau={self.noise_tau} must be finite and not negative; 0 for '
        'none'
      )
    if self.log.every < 1 or self.log.usage_window < 1:
      raise UserError('log.every and log.usage_window must be above 0')
    if self.log.images_every < 0:
      raise UserError(
        f'log.images_every={self.log.images_every} must not be negative; 0 '
        'for no pictures'
      )

  def _evaluation(self, given: EvalSpec) -> EvalSpec | None:
    if not given.source:
      if given.every:
        raise UserError(
          f'eval.every={given.every} has nothing to measure: name held-out '
          'photographs in eval.source, or set eval.every=0'
        )
      return None
    tile = given.tile or min(self.data.size)
    return dataclasses.replace(given, tile=tile)

  def terms(self) -> dict[str, LossTerm]:
    """{name: LossTerm}, names checked against the loss tables."""
    known = [*IMAGE_TERMS, *FROZEN_TERMS, *LATENT_TERMS, 'gan']
    terms: dict[str, LossTerm] = {}
    for name, value in self.losses.items():
      if name not in known:
        raise UserError(f'unknown loss "{name}"{did_you_mean(name, known)}')
      if not isinstance(value, Mapping):
        value = {'weight': value}
      kind = TERMS.get(name, LossTerm)
      where = f'losses.{name}'
      terms[name] = build_spec(kind, value, where).check(where)
    if not terms:
      raise UserError(f'losses is empty; there are: {", ".join(known)}')
    self._check_teacher(terms.get('distill'))
    self._check_gan(terms)
    return terms

  def _check_gan(self, terms: Mapping[str, LossTerm]) -> None:
    gan = terms.get('gan')
    if (gan is None) != (self.discriminator is None):
      raise UserError(
        'losses.gan wants a discriminator: add discriminator=dict(name="patch")'
        if gan
        else f'discriminator={self.discriminator.name} has no losses.gan to '
        'learn for; add that, or set discriminator=None'
      )
    image = [*IMAGE_TERMS, *FROZEN_TERMS]
    if gan and gan.adaptive and not any(n in image for n in terms):
      raise UserError(
        'losses.gan is adaptive, and there is no image loss to balance it '
        f'against; add one ({", ".join(image)}) or set '
        'losses.gan.adaptive=False'
      )

  def _check_teacher(self, distill: DistillTerm | None) -> None:
    wanted = distill is not None and distill.target == 'teacher'
    if wanted and not self.teacher:
      raise UserError(
        'losses.distill has the target "teacher", and there is none: set '
        'teacher="init" (the encoder that this run begins with), to a '
        'published encoder, or losses.distill.target="self"'
      )
    if self.teacher and not wanted:
      raise UserError(
        f'teacher={self.teacher} has nothing to teach: add losses.distill with '
        'the target "teacher", or remove it'
      )
    if self.teacher == INIT and not (self.init_from or self.init.encoder):
      raise UserError(
        'teacher="init" would be a random encoder: set init_from or '
        'init.encoder, or name a published encoder'
      )

  def schedule_rows(self) -> list[tuple[str, Schedule | None]]:
    """The rows of `schedules`, checked."""
    rows = []
    for row in self.schedules:
      if not isinstance(row, tuple) or len(row) != 2:
        raise UserError(f'schedules row {row!r} must be (regex, schedule)')
      pattern, fields = row
      if not isinstance(pattern, str):
        raise UserError(f'schedules row {row!r}: {pattern!r} is no regex')
      if fields is not None and not isinstance(fields, Mapping):
        raise UserError(
          f'schedules["{pattern}"]={fields!r} must be None or dict(lr=…)'
        )
      if fields is not None:
        fields = build_spec(Schedule, fields, f'schedules["{pattern}"]')
      rows.append((pattern, fields))
    return rows


def plain(config: Any) -> Any:
  """ConfigDicts, lists and tuples as dicts and tuples, all the way down."""
  if hasattr(config, 'to_dict'):
    config = config.to_dict()
  if isinstance(config, Mapping):
    return {k: plain(v) for k, v in config.items()}
  if isinstance(config, list | tuple):
    return tuple(plain(v) for v in config)
  return config


def read_config(config: Any) -> RunSpec:
  """A ConfigDict (or mapping) as a `RunSpec`.

  Raises:
    UserError: an unknown, missing, mistyped or impossible key.
  """
  spec = build_spec(RunSpec, plain(config), 'config')
  spec.terms(), spec.schedule_rows()
  return spec


# ----------------------------------------------------------------------------
# Values that are usual, so that an unusual one is noticed once, not refused.
#
# The ranges are those that the tokenizers' own documentation gives (decay,
# commitment) or that papers tried (codes, up to 65,536); around an epsilon two
# powers of ten, and below commitment's .1 two for SimVQ, which may want it while
# the encoder is frozen (`docs/results.md`). `docs/from_pytorch.md` shows the same
# table, and a test holds the two equal. What cannot work at all is an error where
# it is built.

RANGES: dict[str, dict[str, tuple[float, float]]] = {
  'vq': {
    'num_codes': (512, 65536),
    'decay': (0.95, 0.999),
    'epsilon': (1e-7, 1e-3),
  },
  'simvq': {'num_codes': (512, 65536)},
  'fsq': {'epsilon': (1e-5, 1e-1)},
  'losses': {'commit': (0.1, 0.5)},
}
LOWER = {'simvq': {'commit': 0.001}}


def unusual(spec: RunSpec, tokenizer: Tokenizer) -> str | None:
  """One line that names every value outside its usual range, or None."""
  name = quantizers.name_of(tokenizer.quantizer)
  found = [
    (f'model.quantizer.{field}', getattr(tokenizer.quantizer, field), usual)
    for field, usual in RANGES.get(name, {}).items()
  ]
  found += [
    (f'losses.{term}', value.weight, (LOWER.get(name, {}).get(term, low), high))
    for term, value in spec.terms().items()
    for low, high in [RANGES['losses'].get(term, (0, math.inf))]
  ]
  if tokenizer.codebook_size:  # noise teaches continuous decoders to forgive
    found.append(('noise_tau', spec.noise_tau, (0, 0)))
  odd = [
    f'{key}={value:g} (usually {low:g}{f" to {high:g}" if high > low else ""})'
    for key, value, (low, high) in found
    if not low <= value <= high
  ]
  return f'unusual: {", ".join(odd)}' if odd else None


# ----------------------------------------------------------------------------
# Statistics of latents as a run's config names them: `init.latents`.
#
# They go with `model.latents` or not at all, and a run that begins from another
# tokenizer (`init_from`) has them from there. What they do is in
# `models/latents.py`, how a file of them is read in `models/latent_files.py`.


def check(spec: RunSpec, tokenizer: Tokenizer) -> None:
  """Model, data and `init.latents` agree; opens no file.

  Raises:
    UserError: a norm without statistics, statistics without a norm, or a
      grid of tokens that they are not of.
  """
  given, norm = spec.init.latents, tokenizer.latents_spec
  if norm.norm == 'none':
    if given is not None:
      raise UserError(
        f'init.latents={given} has no place: set model.latents='
        'dict(norm="channel") or "position", or remove it'
      )
    return
  if given is None and spec.init_from is None:
    flag = ' --position' if norm.grid else ''
    raise UserError(
      f'model.latents.norm="{norm.norm}" needs statistics: '
      f'{latent_files.COMMAND} --config=… --data=… --out=stats.npz{flag} '
      'computes them for --config.init.latents=stats.npz; or begin with '
      'init_from'
    )
  latents.check_grid(norm, tokenizer.grid(*spec.data.size), 'data.image_size')
  if spec.eval is not None:
    tile = spec.eval.tile
    latents.check_grid(norm, tokenizer.grid(tile, tile), 'eval.tile')
