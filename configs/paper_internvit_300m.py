"""python -m vqrae_jax.train --config=configs/paper_internvit_300m.py --config.data.source=FOLDER
python -m vqrae_jax.train --config=configs/paper_internvit_300m.py:stage=2 --config.init_from=runs/paper_internvit_300m --config.data.source=FOLDER

VQRAE-InternViT (arXiv 2511.23386): SimVQ with 16,384 codes of 1536 channels on
InternViT-300M (2412.05271; 24 blocks of 1024). It sees 224 pixels in patches of
14, the decoder paints patches of 16: 256 pixels from 16 x 16 tokens. That the
weights are those of V2.5 is a choice of this recipe's.

First stage, line by line:
- VQRAE: L2, perceptual term, quantizer's terms with .25 of commitment, no GAN;
  squared L2 to the mapped basis; a decoder that mirrors the encoder; AdamW (.9,
  .999), decay 1e-4, clip 1, 4e-4 to 1e-4 after 2000 steps of warm-up, batch
  768, 45,000 steps, crop and flip, the encoder frozen;
- TA-TiTok (2501.07730): the perceptual term, the mean of LPIPS and .1
  ConvNeXt-S with a weight of 1.1, so 1.0 and .1;
- TiTok (2406.07550): EMA .999.

`:stage=2` opens the encoder:
- VQRAE: the same terms, a GAN of weight .1 from step 50,000, 1.0 times the
  squared distance to the encoder that it begins with ("teacher"); decoder 1e-4
  to 1e-5, encoder 1e-5, discriminator 4e-5, 60,000 steps;
- TiTok: that weight is fixed, the discriminator PatchGAN with hinge and LeCam
  .001.

The encoder's weights are the published ones, fetched at the start
(`--config.init.encoder=` for random ones); the losses' networks come
beforehand, by
`python -m vqrae_jax.fetch_weights --config=configs/paper_internvit_300m.py`.
"""

from configs import common


def get_config(arguments=None):
  arg = common.arguments(arguments, stage=(1, 2))
  config = common.base()
  config.model = dict(
    encoder=dict(name='internvit-300m-448px-v2_5', output_norm='plain'),
    quantizer=dict(name='simvq', num_codes=16384, code_dim=1536, distance='l2'),
    decoder=dict(name='symmetric', vit=dict(patch_size=16, grid=(16, 16))),
    dtype='bfloat16',
    remat=True,
  )
  config.init.encoder = 'internvit-300m-448px-v2_5'
  config.data.update(image_size=256, resize=288, crop='random', flip=True)
  config.losses = dict(
    l2=1.0, lpips=1.0, convnext=0.1, codebook=1.0, commit=0.25
  )
  config.schedules = common.encoder_frozen(lr=4e-4, end_lr=1e-4, warmup=2000)
  config.duration = '45000 steps'
  config.batch_size = 768
  config.optim.update(b1=0.9, b2=0.999, weight_decay=1e-4, clip=1.0)
  config.ema = 0.999
  config.mesh.layout = 'fsdp'
  if arg.stage == 2:
    common.second_stage(config, duration='60000 steps')
    config.losses.gan = dict(weight=0.1, start=50000, adaptive=False)
    config.losses.distill = dict(weight=1.0, target='teacher')
    config.teacher = 'init'
    config.discriminator = common.paper_discriminator()
    config.schedules = common.paper_second_rates()
  return config
