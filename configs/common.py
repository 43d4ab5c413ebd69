"""What configs share. Keys and their defaults are `RunSpec`'s
(`vqrae_jax/train/config.py`)."""

import ml_collections


def base() -> ml_collections.ConfigDict:
  """Every key but `model`, `losses` and `schedules`, so that each can be
  changed from the command line. Durations are words: "500 steps"."""
  optional = ml_collections.config_dict.placeholder
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.duration = '1000 steps'
  config.batch_size = 32
  config.accumulate = 1
  config.ema = 0.999
  config.max_nonfinite = 10
  config.noise_tau = 0.0
  config.data = dict(
    source='FOLDER',
    image_size=ml_collections.FieldReference(256, field_type=object),
    include=(),
    exclude=(),
    resize=optional(object),
    crop='random',
    flip=True,
    examples=optional(int),
    max_skipped=0.01,
  )
  config.init_from = optional(str)
  config.init = dict(
    encoder=optional(str),
    decoder=optional(str),
    latents=optional(str),
    networks='published',
  )
  config.teacher = optional(str)
  config.discriminator = optional(object)
  config.optim = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip=1.0)
  config.mesh = dict(layout='dp', tensor=1)
  config.log = dict(
    every=50, images_every=1000, usage_window=100, tensorboard=True
  )
  config.checkpoint = dict(every=1000, keep=3)
  config.eval = dict(
    source=optional(str),
    tile=optional(int),
    include=(),
    exclude=(),
    batch_size=32,
    every=0,
  )
  return config


def vit(*, width: int, depth: int, patch: int, pixels: int, **fields) -> dict:
  """A plain ViT: heads of 64 channels, an MLP four times as wide."""
  return dict(
    width=width,
    depth=depth,
    mlp_dim=4 * width,
    num_heads=width // 64,
    patch_size=patch,
    grid=(pixels // patch, pixels // patch),
    **fields,
  )


def encoder_frozen(**schedule) -> tuple:
  """Schedule rows: the encoder keeps every bit, all else follows `schedule`
  (lr, end_lr, warmup)."""
  return ((r'encoder/.*', None), (r'.*', schedule))


def second_stage(config, *, duration: str) -> None:
  """Goes on from a finished run, for `duration`; its losses and schedules are
  the recipe's to say."""
  config.init_from = 'RUN'  # --config.init_from=runs/NAME
  config.init.encoder = config.init.latents = None  # they come with the run
  config.duration = duration


def paper_second_rates() -> tuple:
  """Schedule rows of VQRAE's second run (arXiv 2511.23386, its table of
  training settings): encoder 1e-5 throughout, all else 1e-4 to 1e-5."""
  return (
    (r'encoder/.*', dict(lr=1e-5, end_lr=1e-5, warmup=2000)),
    (r'.*', dict(lr=1e-4, end_lr=1e-5, warmup=2000)),
  )


def dino_discriminator(start: str, **schedule) -> ml_collections.ConfigDict:
  """RAE's second player (arXiv 2510.11690, its trainer's code), which the
  PyTorch project's first-stage configs keep.

  Heads on a frozen DINO ViT-S/8, kernels of 9 with spectral norm, hinge, the
  decoder's loss -mean D(fake); DiffAug on every image, nothing cut out; AdamW
  (.9, .95) without decay; one update a step. Gradients clipped at 1 are ours.

  Args:
    start: from when it learns.
    **schedule: lr, end_lr, warmup.
  """
  return ml_collections.ConfigDict(
    dict(
      name='dino',
      loss='hinge',
      start=start,
      updates=1,
      schedule=schedule,
      optim=dict(b1=0.9, b2=0.95, weight_decay=0.0, clip=1.0),
      augment=True,
      cutout=0.0,
      lecam=0.0,
      r1=0.0,
    )
  )


def paper_discriminator() -> ml_collections.ConfigDict:
  """VQRAE's second player (arXiv 2511.23386): 4e-5, from step 50,000.

  What the paper leaves open is TiTok's (2406.07550), whose losses it takes:
  PatchGAN, hinge, the decoder's loss -mean D(fake), LeCam .001 (there of a
  batch's mean logits, here a mean over logits, which is larger by their
  variance), no augmentation, both players from the same step with the same
  AdamW. One rate is named, so it stays.
  """
  return ml_collections.ConfigDict(
    dict(
      name='patch',
      loss='hinge',
      start='50000 steps',
      updates=1,
      schedule=dict(lr=4e-5, warmup='2000 steps', decay='constant'),
      optim=dict(b1=0.9, b2=0.999, weight_decay=1e-4, clip=1.0),
      augment=False,
      lecam=0.001,
      r1=0.0,
    )
  )


def layerwise(decay: float, depth: int, last: int | None = None) -> tuple:
  """`Schedule.layers` of `depth` stacked blocks: 1 for the last block, `decay`
  times less for each below it.

  Args:
    decay: in (0, 1]; 1 moves all alike.
    depth: blocks.
    last: how many blocks move, counted from the end; those below have None,
      which keeps every bit. By default all.

  Raises:
    ValueError: a decay or a number of blocks outside its range.
  """
  last = depth if last is None else last
  if not 0 < decay <= 1:
    raise ValueError(f'layerwise decay={decay} must lie in (0, 1]')
  if not 0 < last <= depth:
    raise ValueError(f'layerwise last={last} must be 1 to {depth} blocks')
  return (None,) * (depth - last) + tuple(decay**n for n in range(last))[::-1]


def encoder_open(*, depth: int, last: int, decay: float, **schedule) -> tuple:
  """Schedule rows: of the encoder the last `last` of `depth` blocks move, each
  `decay` times slower than the one above it, and all else by `schedule`.

  What lies before the first block (patches, positions) is one step slower
  still, and frozen unless all blocks move.
  """
  if last == depth and decay == 1:
    return ((r'.*', schedule),)
  blocks = schedule | dict(layers=layerwise(decay, depth, last))
  slow = {k: v * decay**depth for k, v in schedule.items() if 'lr' in k}
  return (
    (r'encoder/transformer/.*', blocks),
    (r'encoder/embed/.*', schedule | slow if last == depth else None),
    (r'.*', schedule),
  )


def _like(default, value: str):
  if isinstance(default, bool):
    return {'true': True, 'false': False}[value.lower()]
  return type(default)(value)


def arguments(text: str | None, **defaults):
  """ "steps=60,lr=1e-3" over the defaults, each of its default's type.

  A default that is a tuple lists the choices, the first of them the default.

  Raises:
    ValueError: a name that has no default, a value of another type, or none
      of the choices.
  """
  choices = {k: v for k, v in defaults.items() if isinstance(v, tuple)}
  values = defaults | {k: v[0] for k, v in choices.items()}
  known = ', '.join(f'{k}={v}' for k, v in values.items())
  for pair in filter(None, (text or '').split(',')):
    name, equals, value = pair.partition('=')
    if not equals or name not in defaults:
      there_are = (
        f'is none of: {known}' if known else 'has no place: there are none'
      )
      raise ValueError(f'config argument "{pair}" {there_are}')
    allowed = choices.get(name)
    try:
      found = _like(values[name], value)
    except (KeyError, ValueError):
      found = None
    if allowed and found not in allowed:
      options = ' or '.join(f'{name}={v}' for v in allowed)
      raise ValueError(f'config argument "{pair}" must be {options}')
    if found is None:
      raise ValueError(
        f'config argument "{pair}" must be like {name}={values[name]}'
      )
    values[name] = found
  return ml_collections.ConfigDict(values)
