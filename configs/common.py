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


def second_stage(config, *, duration: str, distill: str, **schedule) -> None:
  """Goes on from a finished run with everything open, at a lower rate, and
  distils: `distill` is "self" or "teacher", the encoder that it begins with."""
  config.losses.distill = dict(weight=1.0, target=distill)
  if distill == 'teacher':
    config.teacher = 'init'
  config.init_from = 'RUN'  # --config.init_from=runs/NAME
  config.init.encoder = config.init.latents = None  # they come with the run
  config.duration = duration
  config.schedules = ((r'.*', schedule),)


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
      raise ValueError(f'config argument "{pair}" is none of: {known}')
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
