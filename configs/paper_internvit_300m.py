"""python -m vqrae_jax.train --config=configs/paper_internvit_300m.py --config.data.source=FOLDER
python -m vqrae_jax.train --config=configs/paper_internvit_300m.py:stage=2 --config.init_from=runs/paper_internvit_300m --config.data.source=FOLDER

VQRAE-InternViT (arXiv 2511.23386): SimVQ with 16,384 codes of 1536 channels by
squared L2 to the mapped basis on InternViT-300M (2412.05271; 24 blocks of 1024),
a decoder that mirrors the encoder. The encoder reads 224 pixels in patches of
14; the decoder has patches of 16: 256 pixels from 16 x 16 tokens. The V2.5
weights are this recipe's choice.

The training is `common.vqrae`'s: batch 768, 45,000 steps; `:stage=2` trains the
encoder too, for 60,000.
"""

from configs import common


def get_config(arguments=None):
  arg = common.arguments(arguments, stage=(1, 2))
  config = common.recipe(
    encoder='internvit-300m-448px-v2_5',
    quantizer=common.simvq('l2'),
    decoder=dict(name='symmetric', vit=dict(patch_size=16, grid=(16, 16))),
  )
  common.vqrae(config, arg.stage, batch=768, steps=(45000, 60000))
  return config
