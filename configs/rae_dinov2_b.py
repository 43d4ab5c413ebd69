"""python -m vqrae_jax.train --config=configs/rae_dinov2_b.py --config.data.source=FOLDER

A continuous autoencoder, RAE (arXiv 2510.11690): DINOv2-B with registers, no
quantizer, a ViT-XL decoder on 16 x 16 latents of 768 channels; 224 pixels in,
256 out. It gives no tokens; it is the baseline of `vq_dinov2_b_decxl.py`, which
differs in the quantizer and the noise only.

The training is `common.rae`'s, with RAE's noise on the latents, N(0, 1) times
U[0, .8), one U per image. The published decoder is loaded by
`--config.init.decoder=rae:FILE`; it was trained on images resized from 256 to
224 pixels by torch's bicubic filter,
`--config.model.encoder.resize=torch_bicubic`.
"""

from configs import common


def get_config(arguments=None):
  common.arguments(arguments)
  config = common.recipe(
    encoder='dinov2-with-registers-base',
    quantizer=dict(name='none'),
    decoder=dict(name='XL'),
    resize=384,
    flip=False,
  )
  # The default, set here so that a flag can change it.
  config.model.encoder.resize = 'bicubic'
  config.noise_tau = 0.8
  common.rae(config)
  return config
