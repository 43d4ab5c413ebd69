"""python -m vqrae_jax.train --config=configs/vqvae_16k.py --config.data.source=FOLDER

Plain VQ (arXiv 1711.00937) with an EMA codebook on SigLIP-L/16: 16,384 codes as
wide as the latents (1024); decay .99, epsilon 1e-5 and commitment .25 are the
original specification's. Encoder, decoder and data are those of
`simvq_siglip_l.py` and `fsq_siglip_l.py`: the three differ in their quantizer.

The training is `common.original`'s. While the encoder is frozen, the commitment
loss trains nothing and is only a metric in the logs.
"""

from configs import common


def get_config(arguments=None):
  common.arguments(arguments)
  config = common.siglip_l(
    dict(name='vq', num_codes=16384, update='ema', decay=0.99, epsilon=1e-5)
  )
  common.original(config, commit=0.25)
  return config
