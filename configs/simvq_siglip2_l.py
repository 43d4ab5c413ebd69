"""python -m vqrae_jax.train --config=configs/simvq_siglip2_l.py --config.data.source=FOLDER
python -m vqrae_jax.train --config=configs/simvq_siglip2_l.py:stage=2 --config.init_from=runs/simvq_siglip2_l --config.data.source=FOLDER
python -m vqrae_jax.train --config=configs/simvq_siglip2_l.py:preset=paper --config.data.source=FOLDER
python -m vqrae_jax.train --config=configs/simvq_siglip2_l.py:preset=paper,stage=2 --config.init_from=runs/simvq_siglip2_l-preset=paper --config.data.source=FOLDER

SimVQ on SigLIP2-L/16 at its native 256 pixels: 16,384 codes of 1536 channels,
16 x 16 tokens. Two presets:

`:preset=request` (the default), the original specification, as
`simvq_siglip_l.py`: cosine similarity, a ViT-L decoder, `common.original` and
`common.original_second`.

`:preset=paper`, VQRAE (arXiv 2511.23386): squared L2 to the mapped basis, a
decoder that mirrors the encoder, `common.vqrae` at batch 1024 for 100,000 steps
and, with `,stage=2`, 70,000; `paper_siglip2_so400m.py` has the paper's encoder.
"""

from configs import common


def get_config(arguments=None):
  arg = common.arguments(arguments, preset=('request', 'paper'), stage=(1, 2))
  paper = arg.preset == 'paper'
  config = common.recipe(
    encoder='siglip2-large-patch16-256',
    quantizer=common.simvq('l2' if paper else 'cosine'),
    decoder=dict(name='symmetric' if paper else 'L'),
  )
  if paper:
    common.vqrae(config, arg.stage, batch=1024, steps=(100000, 70000))
  elif arg.stage == 1:
    common.original(config, codebook=1.0, commit=0.25)
  else:
    common.original_second(config)
  return config
