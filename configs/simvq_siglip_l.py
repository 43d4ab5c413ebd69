"""python -m vqrae_jax.train --config=configs/simvq_siglip_l.py --config.data.source=FOLDER

SimVQ on SigLIP-L/16: 16,384 codes of 1536 channels by cosine similarity, a
ViT-L decoder, the 384-pixel weights at 224 pixels, so 14 x 14 tokens.

The request's recipe: L2, AdamW at 1e-3, batch 4096, 30 epochs with the encoder
frozen. What it leaves open (betas, warm-up, crop and flip) is VQRAE's (arXiv
2511.23386); SimVQ is 2411.02038. The latents are the encoder's last norm
without its affine part, as RAE's (2510.11690).

`:stage=2` with `--config.init_from=runs/simvq_siglip_l` goes on for 10 epochs
at 1e-5 with the encoder open; what the decoder reads is kept near the
continuous latents (`distill`, target "self", as the request has it; "teacher"
with `--config.teacher=init` is the paper's). `:frozen=False` trains the encoder
from the start.

The encoder's weights are the published ones, fetched at the start
(`--config.init.encoder=` for random ones). Not here yet: LPIPS and the GAN.
"""

from configs import common


def get_config(arguments=None):
  arg = common.arguments(arguments, stage=(1, 2), frozen=True)
  config = common.base()
  config.model = dict(
    encoder=dict(name='siglip-large-patch16-384', output_norm='plain'),
    quantizer=dict(
      name='simvq', num_codes=16384, code_dim=1536, distance='cosine'
    ),
    decoder=dict(name='L', vit=dict(grid=(14, 14))),
    dtype='bfloat16',
    remat=True,
  )
  config.init.encoder = 'siglip-large-patch16-384'
  config.data.update(image_size=224, resize=256, crop='random', flip=True)
  config.losses = dict(l2=1.0, codebook=1.0, commit=0.25)
  rate = dict(lr=1e-3, end_lr=1e-5, warmup=2000)
  config.schedules = (
    common.encoder_frozen(**rate) if arg.frozen else ((r'.*', rate),)
  )
  config.duration = '30 epochs'
  config.batch_size = 4096
  config.optim.update(b1=0.9, b2=0.999, weight_decay=1e-4, clip=1.0)
  config.ema = 0.999
  config.mesh.layout = 'fsdp'
  if arg.stage == 2:
    common.second_stage(
      config,
      duration='10 epochs',
      distill='self',
      lr=1e-5,
      end_lr=1e-6,
      warmup=2000,
    )
  return config
