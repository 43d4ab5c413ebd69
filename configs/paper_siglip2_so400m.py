"""python -m vqrae_jax.train --config=configs/paper_siglip2_so400m.py --config.data.source=FOLDER
python -m vqrae_jax.train --config=configs/paper_siglip2_so400m.py:stage=2 --config.init_from=runs/paper_siglip2_so400m --config.data.source=FOLDER

VQRAE-SigLIP2 (arXiv 2511.23386): SimVQ with 16,384 codes of 1536 channels by
squared L2 to the mapped basis on SigLIP2-so400m (2502.14786; 27 blocks of 1152),
a decoder that mirrors the encoder; 256 pixels, 16 x 16 tokens. The encoder of
patch 16 at 256 pixels is this recipe's choice among the published ones.

The training is `common.vqrae`'s: batch 1024, 100,000 steps; `:stage=2` trains
the encoder too, for 70,000.
"""

from configs import common


def get_config(arguments=None):
  arg = common.arguments(arguments, stage=(1, 2))
  config = common.recipe(
    encoder='siglip2-so400m-patch16-256',
    quantizer=common.simvq('l2'),
    decoder=dict(name='symmetric'),
  )
  common.vqrae(config, arg.stage, batch=1024, steps=(100000, 70000))
  return config
