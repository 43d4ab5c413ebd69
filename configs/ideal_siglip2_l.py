"""python -m vqrae_jax.train --config=configs/ideal_siglip2_l.py --config.data.source=FOLDER

IDEAL (arXiv 2606.11096, its code): 16,384 codes of 64 channels for features of
two depths of SigLIP2-L/16 (2502.14786), tokens and codes scaled to unit norm;
384 pixels, 24 x 24 tokens. A feature decoder predicts both depths from the
codes; the decoder turns its prediction of the deep one into pixels.

- Encoder: blocks 7 and 23, counted from 0; the shallow one through a norm without
  parameters, the deep one through the published norm. Fused by cross-attention
  from deep to shallow with 8 heads and an MLP twice as wide.
- Quantizer: linear maps 1024 to 64 and back, commitment .25, codebook 1, entropy
  .01.
- Feature decoder: 6 blocks of 1024 channels, MLPs of 2048, learned positions, a
  cls token and 4 registers.
- Losses: pixels 1 (L2 here), LPIPS 1, for each depth 1 - cosine and the squared
  distance, 1 each; GAN .5 from step 20,000 on both networks, a DINO
  discriminator with hinge, DiffAug and LeCam .001.
- 50 epochs, batch 256, AdamW (.9, .95) with decay .05 and clip 1, 1e-4 with a
  cosine, bf16, EMA.

Changes: a ViT-L decoder in place of its CNN (VQGAN's); no dropout (.1 there)
in the fusion; no consistency term (4 there) of the discriminator; the
discriminator's rate, RAE's; 2000 steps of warm-up; EMA's decay, .999; crops from
images of 416 to 384 pixels. IDEAL is evaluated at 256 pixels by resizing.
"""

from configs import common

SIDE = 24  # tokens


def get_config(arguments=None):
  common.arguments(arguments)
  config = common.recipe(
    encoder='siglip2-large-patch16-384',
    quantizer=dict(
      name='vq',
      num_codes=16384,
      code_dim=64,
      projection=True,
      update='gradient',
      distance='cosine',
    ),
    decoder=dict(name='L', vit=dict(grid=(SIDE, SIDE))),
    pixels=384,
  )
  config.model.encoder.update(
    layers=(7, 23), fuse='attention', output_norm=('plain', 'affine')
  )
  config.model.feature_decoder = dict(
    vit=dict(
      depth=6,
      mlp_dim=2048,
      posemb='learned',
      num_prefix_tokens=5,
      num_registers=4,
      norm_eps=1e-6,
    ),
    shallow=True,
  )
  config.losses = dict(l2=1.0, lpips=1.0, commit=0.25, codebook=1.0)
  config.losses.entropy = 0.01
  config.losses.features = dict(deep=1.0, shallow=1.0)
  config.losses.gan = dict(weight=0.5, start=20000)
  config.discriminator = common.dino_discriminator('20000 steps')
  config.discriminator.lecam = 0.001
  config.schedules = common.encoder_frozen(lr=1e-4, end_lr=0.0, warmup=2000)
  config.duration = '50 epochs'
  config.batch_size = 256
  config.optim.update(b1=0.9, b2=0.95, weight_decay=0.05, clip=1.0)
  config.ema = 0.999
  return config
