"""python -m vqrae_jax.train --config=configs/rae_dinov2_b.py --config.data.source=FOLDER

A continuous autoencoder, RAE (arXiv 2510.11690): DINOv2-B with registers,
nothing quantised, a ViT-XL decoder that paints from 16 x 16 latents of 768
channels; 224 pixels in, 256 out. It gives no tokens: it is what
`vq_dinov2_b_decxl.py` is measured against, the same in all but the quantizer
and the noise.

The numbers are those of RAE's trainer, line by line:
- losses: L1, 1.0 LPIPS from the start, .75 adversarial, balanced, heard by the
  decoder from epoch 8;
- noise on the latents in training, N(0, 1) times U[0, .8), one U an image;
- DINO discriminator: learns from epoch 6, 2e-4 to 2e-5 after an epoch of
  warm-up;
- AdamW (.9, .95), no decay, 2e-4 to 2e-5 after an epoch of warm-up, batch 512,
  16 epochs, EMA .9978, the encoder frozen; clip 1 is the PyTorch project's
  (VQ DINOv2-B XL);
- data: crops of 256 from 384 (1.5 times), no flips.

The encoder's weights are the published ones, fetched at the start
(`--config.init.encoder=` for random ones); the losses' networks come
beforehand, by
`python -m vqrae_jax.fetch_weights --config=configs/rae_dinov2_b.py`. The
published decoder comes by `--config.init.decoder=rae:FILE`.
"""

from configs import common


def get_config(arguments=None):
  common.arguments(arguments)
  config = common.base()
  config.model = dict(
    encoder=dict(name='dinov2-with-registers-base', output_norm='plain'),
    quantizer=dict(name='none'),
    decoder=dict(name='XL'),
    dtype='bfloat16',
    remat=True,
  )
  config.init.encoder = 'dinov2-with-registers-base'
  config.data.update(image_size=256, resize=384, crop='random', flip=False)
  config.noise_tau = 0.8
  config.losses = dict(
    l1=1.0,
    lpips=1.0,
    gan=dict(weight=0.75, start=8, unit='epochs'),
  )
  config.discriminator = common.dino_discriminator(
    '6 epochs', lr=2e-4, end_lr=2e-5, warmup='1 epochs'
  )
  config.schedules = common.encoder_frozen(
    lr=2e-4, end_lr=2e-5, warmup='1 epochs'
  )
  config.duration = '16 epochs'
  config.batch_size = 512
  config.optim.update(b1=0.9, b2=0.95, weight_decay=0.0, clip=1.0)
  config.ema = 0.9978
  config.mesh.layout = 'fsdp'
  return config
