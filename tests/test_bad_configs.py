"""Bad configs: one line that names the key, before anything compiles.

A row is keys over a config that runs, and what the error must name. Wording is
free: a row holds the key, its value or the nearest right name.
"""

import math
import re

import pytest

from tests import bad, tiny
from vqrae_jax.errors import UserError
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import loop

NAN, INF, HUGE = math.nan, math.inf, 10**30
RATE = dict(lr=1e-3)
PATCH = dict(name='patch')
DISTILL = dict(l2=1.0, distill=1.0)
SELF = dict(weight=1.0, target='self')
POSITION = dict(norm='position', grid=(4, 4))
STATS = dict(init=dict(latents='s.npz'))
ATTENTION = dict(layers=(0, 1), fuse='attention')
RANDOM = dict(init=dict(networks='random'))


def data(**keys):
  return dict(data=dict(source='bundled:photos', image_size=16) | keys)


def tiles(side):
  return dict(eval=dict(source='bundled:photos', tile=side))


def losses(**terms):
  return dict(losses=terms)


def l2(**fields):
  return losses(l2=dict(weight=1.0) | fields)


def rows(*schedules):
  return dict(schedules=schedules)


def rate(**fields):
  return rows(('.*', RATE | fields))


def layers(*factors):
  return rows(('.*/transformer/.*', RATE | dict(layers=factors)), ('.*', RATE))


def gan(term=0.5, **fields):
  return losses(l2=1.0, gan=term) | dict(discriminator=PATCH | fields)


def model(**keys):
  return dict(model=tiny.model(depth=1) | keys)


def quantizer(**fields):
  return model(quantizer=fields)


def encoder(**fields):
  return model(encoder=dict(vit=tiny.VIT) | fields)


def features(shallow=False, **terms):
  section = dict(shallow=shallow)
  return model(feature_decoder=section) | losses(l2=1.0, features=terms)


# What `read_config` alone refuses.
READ = [
  (dict(colour=3), 'config.colour'),
  (dict(batch_size=0), 'batch_size=0'),
  (dict(batch_size='8'), "config.batch_size='8'"),
  (dict(accumulate=0), 'accumulate=0'),
  (dict(seed=-1), 'seed=-1'),
  (dict(seed=2**31), 'config.seed='),
  (dict(ema=1), 'ema=1'),
  (dict(ema=-0.5), 'ema=-0.5'),
  (dict(noise_tau=-0.5), 'noise_tau=-0.5'),
  (dict(noise_tau=NAN), 'noise_tau=nan'),
  (dict(temperature=dict(end=0.0)), 'temperature.end=0.0'),
  (dict(temperature=dict(decay='exp')), "temperature.decay='exp'"),
  (dict(duration=None), 'config.duration'),
  (dict(max_nonfinite=-1), 'max_nonfinite=-1'),
  (dict(model=None), 'config.model'),
  (dict(model={}), '"config.model.encoder", "config.model.quantizer"'),
  (losses(), 'losses is empty'),
  (losses(lpisp=1.0), '"lpips"'),
  (losses(l1=0.0, l2=1.0), 'losses.l1.weight=0.0'),
  (losses(l2=INF), 'losses.l2.weight=inf'),
  (losses(l2=HUGE), 'losses.l2.weight='),
  (dict(losses={1: 1.0}), '"losses.1"'),
  (losses(l2=1.0, r1=dict(weight=1.0, fn='m:f')), 'losses.r1'),
  (losses(l2=dict(start=3)), 'losses.l2.weight'),
  (l2(weigth=1.0), '"weight"'),
  (l2(start=1, unit='epocs'), '"epochs"'),
  (l2(start=-3), "losses.l2.start='-3"),
  (l2(ramp=1.5), "losses.l2.ramp='1.5"),
  (losses(l2=1.0, distill=dict(weight=1.0, target='techer')), '"teacher"'),
  (losses(**DISTILL), 'losses.distill'),
  (dict(teacher='init'), 'teacher=init'),
  (losses(**DISTILL) | dict(teacher='init'), 'teacher="init"'),
  (dict(schedules=dict(lr=1e-3)), 'config.schedules'),
  (rows(('.*',)), 'schedules'),
  (rows(('.*', 3)), 'schedules[".*"]=3'),
  (rate(rate=1e-3), 'schedules[".*"].rate'),
  (rate(lr=NAN), 'schedules[".*"].lr=nan'),
  (rate(lr=0.0), 'lr=0'),
  (rate(end_lr=1e-4, decay='constant'), 'end_lr=0.0001'),
  (rate(decay='exp'), "decay='exp'"),
  (layers('a', 1.0), "'a'"),
  (layers(-1.0, 1.0), '-1.0'),
  (layers(None, 0.0), 'layers'),
  (dict(optim=3), 'config.optim=3'),
  (dict(optim=dict(b1=1.0)), 'optim.b1=1.0'),
  (dict(optim=dict(clip=0.0)), 'optim.clip=0.0'),
  (dict(optim=dict(weight_decay=-1.0)), 'optim.weight_decay=-1.0'),
  (dict(mesh=dict(layot='dp')), '"layout"'),
  (dict(checkpoint=dict(every=-1)), 'checkpoint.every=-1'),
  (dict(checkpoint=dict(keep=0)), 'checkpoint.keep=0'),
  (dict(log=dict(every=0)), 'log.every=0'),
  (dict(log=dict(images_every=-1)), 'log.images_every=-1'),
  (dict(log=dict(usage_window=0)), 'log.usage_window=0'),
  (dict(eval=dict(every=5)), 'eval.every=5'),
  (tiles(0), 'eval.tile=0'),
  (dict(eval=dict(source='x', metrics=('fid',))), "eval.metrics='fid'"),
  (dict(eval=dict(source='x', batch_size=0)), 'eval.batch_size=0'),
  (dict(init=dict(decodr='x')), '"decoder"'),
  (dict(init=dict(networks='randm')), '"random"'),
  (dict(init=dict(decoder='x'), init_from='run'), 'init.decoder'),
  (dict(data=dict(image_size=16)), '"config.data.source"'),
  (data(decoder='turbo'), "data.decoder='turbo'"),
  (data(image_size=-16), 'data.image_size=-16'),
  (data(image_size=(16, 16, 3)), 'data.image_size'),
  (data(resize=(8, 4)), 'data.resize'),
  (data(crop='middle'), "data.crop='middle'"),
  (data(max_skipped=2.0), 'data.max_skipped=2.0'),
  (data(examples=0), 'data.examples=0'),
  (data(include=(1,)), 'data.include=(1,)'),
  (losses(l2=1.0, gan=0.5), 'discriminator=dict(name="patch")'),
  (dict(discriminator=PATCH), 'discriminator=patch'),
  (losses(gan=0.5) | dict(discriminator=PATCH), 'losses.gan.adaptive=False'),
  (gan(-1), 'losses.gan.weight=-1'),
  (gan(dict(weight=1.0, adaptiv=False)), '"adaptive"'),
  (gan(nam='patch'), '"name"'),
  (gan(fields=dict(name='dino')), 'discriminator.fields.name'),
  (gan(loss='hing'), '"hinge"'),
  (gan(schedule=dict(lr=-1.0)), 'discriminator.schedule'),
  (gan(schedule=None), 'discriminator.schedule=None'),
  (gan(optim=dict(b1=1.0)), 'discriminator.optim.b1=1.0'),
  (gan(lecam=NAN), 'discriminator.lecam=nan'),
  (gan(updates=0), 'discriminator.updates=0'),
  (gan(cutout=1.0), 'discriminator.cutout=1.0'),
  (gan() | dict(discriminator='patch'), "discriminator='patch'"),
]

# What needs the model, the images or the devices: nothing is compiled yet.
BUILD = [
  (dict(batch_size=12), 'multiple of the 8 devices'),
  (dict(accumulate=2), 'accumulate=2'),
  (dict(mesh=dict(layout='ddp')), '"dp"'),
  (dict(mesh=dict(layout='fsdp+tp', tensor=3)), '8 devices'),
  (dict(mesh=dict(layout='dp', tensor=2)), 'mesh.layout'),
  (dict(duration='soon'), "duration='soon'"),
  (dict(duration='3 epocs'), '"epochs"'),
  (dict(duration=0), 'duration=0'),
  (l2(start=9), 'losses.l2'),
  (l2(ramp=9), 'losses.l2'),
  (losses(l2=1.0, codebook=1.0), 'losses.codebook'),
  (losses(l2=1.0, commit=0.25), 'losses.commit'),
  (losses(l2=1.0, diversity=0.1), 'losses.diversity'),
  (dict(temperature=dict(start=2.0)), 'temperature is that of'),
  (quantizer(name='vqq'), '"vq"'),
  (quantizer(levels=(8, 5)), 'quantizer ""; there are: '),
  (quantizer(name='fsq', levels=()), 'levels'),
  (quantizer(name='simvq', distance='cosin'), '"cosine"'),
  (quantizer(name='vq', num_codes=HUGE), 'model.quantizer.num_codes='),
  (
    model(quantizer=dict(name='vq', update='gradient', affine=True))
    | rows(('quantizer/token_mean', None), ('.*', RATE)),
    'quantizer/token_mean',
  ),
  (model(encoder=dict(name='siglp')), 'siglip'),
  (model(decoder=dict(name='LL')), '"L"'),
  (encoder(layers=(1, 0)), 'encoder.layers=(1, 0)'),
  (encoder(layers=(0, 2)), 'encoder.layers=(0, 2)'),
  (encoder(fuse='concat'), 'encoder.layers'),
  (encoder(layers=(0, 1), fuse='sum'), 'concat, mean'),
  (encoder(layers=(0,), fuse='attention'), 'encoder.layers=(0,)'),
  (encoder(layers=(0, 1), output_norm=('none',)), 'encoder.output_norm='),
  (encoder(add_final_mean=True, **ATTENTION), 'encoder.add_final_mean'),
  (
    model(encoder=dict(vit=tiny.VIT) | ATTENTION, latents=dict(norm='channel'))
    | STATS,
    'model.latents.norm="channel"',
  ),
  (features(shallow=True), 'model.feature_decoder.shallow'),
  (features(deap=1.0), '"features/deep"'),
  (features(shallow=False, deep=-1.0), 'losses.features.deep.weight=-1.0'),
  (losses(features=1.0), 'losses.features=1.0'),
  (losses(l2=1.0, features=dict(deep=1.0)), 'model.feature_decoder'),
  (model(dtype='bf16'), '"bfloat16"'),
  (model(encoder=dict(vit=tiny.VIT | dict(width=HUGE))), 'encoder.vit.width='),
  (rows(('.*', None)), 'schedules'),
  (rows(('(', RATE)), 'schedules'),
  (rows(('encoder/.*', RATE)), 'decoder/'),
  (rows(('encodr/.*', None), ('.*', RATE)), 'encodr'),
  (rows(('.*', RATE), ('decoder/.*', None)), 'decoder/'),
  (rate(warmup=9), 'warmup=9'),
  (layers(1.0, 1.0), 'layers'),
  (dict(log=dict(usage_window=10**6)), 'log.usage_window=1000000'),
  (model(latents=dict(norm='channel')), 'init.latents'),
  (model(latents=dict(norm='mean')), "latents.norm='mean'"),
  (model(latents=POSITION) | data(image_size=32) | STATS, 'data.image_size'),
  (model(latents=POSITION) | tiles(8) | STATS, 'eval.tile'),
  (STATS, 'init.latents=s.npz'),
  (data(crop='squash', resize=20), 'data.resize=20'),
  (data(image_size=18), '18x18'),
  (data(image_size=[16, 18]), '18x18'),
  (data(image_size=[]), 'data.image_size=()'),
  (data(source='nowhere'), 'data.source'),
  (data(include=('chelsee',)), 'include=("chelsee",)'),
  (data(include=('chelsee',)), '"chelsea"'),
  (data(exclude=('*',)), 'holds no image'),
  (dict(eval=dict(source='x', tile=8, metrics=('lpips',))), 'eval.tile=8'),
  (tiles(18), '18x18'),
  (tiles(4096), 'eval.tile=4096'),
  (gan(dict(weight=1.0, start=9)), 'losses.gan'),
  (gan(start=9), 'discriminator.start=9'),
  (gan(start=1), 'discriminator.start=1'),
  (gan(start='1 epocs'), '"epochs"'),
  (gan(schedule=dict(lr=1e-3, warmup=9)), 'warmup'),
  (gan(name='path'), '"patch"'),
  (gan(fields=dict(hiden=8)), '"hidden"'),
  (gan(fields=dict(hidden=9)), 'discriminator.fields.hidden=9'),
  (gan(name='dino', fields=dict(taps=(12,))), 'fields.taps=(12,)'),
  (losses(**DISTILL) | dict(teacher='x') | bad.FROZEN, 'losses.distill'),
  (quantizer(name='none') | losses(distill=SELF), 'losses.distill.target'),
]

# What needs files of weights; this machine has none.
WEIGHTS = [
  (losses(lpips=1.0), 'losses.lpips'),
  (losses(lpips=1.0) | RANDOM | data(image_size=8), '"lpips"'),
  (losses(lpips=1.0) | RANDOM | data(image_size=[32, (8, 64)]), '(8, 64)'),
  (gan(name='dino'), '--config.discriminator.name=patch'),
  (losses(**DISTILL) | dict(teacher='siglip-larg'), 'teacher=siglip-larg'),
]


def refused(fn, keys, key):
  config = bad.config() | data() | keys
  with pytest.raises(UserError) as error:
    fn(config)
  assert key in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('keys, key', READ)
def test_read_config_names_the_key(keys, key):
  refused(config_lib.read_config, keys, key)


@pytest.mark.parametrize('keys, key', BUILD)
def test_a_run_names_the_key(keys, key, programs):
  refused(loop.dry_run, keys, key)
  assert not programs()


@pytest.mark.parametrize('keys, key', WEIGHTS)
def test_missing_weights_are_named(keys, key, monkeypatch, tmp_path):
  monkeypatch.setenv('VQRAE_JAX_CACHE', str(tmp_path))
  refused(loop.dry_run, keys, key)


def test_all_missing_keys_are_named_at_once():
  """From an empty config to one that reads, by what the errors name."""
  given, config = tiny.run(), {}
  with pytest.raises(UserError) as error:
    config_lib.read_config(config)
  names = re.findall(r'"config\.(\S+)"', str(error.value))
  assert {'data.source', 'model.encoder', 'losses'} < {*names}
  for name in names:
    *sections, key = name.split('.')
    source, target = given, config
    for section in sections:
      source, target = source[section], target.setdefault(section, {})
    target[key] = source[key]
  assert config_lib.read_config(config) == config_lib.read_config(given)


def test_a_warmup_longer_than_the_run_tells_how_large_the_batch_is():
  """Batch 64 of 11 images: "30 epochs" are 5 steps."""
  keys = rate(warmup=2000) | dict(batch_size=64, duration='30 epochs')
  refused(loop.dry_run, keys, 'batch_size=64, 11 images')


def test_a_name_emptied_on_a_command_line_is_none():
  empty = dict.fromkeys(('encoder', 'decoder'), '')
  spec = config_lib.read_config(tiny.run(init_from='', teacher='', init=empty))
  assert spec.init_from is None and spec.teacher is None
  assert spec.init == config_lib.InitSpec()
