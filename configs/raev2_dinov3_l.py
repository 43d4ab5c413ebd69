"""python -m vqrae_jax.train --config=configs/raev2_dinov3_l.py --config.data.source=FOLDER

RAEv2 (arXiv 2605.18324, its code): a continuous autoencoder on the mean of
several blocks of DINOv3-L/16 (2508.10104), a ViT-XL decoder; 256 pixels, 16 x 16
latents of 1024 channels. It gives no tokens.

- The blocks are 1 to 23, counted from 0 (K = 23 of RAEv2); `:blocks=7` takes 11,
  13, …, 23. Each output passes the published final norm with its affine part;
  the last one's mean over tokens is added to their mean.
- Pixels are normalized by ImageNet's mean and std; images are not resized, as
  encoder and decoder both have patches of 16.
- The training is RAE's (`common.rae`, 2510.11690) unchanged: noise of .8 on the
  latents, L1, LPIPS 1, GAN .75 from epoch 8 with a DINO discriminator from
  epoch 6, AdamW (.9, .95) at 2e-4 to 2e-5 after an epoch of warm-up, batch 512,
  16 epochs, EMA .9978, here without clipping. Its discriminator's norm is called
  "bn" in RAEv2's file; ours is RAE's instance norm.

DINOv3's weights have Meta's own licence (`docs/encoders.md`).
"""

from configs import common

BLOCKS = {23: tuple(range(1, 24)), 7: tuple(range(11, 24, 2))}


def get_config(arguments=None):
  arg = common.arguments(arguments, blocks=(23, 7))
  config = common.recipe(
    encoder='dinov3-vitl16-pretrain-lvd1689m',
    quantizer=dict(name='none'),
    decoder=dict(name='XL'),
    resize=384,
    flip=False,
  )
  config.model.encoder.update(
    output_norm='affine',
    layers=BLOCKS[arg.blocks],
    fuse='mean',
    add_final_mean=True,
  )
  config.noise_tau = 0.8
  common.rae(config)
  config.optim.clip = None
  return config
