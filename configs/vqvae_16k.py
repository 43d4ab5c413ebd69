"""python -m vqrae_jax.train --config=configs/vqvae_16k.py --config.data.source=FOLDER

Plain VQ (arXiv 1711.00937) with a moving average on SigLIP-L/16: 16,384 codes
as wide as the latents (1024), decay .99, epsilon 1e-5, commitment .25. The
384-pixel weights at 224 pixels, so 14 x 14 tokens; a ViT-L decoder.

Same encoder, decoder and data as `simvq_siglip_l.py` and `fsq_siglip_l.py`: the
three differ in their quantizer. While the encoder is frozen the commitment
moves nothing and is a measure in the logs. The numbers, line by line:
- the request: L2, LPIPS and a GAN, 1e-3, batch 4096, 30 epochs, the encoder
  frozen; decay, epsilon and commitment as above;
- the PyTorch project's first-stage configs: LPIPS 1.0 from the start; the
  adversarial weight .75, balanced, heard by the decoder from epoch 8; DINO
  discriminator from epoch 6, 2e-4 to 2e-5 after an epoch of warm-up;
- VQRAE (2511.23386), for what those leave open: AdamW (.9, .999), decay 1e-4,
  clip 1, 2000 steps of warm-up, crop and flip; EMA .999 is TiTok's
  (2406.07550).

The encoder's weights are the published ones, fetched at the start
(`--config.init.encoder=` for random ones); the losses' networks come
beforehand, by
`python -m vqrae_jax.fetch_weights --config=configs/vqvae_16k.py`.
"""

from configs import common


def get_config(arguments=None):
  common.arguments(arguments)
  config = common.base()
  config.model = dict(
    encoder=dict(name='siglip-large-patch16-384', output_norm='plain'),
    quantizer=dict(
      name='vq', num_codes=16384, update='ema', decay=0.99, epsilon=1e-5
    ),
    decoder=dict(name='L', vit=dict(grid=(14, 14))),
    dtype='bfloat16',
    remat=True,
  )
  config.init.encoder = 'siglip-large-patch16-384'
  config.data.update(image_size=224, resize=256, crop='random', flip=True)
  config.losses = dict(
    l2=1.0,
    lpips=1.0,
    gan=dict(weight=0.75, start=8, unit='epochs'),
    commit=0.25,
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
