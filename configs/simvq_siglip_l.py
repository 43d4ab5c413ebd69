"""python -m vqrae_jax.train --config=configs/simvq_siglip_l.py --config.data.source=FOLDER
python -m vqrae_jax.train --config=configs/simvq_siglip_l.py:stage=2 --config.init_from=runs/simvq_siglip_l --config.data.source=FOLDER

SimVQ on SigLIP-L/16: 16,384 codes of 1536 channels by cosine similarity, a
ViT-L decoder, the 384-pixel weights at 224 pixels, so 14 x 14 tokens. SimVQ is
arXiv 2411.02038. The latents are the encoder's last norm without its affine
part, as RAE's (2510.11690).

First stage, line by line:
- the request: L2, LPIPS and a GAN, AdamW at 1e-3, batch 4096, 30 epochs, the
  encoder frozen;
- the PyTorch project's first-stage configs: LPIPS 1.0 from the start; the
  adversarial weight .75, balanced, heard by the decoder from epoch 8; DINO
  discriminator from epoch 6, 2e-4 to 2e-5 after an epoch of warm-up (its later
  SigLIP files: 4e-4 to 1e-4);
- SimVQ and the project's vq weight of 1: codebook 1, commitment .25;
- VQRAE (2511.23386), for what those leave open: betas .9 and .999, decay 1e-4,
  clip 1, 2000 steps of warm-up, crop and flip; EMA .999 is TiTok's
  (2406.07550).

`:stage=2` opens the encoder:
- the request: L2, reduced LPIPS, distillation of the continuous latents into
  the quantised ones (`distill`, target "self"), no GAN, 1e-5, 10 epochs. Here
  its gradient ends at the codes (`losses/latent.py` says why), and nothing
  holds the encoder itself: the paper's teacher does,
  `--config.losses.distill.target=teacher --config.teacher=init`;
- the PyTorch project's second-stage config: LPIPS .5, distill 2.0, codebook 1,
  commitment .25, cosine to a tenth, 1000 steps of warm-up, AdamW (.9, .95)
  with decay .05, EMA .9999.

`:frozen=False` trains the encoder from the start. Where the encoder moves,
`,open=6` opens its last 6 blocks of 24 only, `,decay=0.8` lets each block learn
at .8 of the rate above it.

The encoder's weights are the published ones, fetched at the start
(`--config.init.encoder=` for random ones); the losses' networks come
beforehand, by
`python -m vqrae_jax.fetch_weights --config=configs/simvq_siglip_l.py`.
"""

from configs import common

BLOCKS = 24


def get_config(arguments=None):
  arg = common.arguments(
    arguments, stage=(1, 2), frozen=True, open=BLOCKS, decay=1.0
  )
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
  config.batch_size = 4096
  config.mesh.layout = 'fsdp'
  if arg.stage == 1:
    config.losses = dict(
      l2=1.0,
      lpips=1.0,
      gan=dict(weight=0.75, start=8, unit='epochs'),
      codebook=1.0,
      commit=0.25,
    )
    config.discriminator = common.dino_discriminator(
      '6 epochs', lr=2e-4, end_lr=2e-5, warmup='1 epochs'
    )
    config.duration = '30 epochs'
    rate = dict(lr=1e-3, end_lr=1e-5, warmup=2000)
    config.optim.update(b1=0.9, b2=0.999, weight_decay=1e-4, clip=1.0)
    config.ema = 0.999
  else:
    common.second_stage(config, duration='10 epochs')
    config.losses = dict(
      l2=1.0,
      lpips=0.5,
      codebook=1.0,
      commit=0.25,
      distill=dict(weight=2.0, target='self'),
    )
    rate = dict(lr=1e-5, end_lr=1e-6, warmup=1000)
    config.optim.update(b1=0.9, b2=0.95, weight_decay=0.05, clip=1.0)
    config.ema = 0.9999
  if arg.stage == 2 or not arg.frozen:
    config.schedules = common.encoder_open(
      depth=BLOCKS, last=arg.open, decay=arg.decay, **rate
    )
  elif (arg.open, arg.decay) != (BLOCKS, 1.0):
    raise ValueError(
      f'config arguments open={arg.open}, decay={arg.decay} move an encoder '
      'that is frozen here; they go with stage=2 or frozen=False'
    )
  else:
    config.schedules = common.encoder_frozen(**rate)
  return config
