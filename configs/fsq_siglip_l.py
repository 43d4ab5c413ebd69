"""python -m vqrae_jax.train --config=configs/fsq_siglip_l.py --config.data.source=FOLDER

FSQ on SigLIP-L/16: levels 8, 8, 8 (512 codes) between learned projections,
values (L-1)/2 to either side in steps of one ("centered"), no post_quant. The
384-pixel weights at 224 pixels, so 14 x 14 tokens; a ViT-L decoder.

FSQ is arXiv 2309.15505, the convention the request's. Same encoder, decoder and
data as `simvq_siglip_l.py` and `vqvae_16k.py`: the three differ in their
quantizer. The numbers, line by line:
- the request: L2, LPIPS and a GAN, 1e-3, batch 4096, 30 epochs, the encoder
  frozen; a commitment term, here .25;
- the PyTorch project's first-stage configs: LPIPS 1.0 from the start; the
  adversarial weight .75, balanced, heard by the decoder from epoch 8; DINO
  discriminator from epoch 6, 2e-4 to 2e-5 after an epoch of warm-up;
- VQRAE (2511.23386), for what those leave open: AdamW (.9, .999), decay 1e-4,
  clip 1, 2000 steps of warm-up, crop and flip; EMA .999 is TiTok's
  (2406.07550).

The encoder's weights are the published ones, fetched at the start
(`--config.init.encoder=` for random ones); the losses' networks come
beforehand, by
`python -m vqrae_jax.fetch_weights --config=configs/fsq_siglip_l.py`.
"""

from configs import common


def get_config(arguments=None):
  common.arguments(arguments)
  config = common.base()
  config.model = dict(
    encoder=dict(name='siglip-large-patch16-384', output_norm='plain'),
    quantizer=dict(name='fsq', levels=(8, 8, 8), convention='centered'),
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
