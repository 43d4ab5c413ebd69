"""python -m vqrae_jax.train --config=configs/vq_dinov2_b.py --config.data.source=FOLDER

VQ with a moving average on DINOv2-B: 8192 codes as wide as the latents (768),
a ViT-B decoder. The encoder sees 224 pixels in patches of 14, the decoder
paints patches of 16: 256 pixels from 16 x 16 tokens.

The encoder is the one with registers: it is RAE's (arXiv 2510.11690), whose
published decoders are the ones to start from. The numbers are those of RAE's
trainer, line by line:
- losses: L1, 1.0 LPIPS from the start, .75 adversarial, balanced, heard by the
  decoder from epoch 8;
- DINO discriminator: learns from epoch 6, 2e-4 to 2e-5 after an epoch of
  warm-up;
- AdamW (.9, .95), no decay, 2e-4 to 2e-5 after an epoch of warm-up, batch 512,
  16 epochs, EMA .9978; clip 1 is the PyTorch project's (VQ DINOv2-B XL);
- data: crops of 256 from 384 (1.5 times), no flips;
- no noise on the latents: they become discrete tokens.

VQ is arXiv 1711.00937 with the usual decay .99, epsilon 1e-5 and commitment
.25; while the encoder is frozen the commitment moves nothing and is a measure
in the logs.

The encoder's weights are the published ones, fetched at the start
(`--config.init.encoder=` for random ones); the losses' networks come
beforehand, by
`python -m vqrae_jax.fetch_weights --config=configs/vq_dinov2_b.py`.
"""

from configs import common


def get_config(arguments=None):
  common.arguments(arguments)
  config = common.base()
  config.model = dict(
    encoder=dict(name='dinov2-with-registers-base', output_norm='plain'),
    quantizer=dict(
      name='vq', num_codes=8192, update='ema', decay=0.99, epsilon=1e-5
    ),
    decoder=dict(name='B'),
    dtype='bfloat16',
    remat=False,
  )
  config.init.encoder = 'dinov2-with-registers-base'
  config.data.update(image_size=256, resize=384, crop='random', flip=False)
  config.losses = dict(
    l1=1.0,
    lpips=1.0,
    gan=dict(weight=0.75, start=8, unit='epochs'),
    commit=0.25,
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
  return config
