"""python -m vqrae_jax.train --config=configs/simvq_siglip_l.py --config.data.source=FOLDER
python -m vqrae_jax.train --config=configs/simvq_siglip_l.py:stage=2 --config.init_from=runs/simvq_siglip_l --config.data.source=FOLDER

SimVQ (arXiv 2411.02038) on SigLIP-L/16: 16,384 codes of 1536 channels by cosine
similarity, a ViT-L decoder, the 384-pixel weights at 224 pixels, so 14 x 14
tokens. The training is `common.original`'s with a codebook term of 1 and a
commitment of .25, as in SimVQ, and as with a vq weight of 1 in the PyTorch
project.

`:stage=2` trains the encoder too (`common.original_second`); `:frozen=False`
does so from the start. With either, `,open=6` trains only the last 6 of its 24
blocks, and `,decay=0.8` gives each block .8 of the rate of the one above it.
"""

from configs import common

BLOCKS = 24


def get_config(arguments=None):
  arg = common.arguments(
    arguments, stage=(1, 2), frozen=True, open=BLOCKS, decay=1.0
  )
  config = common.siglip_l(common.simvq('cosine'))
  if arg.stage == 1:
    rate = common.original(config, codebook=1.0, commit=0.25)
  else:
    rate = common.original_second(config)
  if arg.stage == 2 or not arg.frozen:
    config.schedules = common.encoder_open(
      depth=BLOCKS, last=arg.open, decay=arg.decay, **rate
    )
  elif (arg.open, arg.decay) != (BLOCKS, 1.0):
    raise ValueError(
      f'config arguments open={arg.open}, decay={arg.decay} need an '
      'encoder that is trained; add stage=2 or frozen=False'
    )
  return config
