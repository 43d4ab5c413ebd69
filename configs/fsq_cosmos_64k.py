"""python -m vqrae_jax.train --config=configs/fsq_cosmos_64k.py --config.data.source=FOLDER

FSQ with 64,000 codes on SigLIP2-B/16: levels 8, 8, 8, 5, 5, 5 in the paper's
convention (arXiv 2309.15505, as in NVIDIA Cosmos), learned projections, a
1 x 1 convolution on the codes (post_quant), a ViT-XL decoder; 256 pixels,
16 x 16 tokens. The convention has no auxiliary loss. The encoder is RAE's
SigLIP2 (2510.11690), the training `common.original`'s.
"""

from configs import common


def get_config(arguments=None):
  common.arguments(arguments)
  config = common.recipe(
    encoder='siglip2-base-patch16-256',
    quantizer=dict(
      name='fsq',
      levels=(8, 8, 8, 5, 5, 5),
      convention='cosmos',
      epsilon=1e-3,
      projection=True,
      post_quant=dict(kernel=1, space='code'),
    ),
    decoder=dict(name='XL'),
  )
  common.original(config)
  return config
