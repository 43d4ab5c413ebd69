"""python -m vqrae_jax.train --config=configs/internvit_6b.py --config.data.source=FOLDER
python -m vqrae_jax.train --config=configs/internvit_6b.py:stage=2 --config.init_from=runs/internvit_6b --config.data.source=FOLDER

SimVQ on InternViT-6B V2.5 (arXiv 2412.05271, 45 blocks of 3200): 16,384 codes
of 1536 channels by squared L2 to the mapped basis, and a ViT-XL decoder. The
encoder reads 224 pixels; the decoder has patches of 16: 256 pixels from 16 x 16
tokens.

The training is VQRAE's for InternViT (`common.vqrae`, 2511.23386): batch 768,
45,000 steps; `:stage=2` trains the encoder too, for 60,000 (after `:decoder=D`
`:decoder=D,stage=2` with `--config.init_from=runs/internvit_6b-decoder=D`).
`:decoder=symmetric` mirrors the encoder as the paper does (a decoder of 5.5
billion parameters); XL is this recipe's choice, B and L are smaller.

Parameters are sharded over all devices ("fsdp") and the backward pass
recomputes blocks (`remat`): the frozen encoder alone takes 22 GB in f32.
"""

from configs import common


def get_config(arguments=None):
  arg = common.arguments(
    arguments, decoder=('XL', 'symmetric', 'B', 'L'), stage=(1, 2)
  )
  config = common.recipe(
    encoder='internvit-6b-448px-v2_5',
    quantizer=common.simvq('l2'),
    decoder=dict(name=arg.decoder, vit=dict(patch_size=16, grid=(16, 16))),
  )
  common.vqrae(config, arg.stage, batch=768, steps=(45000, 60000))
  return config
