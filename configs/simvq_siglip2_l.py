"""python -m vqrae_jax.train --config=configs/simvq_siglip2_l.py --config.data.source=FOLDER

SimVQ on SigLIP2-L/16 at its native 256 pixels: 16,384 codes of 1536 channels,
16 x 16 tokens. Two presets:

`:preset=request` (the default): the request's numbers, as in
`simvq_siglip_l.py`: cosine similarity, a ViT-L decoder, batch 4096, 1e-3, 30
epochs, and 10 at 1e-5 for `:stage=2`.

`:preset=paper`: VQRAE's (arXiv 2511.23386): squared L2 to the mapped basis, a
decoder that mirrors the encoder, batch 1024, 4e-4 to 1e-4 in 100,000 steps;
for `:stage=2` 70,000 steps, decoder 1e-4 to 1e-5, encoder at 1e-5. The tower
is not the paper's largest.

The second stage wants `--config.init_from=runs/simvq_siglip2_l`. It distils:
the request's from the continuous latents into the quantised ones ("self"), the
paper's from the encoder that it begins with ("teacher").

The encoder's weights are the published ones, fetched at the start
(`--config.init.encoder=` for random ones). Not here yet: the
perceptual term and the GAN.
"""

from configs import common


def get_config(arguments=None):
  arg = common.arguments(arguments, preset=('request', 'paper'), stage=(1, 2))
  paper = arg.preset == 'paper'
  config = common.base()
  config.model = dict(
    encoder=dict(name='siglip2-large-patch16-256', output_norm='plain'),
    quantizer=dict(
      name='simvq',
      num_codes=16384,
      code_dim=1536,
      distance='l2' if paper else 'cosine',
    ),
    decoder=dict(name='symmetric' if paper else 'L'),
    dtype='bfloat16',
    remat=True,
  )
  config.init.encoder = 'siglip2-large-patch16-256'
  config.data.update(image_size=256, resize=288, crop='random', flip=True)
  config.losses = dict(l2=1.0, codebook=1.0, commit=0.25)
  config.optim.update(b1=0.9, b2=0.999, weight_decay=1e-4, clip=1.0)
  config.ema = 0.999
  config.mesh.layout = 'fsdp'
  if paper:
    config.batch_size = 1024
    config.duration = '100000 steps'
    config.schedules = common.encoder_frozen(lr=4e-4, end_lr=1e-4, warmup=2000)
  else:
    config.batch_size = 4096
    config.duration = '30 epochs'
    config.schedules = common.encoder_frozen(lr=1e-3, end_lr=1e-5, warmup=2000)
  if arg.stage == 2 and paper:
    common.second_stage(
      config,
      duration='70000 steps',
      distill='teacher',
      lr=1e-4,
      end_lr=1e-5,
      warmup=2000,
    )
    still = dict(lr=1e-5, end_lr=1e-5, warmup=2000)
    config.schedules = ((r'encoder/.*', still), *config.schedules)
  elif arg.stage == 2:
    common.second_stage(
      config,
      duration='10 epochs',
      distill='self',
      lr=1e-5,
      end_lr=1e-6,
      warmup=2000,
    )
  return config
