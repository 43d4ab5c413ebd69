"""python -m vqrae_jax.train --config=configs/quickstart.py

A small tokenizer from scratch on eight photographs, on two CPU cores, in
minutes: 64-pixel crops, patch 8, FSQ with 64,000 codes, l2. Three photographs
stay out of training and are what it is measured on. Arguments: `:steps=500`,
`:lr=1e-3`.
"""

from configs import common

HELD_OUT = ('astronaut', 'chelsea', 'coffee')


def get_config(arguments=None):
  arg = common.arguments(arguments, steps=500, lr=1e-3)
  config = common.base()
  config.model = dict(
    encoder=dict(vit=common.vit(width=192, depth=4, patch=8, pixels=64)),
    quantizer=dict(name='fsq', levels=(8, 8, 8, 5, 5, 5), convention='cosmos'),
    decoder=dict(
      vit=common.vit(width=192, depth=4, patch=8, pixels=64, posemb='sincos2d')
    ),
  )
  config.data.update(source='bundled:photos', exclude=HELD_OUT, image_size=64)
  config.losses = dict(l2=1.0)
  config.schedules = ((r'.*', dict(lr=arg.lr, warmup=arg.steps // 10)),)
  config.duration = f'{arg.steps} steps'
  config.batch_size = 32
  config.ema = 0.99
  config.eval = dict(source='bundled:photos', include=HELD_OUT, tile=64)
  return config
