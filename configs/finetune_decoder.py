"""python -m vqrae_jax.train --config=configs/finetune_decoder.py --config.init_from=TOKENIZER --config.data.source=FOLDER

A finished tokenizer's decoder, fine-tuned with LPIPS and a GAN; TOKENIZER is a
tokenizer's directory or a run's workdir. No index changes: the encoder and the
quantizer with its codebook are frozen, and an index depends on these alone.
Stored tokens stay valid, and images from a model that was trained on them
improve without a change to that model.

The model is that of `simvq_siglip_l.py`. `:recipe=NAME` takes another recipe's,
with its data and layout; further arguments are that recipe's, as in
`:recipe=simvq_siglip2_l,preset=paper`. It must be the model of TOKENIZER.

Losses, discriminator, AdamW, batch and EMA are RAE's (`common.rae`, arXiv
2510.11690). Chosen here: 2e-5 to 2e-6, starting where RAE's training ends; 4
epochs; discriminator and decoder from the first step, the GAN's weight rising
over an epoch, since the discriminator starts at random.
"""

import importlib

from configs import common

RECIPES = (
  'simvq_siglip_l', 'simvq_siglip2_l', 'vq_dinov2_b', 'vq_dinov2_b_decxl',
  'vqvae_16k', 'fsq_siglip_l', 'fsq_cosmos_64k', 'internvit_6b',
  'paper_siglip2_so400m', 'paper_internvit_300m', 'ideal_siglip2_l',
)  # fmt: skip


def get_config(arguments=None):
  first, _, others = (arguments or '').partition(',')
  arg = common.arguments(first, recipe=RECIPES)
  recipe = importlib.import_module(f'configs.{arg.recipe}')
  config = recipe.get_config(others or None)
  common.rae(config)
  common.second_stage(config, duration='4 epochs')
  config.losses.gan = dict(weight=0.75, start=0, ramp=1, unit='epochs')
  config.discriminator.start = '0 epochs'
  config.teacher = None
  frozen = ['encoder', 'quantizer']
  if 'feature_decoder' in config.model:
    frozen += ['fusion', 'feature_decoder']
  config.schedules = (
    (rf'({"|".join(frozen)})/.*', None),
    (r'.*', dict(lr=2e-5, end_lr=2e-6, warmup=1000)),
  )
  return config
