"""python -m vqrae_jax.train --config=configs/fsq_cosmos_64k.py --config.data.source=FOLDER

FSQ with 64,000 codes on SigLIP2-B/16: levels 8, 8, 8, 5, 5, 5 in the paper's
convention (arXiv 2309.15505, as in NVIDIA Cosmos), learned projections, a
1 x 1 convolution on the codes (post_quant), a ViT-XL decoder; 256 pixels,
16 x 16 tokens. The convention has no auxiliary loss.

The encoder is RAE's SigLIP2 (arXiv 2510.11690). The numbers, line by line:
- the request: L2, LPIPS and a GAN, 1e-3, batch 4096, 30 epochs, the encoder
  frozen;
- the PyTorch project's first-stage configs: LPIPS 1.0 from the start; the
  adversarial weight .75, balanced, heard by the decoder from epoch 8; DINO
  discriminator from epoch 6, 2e-4 to 2e-5 after an epoch of warm-up;
- VQRAE (2511.23386), for what those leave open: AdamW (.9, .999), decay 1e-4,
  clip 1, 2000 steps of warm-up, crop and flip; EMA .999 is TiTok's
  (2406.07550).

The encoder's weights are the published ones, fetched at the start
(`--config.init.encoder=` for random ones); the losses' networks come
beforehand, by
`python -m vqrae_jax.fetch_weights --config=configs/fsq_cosmos_64k.py`.
"""

from configs import common


def get_config(arguments=None):
  common.arguments(arguments)
  config = common.base()
  config.model = dict(
    encoder=dict(name='siglip2-base-patch16-256', output_norm='plain'),
    quantizer=dict(
      name='fsq',
      levels=(8, 8, 8, 5, 5, 5),
      convention='cosmos',
      epsilon=1e-3,
      projection=True,
      post_quant=dict(kernel=1, space='code'),
    ),
    decoder=dict(name='XL'),
    dtype='bfloat16',
    remat=True,
  )
  config.init.encoder = 'siglip2-base-patch16-256'
  config.data.update(image_size=256, resize=288, crop='random', flip=True)
  config.losses = dict(
    l2=1.0,
    lpips=1.0,
    gan=dict(weight=0.75, start=8, unit='epochs'),
  )
  config.discriminator = common.dino_discriminator(
    '6 epochs', lr=2e-4, end_lr=2e-5, warmup='1 epochs'
  )
  config.schedules = common.encoder_frozen(lr=1e-3, end_lr=1e-5, warmup=2000)
  config.duration = '30 epochs'
  config.batch_size = 4096
  config.optim.update(b1=0.9, b2=0.999, weight_decay=1e-4, clip=1.0)
  config.ema = 0.999
  config.mesh.layout = 'fsdp'
  return config
