"""A small tokenizer of CIFAR-10: 32-pixel images as 8 x 8 tokens of 10 bits.

    python -m vqrae_jax.train --config=examples/cifar10.py \
      --config.data.source='cifar10/train-*.tar' --workdir=runs/cifar10

EMA-VQ of 1024 codes between two ViTs of two blocks, L2, from scratch, in
minutes on two CPU cores; what `examples/maskgit` and `examples/ar` generate the
tokens of. Its settings are those of `benchmarks/cifar.py`, in smaller batches:
the weight of `commit` is .02, for L2 is of pixels in [0, 1].
"""

from ml_collections import ConfigDict


def get_config():
  vit = dict(
    width=128, depth=2, num_heads=2, mlp_dim=512, patch_size=4, grid=(8, 8)
  )
  config = ConfigDict()
  config.model = dict(
    encoder=dict(vit=vit),
    quantizer=dict(name='vq', num_codes=1024),
    decoder=dict(vit=vit | dict(posemb='sincos2d')),
  )
  config.data = dict(source='cifar10/train-*.tar', image_size=32)
  config.losses = dict(l2=1.0, commit=0.02)
  config.optim = dict(b2=0.95, weight_decay=0.01)
  config.schedules = ((r'.*', dict(lr=1e-3, warmup=80)),)
  config.duration = '1000 steps'
  config.batch_size = 32
  config.ema = 0.99
  config.eval = dict(source='cifar10/test-*.tar')
  return config
