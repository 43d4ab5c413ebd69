"""python -m vqrae_jax.train --config=configs/fsq_siglip_l.py --config.data.source=FOLDER

FSQ (arXiv 2309.15505) on SigLIP-L/16: levels 8, 8, 8 (512 codes) between learned
projections, values from -(L-1)/2 to (L-1)/2 in steps of one ("centered", the
convention of the original specification), no post_quant. The 384-pixel weights
at 224 pixels, so 14 x 14 tokens; a ViT-L decoder.

Same encoder, decoder and data as `simvq_siglip_l.py` and `vqvae_16k.py`: the
three differ in their quantizer. The training is `common.original`'s, with the
specification's commitment term, here .25.
"""

from configs import common


def get_config(arguments=None):
  common.arguments(arguments)
  config = common.siglip_l(
    dict(name='fsq', levels=(8, 8, 8), convention='centered')
  )
  common.original(config, commit=0.25)
  return config
