"""python -m vqrae_jax.train --config=configs/simvq_siglip2_l.py --config.data.source=FOLDER
python -m vqrae_jax.train --config=configs/simvq_siglip2_l.py:stage=2 --config.init_from=runs/simvq_siglip2_l --config.data.source=FOLDER
python -m vqrae_jax.train --config=configs/simvq_siglip2_l.py:preset=paper --config.data.source=FOLDER
python -m vqrae_jax.train --config=configs/simvq_siglip2_l.py:preset=paper,stage=2 --config.init_from=runs/simvq_siglip2_l-preset=paper --config.data.source=FOLDER

SimVQ on SigLIP2-L/16 at its native 256 pixels: 16,384 codes of 1536 channels,
16 x 16 tokens. Two presets:

`:preset=request` (the default), as `simvq_siglip_l.py`: cosine similarity, a
ViT-L decoder.
- The request: L2, LPIPS, GAN, batch 4096, 1e-3, 30 epochs; for `:stage=2` L2,
  reduced LPIPS, distillation from the continuous latents into the quantised
  ones ("self", which holds codes to latents and not the encoder), no GAN, 1e-5,
  10 epochs.
- The PyTorch project's configs: LPIPS 1.0, GAN .75 from epoch 8, DINO
  discriminator from epoch 6 at 2e-4 to 2e-5, vq weight 1; for `:stage=2` LPIPS
  .5, distill 2.0, 1000 steps of warm-up, cosine to a tenth, AdamW (.9, .95)
  with decay .05, EMA .9999.
- VQRAE's, for what those leave open in the first: (.9, .999), decay 1e-4, clip
  1, 2000 steps of warm-up, crop and flip; EMA .999 is TiTok's (2406.07550).

`:preset=paper`, VQRAE (arXiv 2511.23386): squared L2 to the mapped basis, a
decoder that mirrors the encoder, batch 1024.
- First: L2, perceptual term, quantizer's, no GAN; 4e-4 to 1e-4 in 100,000
  steps.
- `:stage=2`: and a GAN of fixed weight .1 from step 50,000, and 1.0 times the
  distance to the encoder that it begins with ("teacher"); 70,000 steps, decoder
  1e-4 to 1e-5, encoder 1e-5, discriminator 4e-5.
- The perceptual term is TA-TiTok's (2501.07730), the mean of LPIPS and .1
  ConvNeXt-S with a weight of 1.1, so 1.0 and .1; the discriminator TiTok's.

The tower is not the paper's: `paper_siglip2_so400m.py` has that.

The encoder's weights are the published ones, fetched at the start
(`--config.init.encoder=` for random ones); the losses' networks come
beforehand, by
`python -m vqrae_jax.fetch_weights --config=configs/simvq_siglip2_l.py`.
"""

from configs import common


def get_config(arguments=None):
  arg = common.arguments(arguments, preset=('request', 'paper'), stage=(1, 2))
  paper = arg.preset == 'paper'
  config = common.base()
  config.model = dict(
    encoder=dict(name='siglip2-large-patch16-256', output_norm='plain'),
    quantizer=dict(
      name='simvq',
      num_codes=16384,
      code_dim=1536,
      distance='l2' if paper else 'cosine',
    ),
    decoder=dict(name='symmetric' if paper else 'L'),
    dtype='bfloat16',
    remat=True,
  )
  config.init.encoder = 'siglip2-large-patch16-256'
  config.data.update(image_size=256, resize=288, crop='random', flip=True)
  config.mesh.layout = 'fsdp'
  if paper:
    _paper(config, arg.stage)
  else:
    _request(config, arg.stage)
  return config


def _request(config, stage):
  config.batch_size = 4096
  if stage == 1:
    config.losses = dict(
      l2=1.0,
      lpips=1.0,
      gan=dict(weight=0.75, start=8, unit='epochs'),
      codebook=1.0,
      commit=0.25,
    )
    config.discriminator = common.dino_discriminator(
      '6 epochs', lr=2e-4, end_lr=2e-5, warmup='1 epochs'
    )
    config.schedules = common.encoder_frozen(lr=1e-3, end_lr=1e-5, warmup=2000)
    config.duration = '30 epochs'
    config.optim.update(b1=0.9, b2=0.999, weight_decay=1e-4, clip=1.0)
    config.ema = 0.999
  else:
    common.second_stage(config, duration='10 epochs')
    config.losses = dict(
      l2=1.0,
      lpips=0.5,
      codebook=1.0,
      commit=0.25,
      distill=dict(weight=2.0, target='self'),
    )
    config.schedules = ((r'.*', dict(lr=1e-5, end_lr=1e-6, warmup=1000)),)
    config.optim.update(b1=0.9, b2=0.95, weight_decay=0.05, clip=1.0)
    config.ema = 0.9999


def _paper(config, stage):
  config.batch_size = 1024
  config.losses = dict(
    l2=1.0, lpips=1.0, convnext=0.1, codebook=1.0, commit=0.25
  )
  config.schedules = common.encoder_frozen(lr=4e-4, end_lr=1e-4, warmup=2000)
  config.duration = '100000 steps'
  config.optim.update(b1=0.9, b2=0.999, weight_decay=1e-4, clip=1.0)
  config.ema = 0.999
  if stage == 2:
    common.second_stage(config, duration='70000 steps')
    config.losses.gan = dict(weight=0.1, start=50000, adaptive=False)
    config.losses.distill = dict(weight=1.0, target='teacher')
    config.teacher = 'init'
    config.discriminator = common.paper_discriminator()
    config.schedules = common.paper_second_rates()
