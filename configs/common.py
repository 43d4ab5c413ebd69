"""What configs share: all keys, model parts, and trainings.

Keys are documented in `vqrae_jax/train/config.py`. `recipe` is a tokenizer on a
published encoder; `original`, `rae` and `vqrae` each add the training of one
source and cite it. The original specification is that of the PyTorch project
hugoycj/RAE, a fork of bytetriper/RAE.
"""

import ml_collections


def of_any_type(value) -> ml_collections.FieldReference:
  """A value that the command line may replace by one of another type."""
  return ml_collections.FieldReference(value, field_type=object)


def base() -> ml_collections.ConfigDict:
  """Every key but `model`, `losses` and `schedules`, so that each can be
  changed from the command line. Durations are strings: "500 steps"."""
  optional = ml_collections.config_dict.placeholder
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.duration = '1000 steps'
  config.batch_size = 32
  config.accumulate = 1
  config.ema = 0.999
  config.max_nonfinite = 10
  config.noise_tau = 0.0
  config.temperature = optional(object)  # of a Gumbel quantizer
  config.data = dict(
    source='FOLDER',
    image_size=ml_collections.FieldReference(256, field_type=object),
    include=(),
    exclude=(),
    resize=optional(object),
    crop='random',
    flip=True,
    decoder='pil',
    examples=optional(object),
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
  config.networks = dict(dtype=optional(str), remat=optional(object))
  config.discriminator = optional(object)
  config.optim = dict(
    b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip=of_any_type(1.0)
  )
  config.mesh = dict(layout='dp', tensor=1)
  config.log = dict(
    every=50, images_every=1000, usage_window=100, tensorboard=True,
    wandb=optional(str),
  )  # fmt: skip
  config.checkpoint = dict(every=1000, keep=3)
  config.eval = dict(
    source=optional(str), tile=optional(object), every=0, metrics=()
  )
  config.eval.update(include=(), exclude=(), batch_size=32)
  return config


def vit(*, width: int, depth: int, patch: int, pixels: int, **fields) -> dict:
  """A plain ViT: heads of 64 channels, an MLP four times as wide."""
  sizes = dict(mlp_dim=4 * width, num_heads=width // 64, patch_size=patch)
  grid = (pixels // patch, pixels // patch)
  return dict(width=width, depth=depth, grid=grid, **sizes, **fields)


def small_model(
  patch: int, pixels: int, quantizer: dict, width: int = 192
) -> dict:
  """A quantizer between two plain ViTs of two blocks, from scratch."""
  ends = vit(width=width, depth=2, patch=patch, pixels=pixels)
  return dict(
    encoder=dict(vit=ends),
    quantizer=quantizer,
    decoder=dict(vit=ends | dict(posemb='sincos2d')),
    dtype='float32',
    remat=of_any_type(False),
  )


def encoder_frozen(**schedule) -> tuple:
  """Schedule rows: the encoder is frozen, all else follows `schedule` (lr,
  end_lr, warmup)."""
  return ((r'encoder/.*', None), (r'.*', schedule))


def recipe(
  *,
  encoder: str,
  quantizer: dict,
  decoder: dict,
  pixels: int = 256,
  resize: int | None = None,
  flip: bool = True,
  remat: bool = True,
  layout: str = 'fsdp',
) -> ml_collections.ConfigDict:
  """A tokenizer on a published encoder, a row of the table; its training is not
  yet set.

  Latents pass the encoder's final norm without its affine part, as in RAE
  (arXiv 2510.11690). The encoder's weights are downloaded at the start
  (`--config.init.encoder=` for random ones), those of the losses' networks
  beforehand, by `fetch_weights`. Training images are crops of `pixels` from
  images resized to a shorter side of `resize`, by default 32 pixels more.
  """
  config = base()
  config.model = dict(
    encoder=dict(name=encoder, output_norm=of_any_type('plain')),
    quantizer=quantizer,
    decoder=decoder,
    dtype='bfloat16',
    remat=of_any_type(remat),
  )
  config.init.encoder = encoder
  config.data.update(
    image_size=pixels, resize=resize or pixels + 32, crop='random', flip=flip
  )
  config.networks.remat = False  # 30 MiB more an image, one VGG16 forward less
  config.mesh.layout = layout
  return config


def siglip_l(quantizer: dict) -> ml_collections.ConfigDict:
  """`recipe` on SigLIP-L/16, the 384-pixel weights at 224 pixels, so 14 x 14
  tokens, with a ViT-L decoder."""
  decoder = dict(name='L', vit=dict(grid=(14, 14)))
  encoder = 'siglip-large-patch16-384'
  return recipe(
    encoder=encoder, quantizer=quantizer, decoder=decoder, pixels=224
  )


def simvq(distance: str) -> dict:
  """SimVQ (arXiv 2411.02038) with 16,384 codes of 1536 channels."""
  return dict(name='simvq', num_codes=16384, code_dim=1536, distance=distance)


def original(config, **terms: float) -> dict:
  """The first stage of the original specification, encoder frozen; `terms` are
  weights of the quantizer's losses. Returns the schedule.

  - The specification: L2, LPIPS and a GAN, AdamW at 1e-3, batch 4096, 30
    epochs.
  - The PyTorch project's first-stage configs: LPIPS 1.0 from the start; the
    GAN's weight .75, adaptive, on the decoder from epoch 8; DINO discriminator
    from epoch 6, 2e-4 to 2e-5 after an epoch of warm-up (its later SigLIP
    files: 4e-4 to 1e-4).
  - VQRAE (arXiv 2511.23386), for what those leave open: betas .9 and .999,
    decay 1e-4, clip 1, 2000 steps of warm-up, crop and flip; EMA .999 is
    TiTok's (2406.07550).
  """
  rate = dict(lr=1e-3, end_lr=1e-5, warmup=2000)
  config.losses = dict(l2=1.0, lpips=1.0, gan=GAN, **terms)
  config.discriminator = dino_discriminator('6 epochs')
  config.schedules = encoder_frozen(**rate)
  config.duration = '30 epochs'
  config.batch_size = 4096
  config.optim.update(b1=0.9, b2=0.999, weight_decay=1e-4, clip=1.0)
  config.ema = 0.999
  return rate


def original_second(config) -> dict:
  """The original specification's second stage, which trains the encoder too.
  Returns the schedule.

  - The specification: L2, reduced LPIPS, distillation of the continuous latents
    into the quantised ones (`distill`, target "self"), no GAN, 1e-5, 10 epochs.
    Here its gradient stops at the codes (`vqrae_jax/losses/` says why), so it
    does not constrain the encoder; the paper's teacher does:
    `--config.losses.distill.target=teacher --config.teacher=init`.
  - The PyTorch project's second-stage config: LPIPS .5, distill 2.0, codebook
    1, commitment .25, cosine to a tenth, 1000 steps of warm-up, AdamW (.9, .95)
    with decay .05, EMA .9999.
  """
  second_stage(config, duration='10 epochs')
  rate = dict(lr=1e-5, end_lr=1e-6, warmup=1000)
  config.losses = dict(l2=1.0, lpips=0.5, codebook=1.0, commit=0.25)
  config.losses.distill = dict(weight=2.0, target='self')
  config.schedules = ((r'.*', rate),)
  config.batch_size = 4096
  config.optim.update(b1=0.9, b2=0.95, weight_decay=0.05, clip=1.0)
  config.ema = 0.9999
  return rate


def rae(config, **terms: float) -> None:
  """The training of RAE's decoders (arXiv 2510.11690, its trainer's code),
  as in the PyTorch project's first-stage configs; encoder frozen.

  - L1, 1.0 LPIPS from the start, GAN of weight .75, adaptive, on the decoder
    from epoch 8; DINO discriminator from epoch 6, 2e-4 to 2e-5 after an epoch
    of warm-up;
  - AdamW (.9, .95), no decay, 2e-4 to 2e-5 after an epoch of warm-up, batch
    512, 16 epochs, EMA .9978; clip 1 is the PyTorch project's (VQ DINOv2-B XL);
  - data, set by each recipe: crops of 256 from 384 (1.5 times), no flips.
  """
  rate = dict(lr=2e-4, end_lr=2e-5, warmup='1 epochs')
  config.losses = dict(l1=1.0, lpips=1.0, gan=GAN, **terms)
  config.discriminator = dino_discriminator('6 epochs')
  config.schedules = encoder_frozen(**rate)
  config.duration = '16 epochs'
  config.batch_size = 512
  config.optim.update(b1=0.9, b2=0.95, weight_decay=0.0, clip=1.0)
  config.ema = 0.9978


def vqrae(config, stage: int, *, batch: int, steps: tuple[int, int]) -> None:
  """The training of VQRAE (arXiv 2511.23386, its table of training settings).

  First stage:
  - VQRAE: L2, perceptual term, the quantizer's losses with a commitment of .25,
    no GAN; AdamW (.9, .999), decay 1e-4, clip 1, 4e-4 to 1e-4 after 2000 steps
    of warm-up, crop and flip, the encoder frozen;
  - TA-TiTok (2501.07730): the perceptual term, 1.0 LPIPS and .1 ConvNeXt-S
    (there the weighted mean of the two, with a weight of 1.1); EMA .999 is
    TiTok's (2406.07550).

  The second stage trains the encoder too:
  - VQRAE: the same terms, a GAN of weight .1 from step 50,000, distillation of
    weight 1.0, the squared distance to the initial encoder ("teacher"); decoder
    1e-4 to 1e-5, encoder 1e-5 throughout, discriminator 4e-5;
  - TiTok: the GAN's weight is fixed; the discriminator is PatchGAN with hinge
    and LeCam .001.
  """
  config.losses = dict(
    l2=1.0, lpips=1.0, convnext=0.1, codebook=1.0, commit=0.25
  )
  config.schedules = encoder_frozen(lr=4e-4, end_lr=1e-4, warmup=2000)
  config.duration = f'{steps[0]} steps'
  config.batch_size = batch
  config.optim.update(b1=0.9, b2=0.999, weight_decay=1e-4, clip=1.0)
  config.ema = 0.999
  if stage == 2:
    second_stage(config, duration=f'{steps[1]} steps')
    config.losses.gan = dict(weight=0.1, start=50000, adaptive=False)
    config.losses.distill = dict(weight=1.0, target='teacher')
    config.teacher = 'init'
    config.discriminator = paper_discriminator()
    config.schedules = (
      (r'encoder/.*', dict(lr=1e-5, end_lr=1e-5, warmup=2000)),
      (r'.*', dict(lr=1e-4, end_lr=1e-5, warmup=2000)),
    )


def second_stage(config, *, duration: str) -> None:
  """Continues from a finished run; losses and schedules are the recipe's."""
  config.init_from = 'RUN'  # --config.init_from=runs/NAME
  config.init.encoder = config.init.latents = None  # they come with the run
  config.duration = duration


GAN = dict(weight=0.75, start=8, unit='epochs')


def _discriminator(b2, weight_decay, **fields) -> ml_collections.ConfigDict:
  adam = dict(b1=0.9, b2=b2, weight_decay=weight_decay, clip=1.0)
  config = dict(loss='hinge', updates=1, optim=adam, lecam=0.0, r1=0.0)
  return ml_collections.ConfigDict(config | fields)


def dino_discriminator(start: str) -> ml_collections.ConfigDict:
  """RAE's discriminator (arXiv 2510.11690, its trainer's code), from `start` on.

  Heads on a frozen DINO ViT-S/8, kernels of 9 with spectral norm, hinge, the
  decoder's loss -mean D(fake); DiffAug on every image, without cutout; AdamW
  (.9, .95) without decay, 2e-4 to 2e-5 after an epoch of warm-up; one update a
  step. Clipping gradients at 1 is this package's choice.
  """
  rate = dict(lr=2e-4, end_lr=2e-5, warmup='1 epochs')
  fields = dict(schedule=rate, augment=True, cutout=0.0)
  return _discriminator(0.95, 0.0, name='dino', start=start, **fields)


def paper_discriminator() -> ml_collections.ConfigDict:
  """VQRAE's discriminator (arXiv 2511.23386): 4e-5, from step 50,000.

  What the paper leaves open is TiTok's (2406.07550), whose losses it takes:
  PatchGAN, hinge, the decoder's loss -mean D(fake), LeCam .001 (there of a
  batch's mean logits, here a mean over logits, which is larger by their
  variance), no augmentation, both networks from the same step with the same
  AdamW. The paper names one rate, so it is constant.
  """
  rate = dict(lr=4e-5, warmup='2000 steps', decay='constant')
  fields = dict(schedule=rate, augment=False, lecam=0.001)
  start = '50000 steps'
  return _discriminator(0.999, 1e-4, name='patch', start=start, **fields)


def layerwise(decay: float, depth: int, last: int | None = None) -> tuple:
  """`Schedule.layers` of `depth` stacked blocks: 1 for the last block, and for
  each below it `decay`, in (0, 1], times that of the one above. Only the `last`
  blocks are trained, by default all; those below have None, which freezes them.

  Raises:
    ValueError: `decay` or `last` is out of range.
  """
  last = depth if last is None else last
  if not 0 < decay <= 1:
    raise ValueError(f'layerwise decay={decay} must lie in (0, 1]')
  if not 0 < last <= depth:
    raise ValueError(f'layerwise last={last} must be 1 to {depth} blocks')
  return (None,) * (depth - last) + tuple(decay**n for n in range(last))[::-1]


def encoder_open(*, depth: int, last: int, decay: float, **schedule) -> tuple:
  """Schedule rows: the last `last` of the encoder's `depth` blocks are trained,
  each at `decay` times the rate of the one above it, all else by `schedule`.
  The layers before the first block (patches, positions) have `decay` times its
  rate, and are frozen unless all blocks are trained."""
  if last == depth and decay == 1:
    return ((r'.*', schedule),)
  blocks = schedule | dict(layers=layerwise(decay, depth, last))
  slow = {k: v * decay**depth for k, v in schedule.items() if 'lr' in k}
  return (
    (r'encoder/transformer/.*', blocks),
    (r'encoder/embed/.*', schedule | slow if last == depth else None),
    (r'.*', schedule),
  )


def arguments(text: str | None, **defaults):
  """Parses "steps=60,lr=1e-3" over the defaults, each as its default's type.
  A default that is a tuple lists the choices, the first being the default.

  Raises:
    ValueError: an unknown argument, or a value of another type or choice.
  """
  values = {k: v[0] if type(v) is tuple else v for k, v in defaults.items()}
  known = ', '.join(f'{k}={v}' for k, v in values.items())
  known = f'is not one of: {known}' if known else 'is unknown: there are none'
  for pair in filter(None, (text or '').split(',')):
    name, equals, value = pair.partition('=')
    if not equals or name not in defaults:
      raise ValueError(f'config argument "{pair}" {known}')
    choices = defaults[name] if type(defaults[name]) is tuple else ()
    right = ' or '.join(f'{name}={v}' for v in choices)
    try:
      if isinstance(values[name], bool):
        found = {'true': True, 'false': False}[value.lower()]
      else:
        found = type(values[name])(value)
      if choices and found not in choices:
        raise ValueError
    except (KeyError, ValueError):
      right = right or f'like {name}={values[name]}'
      raise ValueError(f'config argument "{pair}" must be {right}') from None
    values[name] = found
  return ml_collections.ConfigDict(values)
