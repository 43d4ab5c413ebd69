"""python -m vqrae_jax.train --config=configs/quickstart.py

A small tokenizer from scratch on eight images, on two CPU cores, in minutes:
64-pixel crops, patch 8, FSQ with 64,000 codes, L2. It is evaluated on three
other images. Arguments: `:steps=4000`, `:lr=1e-3`.

What makes so short a run work, found by trial (docs/results.md): many small
steps (batch 8) of a small model (two blocks of 128 channels in encoder and
decoder), a second moment that forgets the first large gradients (b2 = .95), and
images scaled down at random, so that crops contain detail.
"""

from configs import common

HELD_OUT = ('astronaut', 'chelsea', 'coffee')


def get_config(arguments=None):
  arg = common.arguments(arguments, steps=4000, lr=1e-3)
  config = common.base()
  levels = dict(levels=(8, 8, 8, 5, 5, 5), convention='cosmos')
  config.model = common.small_model(8, 64, dict(name='fsq', **levels), 128)
  config.data.update(
    source='bundled:photos', exclude=HELD_OUT, image_size=64, resize=(100, 400)
  )
  config.losses = dict(l2=1.0)
  config.schedules = ((r'.*', dict(lr=arg.lr, warmup=arg.steps // 12)),)
  config.optim.b2 = 0.95
  config.duration = f'{arg.steps} steps'
  config.batch_size = 8
  config.ema = 0.99
  config.log.update(every=100, images_every=max(arg.steps // 5, 1))
  config.eval.update(source='bundled:photos', include=HELD_OUT, tile=64)
  return config
