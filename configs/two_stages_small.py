"""python -m vqrae_jax.train --config=configs/two_stages_small.py --config.data.source=FOLDER

Both stages of a tokenizer at a size that two CPU cores train in minutes: crops
of 32 pixels, patch 4, two blocks in encoder and decoder, SimVQ with 1024 codes,
as many as a batch has tokens. The encoder is that of a continuous autoencoder:

    …:stage=0                                continuous, everything trained
    …:stage=1 --config.init.encoder=runs/A   frozen encoder, SimVQ, LPIPS, GAN
    …:stage=2 --config.init_from=runs/B      encoder trained, with distillation

A and B are the workdirs of stages 0 and 1; that of stage 0 is
`runs/two_stages_small-stage=0` unless `--workdir` is given.
Arguments: `:steps=1000`, `:lpips=False`, `:gan=False`, `:distill=teacher`
("self", "none"), `:frozen=True` (stage 2, the encoder frozen), compared by
`benchmarks/two_stages.py`. Images with a name in `HELD_OUT` (ImageNet's names)
are used only for evaluation; for other sets give
`--config.data.exclude="('A*',)"` and the same for `eval.include`.

Weights: L2 1; LPIPS .1, a tenth of the large recipes', since VGG16's features
are random here (`init.networks`; "published" takes the published file); GAN .3
of the adaptive weight, since at .75 the small discriminator loses within 100
steps; SimVQ's codebook loss 1 as in arXiv 2411.02038, but its commitment .01
instead of .25, at which tokens draw together; distillation 1 as in 2511.23386.
"""

from configs import common

HELD_OUT = ('n*15_*',)  # of ImageNet's names


def get_config(arguments=None):
  defaults = dict(steps=1000, lpips=True, gan=True, frozen=False)
  defaults |= dict(stage=(1, 0, 2), distill=('teacher', 'self', 'none'))
  arg = common.arguments(arguments, **defaults)
  config = common.base()
  quantizer = dict(name='simvq', num_codes=1024, code_dim=64, distance='l2')
  quantizer = quantizer if arg.stage else dict(name='none')
  config.model = common.small_model(4, 32, quantizer)
  config.data.update(exclude=HELD_OUT, image_size=32, resize=(100, 400))
  config.losses = dict(l2=1.0)
  config.duration = f'{arg.steps} steps'
  config.batch_size = 16
  config.ema = 0.99
  config.optim.b2 = 0.95
  config.log.update(every=50, images_every=max(arg.steps // 4, 1))
  config.eval.source = config.data.get_oneway_ref('source')
  config.eval.update(
    include=HELD_OUT, tile=32, batch_size=64, every=max(arg.steps // 10, 50)
  )
  rate = dict(lr=1.5e-3, warmup=arg.steps // 12)
  if arg.stage == 0:
    config.schedules = ((r'.*', rate),)
    return config
  config.losses.update(codebook=1.0, commit=0.01)
  config.init.networks = 'random'
  if arg.lpips:
    config.losses.lpips = 0.1
  if arg.gan:
    # From the first step, which is much faster on CPUs.
    config.losses.gan = dict(weight=0.3, ramp=arg.steps // 2)
    config.discriminator = dict(
      name='patch',
      fields=dict(hidden=32, halvings=2, groups=8, pool=0),
      schedule=dict(lr=5e-4),
      lecam=0.001,
      augment=False,
    )
  if arg.stage == 1:
    config.init.encoder = 'RUN'  # --config.init.encoder=runs/NAME
    config.schedules = common.encoder_frozen(**rate)
    return config
  config.init_from = 'RUN'  # --config.init_from=runs/NAME
  slow = dict(lr=3e-4, warmup=arg.steps // 12)
  opened = ((r'.*', slow),)
  config.schedules = common.encoder_frozen(**slow) if arg.frozen else opened
  if arg.distill != 'none':
    config.losses.distill = dict(weight=1.0, target=arg.distill)
  if arg.distill == 'teacher':
    config.teacher = 'init'
  return config
