"""A run's config as frozen dataclasses: every key known, checked before use.

`read_config` turns the `ml_collections` config of a file in `configs/` into a
`RunConfig`. It opens no file; all errors that need none are raised here.

The reference of the documentation is made of the "Attributes" of these classes
and of those of a model. An entry ends in the values that the field takes:
"At least 1 step.", "Above 0.", "In [0, 1).", "Any number.", "One of …"; "Each"
before them speaks of a tuple's elements, ", or None" after them adds None.
"""

import dataclasses
import json
import math
import operator
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from vqrae_jax import plugins, quantizers
from vqrae_jax.data.decode import DECODERS
from vqrae_jax.data.pipeline import CROPS
from vqrae_jax.errors import UserError, choose, did_you_mean
from vqrae_jax.evaluate.metrics import METRICS
from vqrae_jax.losses import FROZEN_TERMS, IMAGE_TERMS, LATENT_TERMS
from vqrae_jax.losses.adversarial import D_LOSSES
from vqrae_jax.models import latents
from vqrae_jax.models.tokenizer import Tokenizer
from vqrae_jax.nn.discriminators import DISCRIMINATORS
from vqrae_jax.nn.vgg import MIN_SIDE
from vqrae_jax.ops import trees
from vqrae_jax.optim import DECAYS, UNITS, AdamWConfig, Schedule, steps_of
from vqrae_jax.quantizers import base, nested
from vqrae_jax.sharding import LAYOUTS
from vqrae_jax.specs import (
  DTYPES,
  RunOptions,
  at_least,
  build_spec,
  check_missing,
  missing_keys,
  one_of,
)

Duration = int | str
DISTILL_TARGETS = ('teacher', 'self')
NETWORKS = ('published', 'random')
INIT_PARTS = ('encoder', 'decoder', 'latents')  # from files of their own
INIT = 'init'  # the teacher is the encoder that the run starts with
# What recipes write where the user must fill in a name.
PLACEHOLDERS = {
  'init_from': ('RUN', 'runs/NAME, the workdir of a finished run'),
  'init.encoder': ('RUN', 'runs/NAME, the workdir of a finished run'),
  'data.source': ('FOLDER', 'the images to train on'),
}


def _cleared_as_none(spec: Any, *names: str) -> None:
  """Sets fields that a command line cleared to None: --config.teacher=, or
  =None, which is a string there."""
  for name in names:
    if getattr(spec, name) in ('', 'None'):
      object.__setattr__(spec, name, None)


@dataclasses.dataclass(frozen=True)
class LossTerm:
  """A loss's weight, and when it is applied.

  Attributes:
    weight: of the loss, from the ramp's end on; a loss given as a plain number
      has that weight and the other defaults. Above 0.
    start: the step or epoch from which it is applied. At least 0 `unit`.
    unit: of `start` and `ramp`. One of "steps", "epochs".
    ramp: how long the weight rises, linearly, from zero. At least 0 `unit`.
  """

  weight: float
  start: int | float = 0
  unit: str = 'steps'
  ramp: int | float = 0

  def __post_init__(self):
    if self.weight <= 0:
      raise UserError(f'weight={self.weight} must be above 0, or left out')
    one_of('unit', self.unit, UNITS)
    self.steps(1)  # an epoch's length does not matter to the checks

  def steps(self, steps_per_epoch: float) -> tuple[int, int]:
    """(the first step at which it is applied, the ramp's length in steps)."""
    start, ramp = (
      steps_of(f'{value} {self.unit}', steps_per_epoch, name)
      for name, value in (('start', self.start), ('ramp', self.ramp))
    )
    return start, ramp


@dataclasses.dataclass(frozen=True)
class DistillTerm(LossTerm):
  """The loss that keeps latents from drifting.

  Attributes:
    target: what they are kept near: the latents of a frozen encoder, which the
      config's `teacher` names, or those of the encoder being trained. One of
      "teacher", "self".
  """

  target: str = 'teacher'

  def __post_init__(self):
    one_of('target', self.target, DISTILL_TARGETS)
    super().__post_init__()


@dataclasses.dataclass(frozen=True)
class GanTerm(LossTerm):
  """The adversarial loss.

  Attributes:
    adaptive: whether the weight is scaled so that, at the decoder's head, the
      gradient of this loss has the same norm as that of the weighted image
      losses.
  """

  adaptive: bool = True


@dataclasses.dataclass(frozen=True)
class OtherTerm(LossTerm):
  """A loss from another package, under a name that the config chooses.

  Attributes:
    fn: "package.module:function", which returns f32[] and has no weights.
    on: its argument: a `LossInputs` of images or a `LatentInputs`
      (`types.py`). One of "images", "latents".
  """

  fn: str = ''
  on: str = 'images'

  def __post_init__(self):
    one_of('on', self.on, ('images', 'latents'))
    if not plugins.is_name(self.fn):
      raise UserError(f'fn={self.fn!r} must be "package.module:function"')
    super().__post_init__()

  def load(self, name: str) -> Callable[[Any], Any]:
    """The function, imported. `name` is the loss's, for the errors."""
    found = plugins.load(self.fn, f'losses.{name}.fn')
    if not callable(found) or isinstance(found, type):
      raise UserError(f'losses.{name}.fn="{self.fn}" is no function')
    return found


# Losses with more fields than a weight and a start.
TERMS = {'distill': DistillTerm, 'gan': GanTerm}


@dataclasses.dataclass(frozen=True)
class DiscriminatorSpec:
  """The discriminator of `losses.gan`; a section of its own, since a run
  without one builds none.

  Attributes:
    name: the network: a PatchGAN, or heads on a frozen DINO ViT-S/8. One of
      "patch", "dino".
    fields: of that network.
    loss: the adversarial loss, for discriminator and decoder. One of "hinge",
      "non_saturating", "vanilla".
    schedule: its learning rate, from its start to the run's end.
    optim: its own AdamW.
    start: "6 epochs", "2000 steps" or a number of steps; before it the
      discriminator is not updated. At least 0 steps.
    updates: how many updates it makes per step. At least 1.
    augment: whether its images are randomly augmented (DiffAug).
    cutout: with `augment`, the share of each side that is cut out; 0 for none.
      In [0, 1).
    lecam: weight of LeCam's regulariser; 0 for none. At least 0.
    r1: gamma of R1, the penalty on its gradient at real images; 0 for none. At
      least 0.
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
    choose(DISCRIMINATORS, self.name, 'discriminator.name')
    choose(D_LOSSES, self.loss, 'discriminator.loss')
    if 'name' in self.fields:
      raise UserError('discriminator.fields.name is "discriminator.name"')
    steps_of(self.start, 1, 'discriminator.start')
    at_least(1, 'discriminator.', self, 'updates')
    at_least(0, 'discriminator.', self, 'lecam', 'r1')
    if not 0 <= self.cutout < 1:
      raise UserError(f'discriminator.cutout={self.cutout} must lie in [0, 1)')


def _sides(value: int | tuple[int, ...]) -> bool:
  """Whether `value` is a positive whole number, or a pair of them."""
  numbers = value if isinstance(value, tuple) else (value, value)
  return len(numbers) == 2 and min(numbers) > 0


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """The training images.

  Attributes:
    source: a DATA source: a folder, a glob, tar shards, ArrayRecord files or
      "bundled:photos" (`data.sources.open_source`).
    image_size: the side of a training image, or (h, w); or a list of those, one
      of which is drawn for each step from seed and step. At least 1 pixel.
    include: globs of image names (a file name without folder and ending, a tar
      sample's key) or, if they have a "/", of paths below the source
      ("birds/*"); an image must match one of them; () for all images.
    exclude: the same; images that match one are left out.
    resize: the shorter side before cropping; for a pair it is drawn
      log-uniformly between the two; None keeps the image's own size (images
      smaller than `image_size` are always enlarged to it). At least 1 pixel, or
      None.
    crop: where the crop lies; "squash" resizes the full image to `image_size`,
      whatever its aspect ratio, and `resize` must be None. One of
      "random", "center", "squash".
    flip: whether half of the images are mirrored left to right.
    decoder: of JPEG files; "simplejpeg" (`pip install
      'vqrae_jax[fast_jpeg]'`) is for large images: one at least twice as large
      as needed is decoded directly at a smaller size, with slightly different
      pixels.
      One of "pil", "simplejpeg".
    examples: the length of an epoch, if it differs from the source's. At least
      1 image, or None.
    max_skipped: the share of images that may be unreadable; these are replaced
      by others, and a larger share stops the run. In [0, 1].
  """

  source: str
  image_size: int | tuple[int, int] | tuple[tuple[int, int], ...]
  include: tuple[str, ...] = ()
  exclude: tuple[str, ...] = ()
  resize: int | tuple[int, int] | None = None
  crop: str = 'random'
  flip: bool = True
  decoder: str = 'pil'
  examples: int | float | None = None  # as 5e9 if an int is too large
  max_skipped: float = 0.01

  def __post_init__(self):
    if not 0 <= (share := self.max_skipped) <= 1:
      raise UserError(f'data.max_skipped={share} must be a share in [0, 1]')
    one_of('data.crop', self.crop, CROPS)
    one_of('data.decoder', self.decoder, DECODERS)
    size, r = self.image_size, self.resize
    if not self.sizes or not all(_sides(s) for s in self.sizes):
      raise UserError(
        f'data.image_size={size} must be pixels, or (h, w), or a list of those'
      )
    if r is not None and (
      not _sides(r) or (isinstance(r, tuple) and r[0] > r[1])
    ):
      raise UserError(
        f'data.resize={r} must be pixels of the shorter side, or (lowest, '
        'highest)'
      )
    if self.crop == 'squash' and r is not None:
      raise UserError(
        f'data.resize={r} does not go with data.crop="squash"; set it to None'
      )
    at_least(1, 'data.', self, 'examples')

  @property
  def size(self) -> tuple[int, int]:
    """(h, w) of a training image, the largest."""
    return max(self.sizes, key=math.prod)

  @property
  def sizes(self) -> tuple[tuple[int, int], ...]:
    """(h, w) of a training image, for all sizes."""
    s = self.image_size
    if not isinstance(s, tuple):
      return ((s, s),)
    return s if all(isinstance(n, tuple) for n in s) else (s,)


@dataclasses.dataclass(frozen=True)
class NetworksSpec:
  """How the networks of losses are run; None: as the model is
  (`model.dtype`, `model.remat`).

  Attributes:
    dtype: what they compute in. One of "float32", "bfloat16", None.
    remat: whether their gradient recomputes what it needs from the forward
      pass, which saves memory and costs time.
  """

  dtype: str | None = None
  remat: bool | None = None

  def __post_init__(self):
    _cleared_as_none(self, 'dtype')
    one_of('networks.dtype', self.dtype, (*DTYPES, None))

  def over(self, model: Mapping) -> RunOptions:
    """The options, those of the config's `model` where none are given."""
    given = dataclasses.asdict(self)
    options = {k: model[k] for k in given if k in model}
    options['remat'] = bool(options.get('remat'))  # of whatever policy
    return RunOptions(
      **options | {k: v for k, v in given.items() if v is not None}
    )


@dataclasses.dataclass(frozen=True)
class MeshSpec:
  """How a run is laid out over devices.

  Attributes:
    layout: what is divided among devices: the batch alone, parameters too, or
      each block's width as well. One of "dp", "fsdp", "fsdp+tp".
    tensor: with "fsdp+tp", how many devices share a block's width; it must
      divide the number of devices. At least 1 device.
  """

  layout: str = 'dp'
  tensor: int = 1

  def __post_init__(self):
    one_of('mesh.layout', self.layout, LAYOUTS)
    at_least(1, 'mesh.', self, 'tensor')


@dataclasses.dataclass(frozen=True)
class LogSpec:
  """What is written, and how often.

  Attributes:
    every: steps between rows of metrics.jsonl, log lines and scalars. At least
      1.
    images_every: steps between grids of reconstructions, of held-out tiles if
      there are any, in workdir/pictures and TensorBoard; 0: none. At least 0.
    usage_window: steps over which usage and perplexity are counted. At least
      1.
    tensorboard: whether event files are written.
    wandb: a Weights & Biases project that scalars and pictures are also sent
      to; None: none.
  """

  every: int = 50
  images_every: int = 1000
  usage_window: int = 100
  tensorboard: bool = True
  wandb: str | None = None

  def __post_init__(self):
    _cleared_as_none(self, 'wandb')
    at_least(1, 'log.', self, 'every', 'usage_window')
    at_least(0, 'log.', self, 'images_every')


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
  """Checkpoints in workdir/checkpoints.

  Attributes:
    every: steps between them; the last step has one too. 0: no checkpoints at
      all, and a restarted run starts over. At least 0.
    keep: how many of the newest are kept. At least 1.
  """

  every: int = 1000
  keep: int = 3

  def __post_init__(self):
    at_least(0, 'checkpoint.', self, 'every')
    at_least(1, 'checkpoint.', self, 'keep')


@dataclasses.dataclass(frozen=True)
class InitSpec:
  """Where parts of a new run's weights come from; None or "": its seed.

  Attributes:
    encoder: a published encoder: a row of the table, "hf:ORG/NAME[@REV]", a
      folder or a file; or the encoder of a tokenizer's directory or a run.
    decoder: "rae:FILE", a published RAE decoder.
    latents: a file of latents' mean and var, where `model.latents` has a norm.
    networks: the frozen networks of losses, of the discriminator and of
      `eval.metrics`. Random features still separate images, but worse, and a
      run on them logs that. One of "published", "random".
  """

  encoder: str | None = None
  decoder: str | None = None
  latents: str | None = None
  networks: str = 'published'

  def __post_init__(self):
    _cleared_as_none(self, *INIT_PARTS)
    one_of('init.networks', self.networks, NETWORKS)


@dataclasses.dataclass(frozen=True)
class EvalSpec:
  """The evaluation: held-out images cut into square tiles.

  Attributes:
    source: a DATA source; None or "": no evaluation, and the grids of
      reconstructions are of training images.
    tile: the side of a tile in pixels; None for the shorter side of
      `data.image_size`. At least 1, or None.
    include: globs of image names (a file name without folder and ending, a tar
      sample's key) or, if they have a "/", of paths below the source
      ("birds/*"); an image must match one of them; () for all images.
    exclude: the same; images that match one are left out.
    batch_size: tiles at once. At least 1.
    every: steps between evaluations of the EMA weights; 0: only at the end, on
      the exported tokenizer. At least 0.
    metrics: in addition to PSNR, SSIM and codebook usage; `init.networks`
      selects their networks. Each one of "lpips", "rfid".
  """

  source: str | None = None
  tile: int | None = None
  include: tuple[str, ...] = ()
  exclude: tuple[str, ...] = ()
  batch_size: int = 32
  every: int = 0
  metrics: tuple[str, ...] = ()

  def __post_init__(self):
    _cleared_as_none(self, 'source')
    at_least(0, 'eval.', self, 'every')
    for name in self.metrics:
      one_of('eval.metrics', name, METRICS)
    at_least(1, 'eval.', self, 'tile', 'batch_size')
    if self.every and not self.source:
      raise UserError(
        f'eval.every={self.every} has nothing to measure: name held-out images '
        'in eval.source, or set eval.every=0'
      )


@dataclasses.dataclass(frozen=True)
class Temperature:
  """The temperature of a Gumbel quantizer in training.

  Attributes:
    start: the value at the first step. Above 0.
    end: the value after `duration`. Above 0.
    decay: from `start` to `end`. One of "cosine", "linear", "constant".
    duration: "10 epochs", "2000 steps" or a number of steps; None: the run's.
      At least 0 steps, or None.
  """

  start: float = 1.0
  end: float = 0.0625
  decay: str = 'cosine'
  duration: Duration | None = None

  def __post_init__(self):
    one_of('temperature.decay', self.decay, DECAYS)
    if self.duration is not None:
      steps_of(self.duration, 1, 'temperature.duration')
    if min(self.start, self.end) <= 0:
      raise UserError(
        f'temperature.start={self.start} and temperature.end={self.end} must '
        'be above 0'
      )


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """A full run.

  Attributes:
    model: the tokenizer, as `build_tokenizer` takes it.
    data: the training images.
    losses: {term: weight or LossTerm fields}; {name: OtherTerm fields} of
      another package.
    schedules: rows (regex, None or Schedule fields). The first regex that
      matches a parameter's name gives its learning rate; None freezes it.
    duration: "30 epochs", "2000 steps" or a number of steps. Above 0 steps.
    batch_size: B, images of one optimizer step over all hosts. At least 1.
    accumulate: how many microbatches a step's batch is split into, computed
      sequentially; the result equals the full batch's, but for the losses
      "entropy" and "diversity": each microbatch has its own entropy of the
      tokens' mean. At least 1.
    seed: of the initial weights, the order of images, crops, and every other
      random draw of training. At least 0.
    optim: AdamW of the tokenizer.
    ema: decay of the weights' moving average; 0 for none. In [0, 1).
    noise_tau: noise added to latents in training before they are normalised
      and quantised, U[0, tau) x N(0, 1) with one U per sample; .8 for RAE, 0
      for discrete tokens. At least 0.
    temperature: of a Gumbel quantizer; None for the section's defaults.
    init_from: a run's workdir or a tokenizer's directory whose weights the
      run starts with; optimizer and step count are re-initialized.
    init: parts of the weights from elsewhere.
    teacher: the frozen encoder of losses.distill: "init", the one that this
      run starts with (from `init_from` or `init.encoder`), or a
      published encoder as in `init.encoder`.
    networks: how the networks of losses are run.
    discriminator: the discriminator of losses.gan, if there is one; its dtype
      and remat are the model's unless its fields set them.
    mesh: how the run is laid out over devices.
    log: what is written, and how often.
    checkpoint: what the run resumes from.
    eval: the held-out images; None: no evaluation.
    max_nonfinite: how many consecutive steps may be skipped because a loss or
      a gradient is not finite; one more stops the run. At least 0.
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
  temperature: Temperature | None = None
  init_from: str | None = None
  init: InitSpec = InitSpec()
  teacher: str | None = None
  networks: NetworksSpec = NetworksSpec()
  discriminator: DiscriminatorSpec | None = None
  mesh: MeshSpec = MeshSpec()
  log: LogSpec = LogSpec()
  checkpoint: CheckpointSpec = CheckpointSpec()
  eval: EvalSpec | None = None
  max_nonfinite: int = 10

  def __post_init__(self):
    _cleared_as_none(self, 'init_from', 'teacher')
    at_least(1, '', self, 'accumulate', 'batch_size')
    at_least(0, '', self, 'max_nonfinite', 'noise_tau', 'seed')
    # Of long epochs: rounding must not make a fraction of one 0 steps here.
    if not steps_of(self.duration, 1e9, 'duration'):
      raise UserError(f'duration={self.duration!r} must be above 0')
    if not 0 <= self.ema < 1:
      raise UserError(f'ema={self.ema} must lie in [0, 1)')
    for part in INIT_PARTS:
      if self.init_from is not None and getattr(self.init, part) is not None:
        raise UserError(
          f'init_from loads a full tokenizer, so init.{part} does not apply; '
          f'give one of the two (--config.init.{part}= clears it)'
        )
    if (given := self.eval) is not None:
      tile = given.tile or min(self.data.size)
      given = dataclasses.replace(given, tile=tile) if given.source else None
      object.__setattr__(self, 'eval', given)

  def terms(self) -> dict[str, LossTerm]:
    """{name: LossTerm}, names checked against the loss tables."""
    known = [*IMAGE_TERMS, *FROZEN_TERMS, *LATENT_TERMS, 'gan']
    terms: dict[str, LossTerm] = {}
    given = dict(self.losses)
    features = given.pop('features', {})
    if not isinstance(features, Mapping):
      raise UserError(
        f'losses.features={features!r} must be dict(deep=…, shallow=…)'
      )
    given |= {f'features/{k}': value for k, value in features.items()}
    for name, value in given.items():
      name = str(name)
      where = f'losses.{name.replace("/", ".")}'
      kind = TERMS.get(name, LossTerm)
      if not isinstance(value, Mapping):
        value = {'weight': value}
      if name not in known:
        if 'fn' not in value or not re.fullmatch(r'\w+', name):
          raise UserError(f'unknown "{where}"{did_you_mean(name, known)}')
        if name in ('discriminator', 'lecam', 'r1'):
          raise UserError(f'{where}: the discriminator has a loss of that name')
        kind = OtherTerm
      terms[name] = build_spec(kind, value, where)
    if not terms:
      raise UserError(f'losses is empty; there are: {", ".join(known)}')
    self._check_teacher(terms.get('distill'))
    self._check_gan(terms)
    return terms

  def _check_gan(self, terms: Mapping[str, LossTerm]) -> None:
    gan = terms.get('gan')
    if (gan is None) != (self.discriminator is None):
      raise UserError(
        'losses.gan needs a discriminator: add discriminator=dict(name="patch")'
        if gan
        else f'discriminator={self.discriminator.name} has no losses.gan; add '
        'that, or set discriminator=None'
      )
    image = [*IMAGE_TERMS, *FROZEN_TERMS]
    if (
      gan
      and gan.adaptive
      and not any(
        n in image or getattr(term, 'on', '') == 'images'
        for n, term in terms.items()
      )
    ):
      raise UserError(
        'losses.gan is adaptive, and there is no image loss to balance it '
        f'against; add one ({", ".join(image)}) or set '
        'losses.gan.adaptive=False'
      )

  def _check_teacher(self, distill: DistillTerm | None) -> None:
    wanted = distill is not None and distill.target == 'teacher'
    if wanted and not self.teacher:
      raise UserError(
        'losses.distill has the target "teacher", but there is none: set '
        'teacher="init" (the encoder that this run starts with) or to a '
        'published encoder, or set losses.distill.target="self"'
      )
    if self.teacher and not wanted:
      raise UserError(
        f'teacher={self.teacher} is not used: add losses.distill with the '
        'target "teacher", or remove it'
      )
    if self.teacher == INIT and not (self.init_from or self.init.encoder):
      raise UserError(
        'teacher="init" would be a random encoder: set init_from or '
        'init.encoder, or name a published encoder'
      )

  def schedule_rows(self) -> list[tuple[str, Schedule | None]]:
    """The rows of `schedules`, checked."""
    rows: list[tuple[str, Schedule | None]] = []
    for row in self.schedules:
      match row:
        case (str(pattern), None):
          rows.append((pattern, None))
        case (str(pattern), Mapping() as fields):
          where = f'schedules["{pattern}"]'
          rows.append((pattern, build_spec(Schedule, fields, where)))
        case (str(pattern), other):
          raise UserError(
            f'schedules["{pattern}"]={other!r} must be None or dict(lr=…)'
          )
        case _:
          raise UserError(f'schedules row {row!r} must be (regex, schedule)')
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


def recorded(config: Any) -> Any:
  """`plain`, as config.json has it: what JSON lacks is text, and a list of two
  sizes would be read as two squares."""
  size = _at(config, 'data', 'image_size')
  found = plain(config)
  if isinstance(size, tuple):
    found['data']['image_size'] = (size,)
  return json.loads(json.dumps(found, default=str))


def _at(config: Any, section: str, key: str) -> Any:
  section = config.get(section)
  return section.get(key) if hasattr(section, 'get') else None


def read_config(config: Any) -> RunConfig:
  """A ConfigDict (or mapping) as a `RunConfig`; opens no file.

  Raises:
    UserError: an unknown, mistyped or impossible key, or missing keys: those
      of all sections at once.
  """
  several = isinstance(_at(config, 'data', 'image_size'), list)
  config = plain(config)
  if several:  # a tuple would be (h, w)
    sizes = config['data']['image_size']
    pairs = tuple(s if isinstance(s, tuple) else (s, s) for s in sizes)
    config['data']['image_size'] = pairs
  missing = missing_keys(RunConfig, config, 'config')
  sections = config.get('model', {})
  if isinstance(sections, Mapping):
    names = ('encoder', 'quantizer', 'decoder')
    missing += [f'config.model.{n}' for n in names if n not in sections]
  check_missing([name for name in missing if name != 'config.model'])
  spec = build_spec(RunConfig, config, 'config')
  spec.terms(), spec.schedule_rows()
  return spec


def differences(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
  """{dotted key: (old value, new value)} of all that differs, sorted; None on
  a side that has no such key."""
  old, new = trees.flatten(old), trees.flatten(new)
  return {
    name.replace('/', '.'): (old.get(name), new.get(name))
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name)
  }


def check_placeholders(spec: RunConfig) -> None:
  """Checks that no placeholder is left. Other names are checked when they are
  opened, since a resumed run may no longer need them.

  Raises:
    UserError: a recipe's placeholder is still there.
  """
  for key, (word, wanted) in PLACEHOLDERS.items():
    value = operator.attrgetter(key)(spec)
    if value == word and not pathlib.Path(word).exists():
      raise UserError(f'{key}={word} stands for {wanted}: set --config.{key}')


def check_latents(spec: RunConfig, tokenizer: Tokenizer) -> None:
  """Model, data and `init.latents` agree; opens no file.

  Statistics require a norm in `model.latents` and the reverse; a run that
  starts from another tokenizer (`init_from`) takes them from there.

  Raises:
    UserError: a norm without statistics, statistics without a norm, or
      statistics for another grid of tokens.
  """
  given, norm = spec.init.latents, tokenizer.latents_spec
  if norm.norm == 'none' and given is not None:
    raise UserError(
      f'init.latents={given} does not apply: set model.latents='
      'dict(norm="channel") or "position", or remove it'
    )
  if norm.norm != 'none' and given is None and spec.init_from is None:
    flag = ' --position' if norm.grid else ''
    raise UserError(
      f'init.latents: model.latents.norm="{norm.norm}" needs statistics: '
      f'python -m vqrae_jax.latent_stats --config=… --data=… --out=stats.npz'
      f'{flag} computes them for --config.init.latents=stats.npz; or set '
      'init_from'
    )
  for size in spec.data.sizes:
    latents.check_grid(norm, tokenizer.grid(*size), 'data.image_size')
  if spec.eval is not None:
    tile = spec.eval.tile
    tokenizer.index_shape(tile, tile)
    latents.check_grid(norm, tokenizer.grid(tile, tile), 'eval.tile')
    if 'lpips' in spec.eval.metrics and tile < MIN_SIDE:
      raise UserError(
        f'eval.metrics: "lpips" needs tiles of at least {MIN_SIDE} px, but '
        f'eval.tile={tile}'
      )


# Usual values by quantizer. A value outside is used, and logged once.
#
# The ranges are those that the tokenizers' own documentation gives (decay,
# commitment) or that papers tried (codes, up to 65,536); around an epsilon two
# powers of ten. `docs/from_pytorch.md` shows the same table, and a test holds
# the two equal.
RANGES: dict[str, dict[str, tuple[float, float]]] = {
  'vq': {
    'num_codes': (512, 65536),
    'decay': (0.95, 0.999),
    'epsilon': (1e-7, 1e-3),
  },
  'simvq': {'num_codes': (512, 65536)},
  'fsq': {'epsilon': (1e-5, 1e-1)},
}
# The documented .1 is of trainings with LPIPS: beside an L2 of pixels in [0, 1]
# alone, or for SimVQ behind a frozen encoder, less is right (docs/results.md).
COMMIT, COMMIT_LPIPS = (0.001, 0.5), (0.1, 0.5)


def config_warnings(spec: RunConfig, tokenizer: Tokenizer) -> str | None:
  """One line that names every value outside its usual range, and losses that
  `accumulate` changes; or None."""
  terms = spec.terms()
  quantizer, key = nested.innermost(tokenizer.quantizer, 'model.quantizer')
  name = quantizers.name_of(quantizer)
  found = [
    (f'{key}.{field}', getattr(quantizer, field), usual)
    for field, usual in RANGES.get(name, {}).items()
  ]
  if 'commit' in terms:
    low = name == 'simvq' or 'lpips' not in terms
    usual = COMMIT if low else COMMIT_LPIPS
    found.append(('losses.commit', terms['commit'].weight, usual))
  if tokenizer.codebook_size:  # noise is for continuous decoders
    found.append(('noise_tau', spec.noise_tau, (0, 0)))
  odd = [
    f'{key}={value:g} (usually {low:g}{f" to {high:g}" if high > low else ""})'
    for key, value, (low, high) in found
    if not low <= value <= high
  ]
  if spec.accumulate > 1:
    odd += [
      f'accumulate={spec.accumulate} with losses.{name} (its entropy of the '
      "tokens' mean is that of a microbatch)"
      for name in ('entropy', 'diversity')
      if name in terms
    ]
  values = _values_of_fsq(tokenizer.quantizer)
  if values > 256 and tokenizer.quantizer.dtype == 'bfloat16':
    odd.append(
      f'model.dtype="bfloat16" with {values} values a channel of {key} (it '
      'tells 256 apart, and the decoder gets equal latents of more)'
    )
  return f'unusual: {", ".join(odd)}' if odd else None


def _values_of_fsq(quantizer: base.Quantizer) -> int:
  """The most values that a channel of FSQ's codes has; 0 for others."""
  stages = 1
  while isinstance(quantizer, nested.Nested):
    stages *= nested.value_of(quantizer, 'stages', 1)
    quantizer = quantizer.quantizer
  name = quantizers.name_of(quantizer)
  return max(quantizer.levels) ** stages if name == 'fsq' else 0
