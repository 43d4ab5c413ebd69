"""python -m vqrae_jax.train --config=configs/vq_dinov2_b_decxl.py --config.data.source=FOLDER

`vq_dinov2_b.py` with the ViT-XL decoder, the size of RAE's published ones
(arXiv 2510.11690); `--config.init.decoder=rae:FILE` loads one.

The PyTorch project's file for this model has other numbers (GAN .8 from step
10,000, 1e-4, 100 epochs of batch 64, EMA .9999); its other first-stage files
have RAE's, and so does this recipe.
"""

from configs import vq_dinov2_b


def get_config(arguments=None):
  config = vq_dinov2_b.get_config(arguments)
  config.model.decoder.name = 'XL'
  config.model.remat = True
  config.mesh.layout = 'fsdp'
  return config
