"""python -m vqrae_jax.train --config=configs/vqvae_16k.py --config.data.source=FOLDER

Plain VQ (arXiv 1711.00937) with a moving average on SigLIP-L/16: 16,384 codes
as wide as the latents (1024); decay .99, epsilon 1e-5 and commitment .25 are the
original specification's. The 384-pixel weights at 224 pixels, so 14 x 14 tokens;
a ViT-L decoder.

Same encoder, decoder and data as `simvq_siglip_l.py` and `fsq_siglip_l.py`: the
three differ in their quantizer. The training is `common.original`'s. While the
encoder is frozen the commitment moves nothing and is a measure in the logs.
"""

from configs import common


def get_config(arguments=None):
  common.arguments(arguments)
  config = common.siglip_l(
    dict(name='vq', num_codes=16384, update='ema', decay=0.99, epsilon=1e-5)
  )
  common.original(config, commit=0.25)
  return config
