"""python -m vqrae_jax.train --config=configs/simvq_siglip_l.py --config.data.source=FOLDER

SimVQ on SigLIP-L/16: 16,384 codes of 1536 channels, cosine distance, a ViT-L
decoder, 224 pixels, the encoder frozen. The request's recipe, pixel losses
only so far; the encoder's weights are random until published ones can be
read, and it trains from scratch with `:frozen=False`.
"""

from configs import common


def get_config(arguments=None):
  arg = common.arguments(arguments, frozen=True)
  config = common.base()
  config.model = dict(
    encoder=dict(name='siglip-large-patch16-384'),
    quantizer=dict(
      name='simvq', num_codes=16384, code_dim=1536, distance='cosine'
    ),
    decoder=dict(name='L', vit=dict(grid=(14, 14))),
    dtype='bfloat16',
    remat=True,
  )
  config.data.update(image_size=224, resize=256)
  config.losses = dict(l2=1.0, codebook=1.0, commit=0.25)
  rows = [(r'.*', dict(lr=1e-3, end_lr=1e-5, warmup=2000))]
  if arg.frozen:
    rows.insert(0, (r'encoder/.*', None))
  config.schedules = tuple(rows)
  config.duration = '30 epochs'
  config.batch_size = 4096
  config.optim.weight_decay = 1e-4
  config.mesh.layout = 'fsdp'
  return config
