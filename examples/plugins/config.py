r"""A tokenizer of parts that vqrae_jax does not have, from scratch on the
bundled photographs.

    python -m vqrae_jax.train --config=examples/plugins/config.py \
      --workdir=runs/own_parts

The package `own_parts` lies beside this file, where it is found as one that is
installed.
"""

from configs import common


def get_config():
  config = common.base()
  config.model = dict(
    encoder=dict(
      name='own_parts.convnext:ConvNeXt',
      depths=(1, 1, 2),
      widths=(48, 96, 192),
    ),
    quantizer=dict(name='own_parts.lfq:LFQ', bits=12),
    decoder=dict(
      vit=common.vit(width=192, depth=2, patch=16, pixels=64, posemb='sincos2d')
    ),
    dtype='float32',
    remat=common.of_any_type(False),
  )
  config.losses = dict(
    l2=1.0,
    commit=0.25,
    entropy=0.02,
    edge=dict(weight=0.1, fn='own_parts.edge:edge'),
  )
  config.schedules = ((r'.*', dict(lr=1e-3, warmup=50)),)
  config.data.update(source='bundled:photos', image_size=64)
  return config
