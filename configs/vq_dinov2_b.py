"""python -m vqrae_jax.train --config=configs/vq_dinov2_b.py --config.data.source=FOLDER

VQ (arXiv 1711.00937) with an EMA codebook on DINOv2-B: 8192 codes as wide as
the latents (768), a ViT-B decoder. The encoder reads 224 pixels in patches of
14; the decoder has patches of 16: 256 pixels from 16 x 16 tokens.

The encoder is the one with registers, as in RAE (2510.11690), whose published
decoders a run can start from. The training is `common.rae`'s, without noise on
the latents, which become discrete tokens. The quantizer's decay .99, epsilon
1e-5 and commitment .25 are the usual ones; while the encoder is frozen, the
commitment loss trains nothing and is only a metric in the logs.

`vq_dinov2_b_decxl.py` is the same with RAE's ViT-XL decoder.
"""

from configs import common


def get_config(arguments=None):
  common.arguments(arguments)
  config = common.recipe(
    encoder='dinov2-with-registers-base',
    quantizer=dict(
      name='vq', num_codes=8192, update='ema', decay=0.99, epsilon=1e-5
    ),
    decoder=dict(name='B'),
    resize=384,
    flip=False,
    remat=False,
    layout='dp',
  )
  common.rae(config, commit=0.25)
  return config
