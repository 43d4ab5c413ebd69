"""python -m vqrae_jax.train --config=configs/finetune_decoder.py --config.init_from=TOKENIZER --config.data.source=FOLDER

A finished tokenizer's decoder, trained on with LPIPS and a GAN; TOKENIZER is a
tokenizer's directory or a run's workdir. It moves no index: encoder and
quantizer, the code table with it, are frozen to the last bit, and an index is a
function of these alone. Tokens that are stored stay valid, and a model that was
trained on them paints better without being touched.

The model is that of `simvq_siglip_l.py`. `:recipe=NAME` takes another recipe's,
with its data and layout; further arguments are that recipe's, as in
`:recipe=simvq_siglip2_l,preset=paper`. It must be the model of TOKENIZER.

The numbers, line by line:
- RAE's trainer (arXiv 2510.11690): L1, 1.0 LPIPS, .75 adversarial, balanced;
  DINO discriminator at 2e-4 to 2e-5; AdamW (.9, .95), no decay, batch 512, EMA
  .9978;
- chosen here: 2e-5 to 2e-6, beginning where RAE's training ends; 4 epochs; both
  players from the first step, the decoder's adversarial weight rising over an
  epoch, since the discriminator begins at random.

The losses' networks come beforehand, by
`python -m vqrae_jax.fetch_weights --config=configs/finetune_decoder.py`.
"""

from configs import (
  common,
  fsq_cosmos_64k,
  fsq_siglip_l,
  internvit_6b,
  paper_internvit_300m,
  paper_siglip2_so400m,
  simvq_siglip2_l,
  simvq_siglip_l,
  vq_dinov2_b,
  vq_dinov2_b_decxl,
  vqvae_16k,
)

RECIPES = {
  recipe.__name__.rpartition('.')[2]: recipe
  for recipe in (
    simvq_siglip_l,
    simvq_siglip2_l,
    vq_dinov2_b,
    vq_dinov2_b_decxl,
    vqvae_16k,
    fsq_siglip_l,
    fsq_cosmos_64k,
    internvit_6b,
    paper_siglip2_so400m,
    paper_internvit_300m,
  )
}


def get_config(arguments=None):
  first, _, others = (arguments or '').partition(',')
  arg = common.arguments(first, recipe=tuple(RECIPES))
  config = RECIPES[arg.recipe].get_config(others or None)
  common.second_stage(config, duration='4 epochs')
  config.losses = dict(
    l1=1.0,
    lpips=1.0,
    gan=dict(weight=0.75, start=0, ramp=1, unit='epochs'),
  )
  config.discriminator = common.dino_discriminator(
    '0 epochs', lr=2e-4, end_lr=2e-5, warmup='1 epochs'
  )
  config.teacher = None
  config.schedules = (
    (r'(encoder|quantizer)/.*', None),
    (r'.*', dict(lr=2e-5, end_lr=2e-6, warmup=1000)),
  )
  config.batch_size = 512
  config.optim.update(b1=0.9, b2=0.95, weight_decay=0.0, clip=1.0)
  config.ema = 0.9978
  return config
