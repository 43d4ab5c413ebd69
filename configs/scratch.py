"""python -m vqrae_jax.train --config=configs/scratch.py:quantizer=vq --config.data.source=DATA

A small tokenizer from scratch, in minutes on two CPU cores: two ViTs of two
blocks of 128 channels, patch 4, 10 bits a token, L2 alone. Arguments:
`:quantizer=vq` (EMA, 1024 codes), "simvq" (1024), "fsq" (8 x 5 x 5 x 5 levels,
9.97 bits) or "none" (continuous); `:pixels=32` (64 tokens an image) or 64 (256);
`:steps=1000`. `benchmarks/scratch.py` compares them; `examples/maskgit` and
`examples/ar` generate the tokens of VQ on CIFAR-10.

Rates and the weights of the quantizers' losses are those of
`benchmarks/cifar.py`: `commit` is .02 because L2 is of pixels in [0, 1].
"""

from configs import common

WIDTH, CODES = 128, 1024
# name: (the quantizer, the weights of its losses)
QUANTIZERS = {
  'vq': (dict(name='vq', num_codes=CODES), dict(commit=0.02)),
  'simvq': (
    dict(name='simvq', num_codes=CODES, code_dim=WIDTH),
    dict(codebook=1.0, commit=0.02),
  ),
  'fsq': (dict(name='fsq', levels=(8, 5, 5, 5), convention='cosmos'), {}),
  'none': (dict(name='none'), {}),
}


def get_config(arguments=None):
  defaults = dict(quantizer=(*QUANTIZERS,), pixels=(32, 64), steps=1000)
  arg = common.arguments(arguments, **defaults)
  quantizer, losses = QUANTIZERS[arg.quantizer]
  config = common.base()
  config.model = common.small_model(4, arg.pixels, quantizer, WIDTH)
  config.data.image_size = arg.pixels
  config.batch_size = 32
  if arg.pixels == 64:
    config.batch_size = 8
    config.data.resize = (64, 80)
  config.losses = dict(l2=1.0, **losses)
  config.optim.update(b2=0.95, weight_decay=0.01)
  config.schedules = ((r'.*', dict(lr=1e-3, warmup=arg.steps // 12)),)
  config.duration = f'{arg.steps} steps'
  config.ema = 0.99
  config.log.images_every = max(arg.steps // 5, 1)
  return config
