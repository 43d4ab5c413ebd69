"""Every recipe builds, is documented by its launch line, and is found."""

import dataclasses
import functools
import importlib
import pathlib

import jax
import pytest

from vqrae_jax import sharding
from vqrae_jax.losses import FROZEN_TERMS
from vqrae_jax.models.decoder import DECODERS
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.nn.dino import DINO_S8, DinoDiscriminator
from vqrae_jax.ops import trees
from vqrae_jax.specs import PostQuantSpec
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = sorted(
  p.stem
  for p in (ROOT / 'configs').glob('*.py')
  if p.stem not in ('__init__', 'common')
)


STEPS_PER_EPOCH = 1000


def read(name, arguments):
  module = importlib.import_module(f'configs.{name}')
  return config_lib.read_config(module.get_config(arguments))


@functools.cache  # a plan traces a whole model
def planned(name, arguments):
  spec = read(name, arguments)
  tokenizer = build_tokenizer(spec.model)
  return spec, state_lib.make_plan(spec, tokenizer, STEPS_PER_EPOCH)


# Small runs from scratch, of no paper's numbers.
SMALL = {'quickstart', 'two_stages_small'}
# What else each recipe can be asked for; `None` is the recipe itself.
VARIANTS = {
  'two_stages_small': (
    'stage=0',
    'lpips=false,gan=false',
    'stage=2,distill=self',
    'stage=2,gan=false',
    'stage=2,frozen=true,distill=none',
  ),
  'quickstart': ('steps=60,lr=1e-3',),
  'simvq_siglip_l': ('stage=2', 'frozen=false', 'stage=2,open=6,decay=0.8'),
  'simvq_siglip2_l': ('stage=2', 'preset=paper', 'preset=paper,stage=2'),
  'internvit_6b': ('decoder=symmetric', 'decoder=B', 'decoder=L', 'stage=2'),
  'paper_siglip2_so400m': ('stage=2',),
  'paper_internvit_300m': ('stage=2',),
}
ALL = [(n, a) for n in NAMES for a in (None, *VARIANTS.get(n, ()))]


def check_builds(spec, plan):
  state, frozen = jax.eval_shape(lambda: state_lib.fresh_state(plan, 0))
  images = jax.ShapeDtypeStruct((2, *spec.data.size, 3), 'uint8')
  step_lib.check_reach(plan, state, frozen, images)
  mesh = sharding.make_mesh(spec.mesh.layout, tensor=spec.mesh.tensor)
  sharding.shardings_for((state, frozen), mesh)
  sharding.check_batch(spec.batch_size, mesh)


@pytest.mark.parametrize('name, arguments', ALL)
def test_builds_and_every_leaf_is_moved(name, arguments):
  """Already without the networks of losses, whose tracing is what takes long
  and is the same in all."""
  spec, plan = planned(name, arguments)
  if name not in SMALL:
    named = spec.model['encoder']['name']
    assert spec.init.encoder == (None if spec.init_from else named)
  light = {n: w for n, w in plan.weights.items() if n not in FROZEN_TERMS}
  check_builds(spec, dataclasses.replace(plan, weights=light, adversary=None))


@pytest.mark.parametrize(
  'name, arguments',
  [('vq_dinov2_b', None), ('paper_internvit_300m', 'stage=2')],
)
def test_builds_with_all_its_networks(name, arguments):
  """DINO's discriminator with LPIPS, PatchGAN with both and a teacher."""
  spec, plan = planned(name, arguments)
  assert plan.networks and plan.adversary
  check_builds(spec, plan)


@dataclasses.dataclass(frozen=True)
class Second:
  """The second player: who, from which step, how fast, heard from when."""

  name: str
  heard: int
  start: int
  lr: float
  adaptive: bool
  augment: bool
  lecam: float
  b2: float
  loss: str = 'hinge'


@dataclasses.dataclass(frozen=True)
class Numbers:
  """What the request, or the paper it follows, asks of a recipe."""

  encoder: str
  decoder: str
  codes: int
  code_dim: int
  grid: int
  pixels: int
  batch: int
  duration: str
  lr: float
  losses: dict
  second: Second | None
  ema: float = 0.999
  fields: dict = dataclasses.field(default_factory=dict)


SIGLIP = 'siglip-large-patch16-384'
SIGLIP2 = 'siglip2-large-patch16-256'
SO400M = 'siglip2-so400m-patch16-256'
DINO = 'dinov2-with-registers-base'
INTERN = 'internvit-6b-448px-v2_5'
INTERN_300M = 'internvit-300m-448px-v2_5'
EPOCHS, EMA = '30 epochs', dict(update='ema', decay=0.99, epsilon=1e-5)
COSINE, L2 = dict(distance='cosine'), dict(distance='l2')
VQ = dict(codebook=1.0, commit=0.25)

# RAE's trainer and the PyTorch project's first-stage files: epochs 8 and 6.
EPOCH_8 = Second('dino', 8000, 6000, 2e-4, True, True, 0.0, 0.95)
BOTH_NOW = dataclasses.replace(EPOCH_8, heard=0, start=0)
# VQRAE, and TiTok where it is silent.
LATE = Second('patch', 50000, 50000, 4e-5, False, False, 0.001, 0.999)

REQUEST = dict(l2=1.0, lpips=1.0, gan=0.75)
REQUEST_2 = dict(l2=1.0, lpips=0.5, distill=2.0) | VQ
PAPER = dict(l2=1.0, lpips=1.0, convnext=0.1) | VQ
PAPER_2 = PAPER | dict(gan=0.1, distill=1.0)
RAE = dict(l1=1.0, lpips=1.0, gan=0.75)

WANTED = {
  ('simvq_siglip_l', None): Numbers(
    SIGLIP, 'L', 16384, 1536, 14, 224, 4096, EPOCHS, 1e-3, REQUEST | VQ,
    EPOCH_8, fields=COSINE,
  ),
  ('simvq_siglip_l', 'stage=2'): Numbers(
    SIGLIP, 'L', 16384, 1536, 14, 224, 4096, '10 epochs', 1e-5, REQUEST_2,
    None, 0.9999, COSINE,
  ),
  ('simvq_siglip2_l', None): Numbers(
    SIGLIP2, 'L', 16384, 1536, 16, 256, 4096, EPOCHS, 1e-3, REQUEST | VQ,
    EPOCH_8, fields=COSINE,
  ),
  ('simvq_siglip2_l', 'stage=2'): Numbers(
    SIGLIP2, 'L', 16384, 1536, 16, 256, 4096, '10 epochs', 1e-5, REQUEST_2,
    None, 0.9999, COSINE,
  ),
  ('simvq_siglip2_l', 'preset=paper'): Numbers(
    SIGLIP2, 'symmetric', 16384, 1536, 16, 256, 1024, '100000 steps', 4e-4,
    PAPER, None, fields=L2,
  ),
  ('simvq_siglip2_l', 'preset=paper,stage=2'): Numbers(
    SIGLIP2, 'symmetric', 16384, 1536, 16, 256, 1024, '70000 steps', 1e-4,
    PAPER_2, LATE, fields=L2,
  ),
  ('paper_siglip2_so400m', None): Numbers(
    SO400M, 'symmetric', 16384, 1536, 16, 256, 1024, '100000 steps', 4e-4,
    PAPER, None, fields=L2,
  ),
  ('paper_siglip2_so400m', 'stage=2'): Numbers(
    SO400M, 'symmetric', 16384, 1536, 16, 256, 1024, '70000 steps', 1e-4,
    PAPER_2, LATE, fields=L2,
  ),
  ('paper_internvit_300m', None): Numbers(
    INTERN_300M, 'symmetric', 16384, 1536, 16, 256, 768, '45000 steps', 4e-4,
    PAPER, None, fields=L2,
  ),
  ('paper_internvit_300m', 'stage=2'): Numbers(
    INTERN_300M, 'symmetric', 16384, 1536, 16, 256, 768, '60000 steps', 1e-4,
    PAPER_2, LATE, fields=L2,
  ),
  ('vq_dinov2_b', None): Numbers(
    DINO, 'B', 8192, 768, 16, 256, 512, '16 epochs', 2e-4,
    RAE | dict(commit=0.25), EPOCH_8, 0.9978, EMA,
  ),
  ('vq_dinov2_b_decxl', None): Numbers(
    DINO, 'XL', 8192, 768, 16, 256, 512, '16 epochs', 2e-4,
    RAE | dict(commit=0.25), EPOCH_8, 0.9978, EMA,
  ),
  ('fsq_siglip_l', None): Numbers(
    SIGLIP, 'L', 512, 3, 14, 224, 4096, EPOCHS, 1e-3,
    REQUEST | dict(commit=0.25), EPOCH_8, fields=
    dict(levels=(8, 8, 8), convention='centered', post_quant=None),
  ),
  ('fsq_cosmos_64k', None): Numbers(
    'siglip2-base-patch16-256', 'XL', 64000, 6, 16, 256, 4096, EPOCHS, 1e-3,
    REQUEST, EPOCH_8, fields=dict(
      levels=(8, 8, 8, 5, 5, 5), convention='cosmos', projection=True,
      post_quant=PostQuantSpec(kernel=1, space='code'),
    ),
  ),
  ('vqvae_16k', None): Numbers(
    SIGLIP, 'L', 16384, 1024, 14, 224, 4096, EPOCHS, 1e-3,
    REQUEST | dict(commit=0.25), EPOCH_8, fields=EMA,
  ),
  ('internvit_6b', None): Numbers(
    INTERN, 'XL', 16384, 1536, 16, 256, 768, '45000 steps', 4e-4, PAPER, None,
    fields=L2,
  ),
  ('internvit_6b', 'decoder=symmetric'): Numbers(
    INTERN, 'symmetric', 16384, 1536, 16, 256, 768, '45000 steps', 4e-4,
    PAPER, None, fields=L2,
  ),
  ('internvit_6b', 'stage=2'): Numbers(
    INTERN, 'XL', 16384, 1536, 16, 256, 768, '60000 steps', 1e-4, PAPER_2,
    LATE, fields=L2,
  ),
  ('rae_dinov2_b', None): Numbers(
    DINO, 'XL', 0, 768, 16, 256, 512, '16 epochs', 2e-4, RAE, EPOCH_8, 0.9978,
  ),
  ('finetune_decoder', None): Numbers(
    SIGLIP, 'L', 16384, 1536, 14, 224, 512, '4 epochs', 2e-5, RAE, BOTH_NOW,
    0.9978, COSINE,
  ),
  ('finetune_decoder', 'recipe=vq_dinov2_b'): Numbers(
    DINO, 'B', 8192, 768, 16, 256, 512, '4 epochs', 2e-5, RAE, BOTH_NOW,
    0.9978, EMA,
  ),
}  # fmt: skip


@pytest.mark.parametrize('name, arguments', WANTED)
def test_numbers(name, arguments):
  want = WANTED[name, arguments]
  spec, plan = planned(name, arguments)
  tokenizer = plan.tokenizer
  assert spec.model['encoder']['name'] == want.encoder
  assert spec.model['decoder']['name'] == want.decoder
  assert tokenizer.codebook_size == want.codes
  assert tokenizer.quantizer.code_width == want.code_dim
  assert spec.data.size == (want.pixels, want.pixels)
  assert tokenizer.index_shape(*spec.data.size) == (want.grid, want.grid)
  assert tokenizer.decoder_spec.vit.grid == (want.grid, want.grid)
  assert spec.batch_size == want.batch and spec.duration == want.duration
  assert {n: t.weight for n, t in spec.terms().items()} == want.losses
  assert spec.ema == want.ema
  assert spec.noise_tau == (0 if want.codes else 0.8)
  for field, value in want.fields.items():
    assert getattr(tokenizer.quantizer, field) == value, field
  open_encoder = any(n.startswith('encoder/') for n in plan.trainable)
  second = 'stage=2' in (arguments or '')
  assert open_encoder == second
  goes_on = second or name == 'finetune_decoder'
  assert (spec.init_from is not None) == goes_on
  decoder = plan.rates['decoder/head/kernel']
  peak = max(float(decoder(step)) for step in range(0, 4001, 250))
  assert peak == pytest.approx(want.lr, rel=0.02)
  if open_encoder:
    encoder = plan.rates['encoder/embed/linear/kernel']
    warm = max(float(encoder(step)) for step in range(0, 4001, 250))
    assert warm == pytest.approx(1e-5, rel=0.02)


@pytest.mark.parametrize('name, arguments', WANTED)
def test_the_second_player(name, arguments):
  want = WANTED[name, arguments].second
  spec, plan = planned(name, arguments)
  if want is None:
    assert spec.discriminator is plan.adversary is None
    return
  found = plan.adversary
  gan = spec.terms()['gan']
  last = plan.total_steps - 1
  assert found.weight(last) == pytest.approx(gan.weight)
  start = [float(found.weight(max(want.heard + n, 0))) for n in (-1, 1)]
  assert start[1] > 0 and (start[0] == 0 or not want.heard)
  rates = [float(found.rate(s)) for s in (*range(0, 2001, 250), last)]
  learns = spec.discriminator
  assert (
    Second(
      name=learns.name,
      heard=found.gan_start,
      start=found.start,
      lr=pytest.approx(max(rates), rel=0.02),
      adaptive=found.adaptive,
      augment=learns.augment,
      lecam=learns.lecam,
      b2=learns.optim.b2,
      loss=learns.loss,
    )
    == want
  )
  assert (learns.updates, learns.cutout, learns.r1) == (1, 0.0, 0.0)
  if want.name == 'dino':
    assert found.module == DinoDiscriminator(DINO_S8, kernel=9)


def test_distillation_says_from_what():
  """The request's from the latents as they are, the paper's from a teacher."""
  for name, arguments in WANTED:
    if 'stage=2' in (arguments or ''):
      spec, plan = planned(name, arguments)
      paper = 'convnext' in spec.losses
      target = spec.terms()['distill'].target
      assert target == ('teacher' if paper else 'self')
      assert plan.teacher == paper and spec.teacher == (
        'init' if paper else None
      )


def test_a_finetuned_decoder_moves_no_index():
  """Nothing that an index is a function of: encoder, quantizer, its table."""
  for arguments in (None, 'recipe=vq_dinov2_b'):
    _, plan = planned('finetune_decoder', arguments)
    assert {n.split('/')[0] for n in plan.trainable} == {'decoder'}
    assert not plan.moves_codebook
  recipes = importlib.import_module('configs.finetune_decoder').RECIPES
  others = SMALL | {'finetune_decoder', 'rae_dinov2_b'}
  assert {*recipes} == {*NAMES} - others


def test_a_finetuned_decoder_takes_a_recipes_arguments():
  spec = read('finetune_decoder', 'recipe=simvq_siglip2_l,preset=paper')
  like = read('simvq_siglip2_l', 'preset=paper')
  assert spec.model == like.model and spec.data == like.data


def test_every_recipe_is_held_to_its_numbers():
  assert {name for name, _ in WANTED} == {*NAMES} - SMALL


def test_decoders_and_conventions_are_all_exercised():
  used = {want.decoder for want in WANTED.values()}
  assert used == {*DECODERS, 'symmetric'}


def test_simvq_siglip_l():
  """1024-wide latents, a table of 16384 x 1536, an encoder that can open."""
  _, plan = planned('simvq_siglip_l', None)
  assert plan.tokenizer.latent_dim == 1024
  leaves = trees.flatten(plan.shapes)
  assert leaves['codebook/quantizer/basis'].shape == (16384, 1536)
  assert leaves['params/quantizer/project_in/kernel'].shape == (1024, 1536)
  _, free = planned('simvq_siglip_l', 'frozen=false')
  assert any(n.startswith('encoder/') for n in free.trainable)


def test_a_plain_latent_norm_has_no_parameters():
  """Every recipe names its output norm; RAE's has no affine part."""
  for name in {*NAMES} - SMALL:
    spec, plan = planned(name, None)
    assert spec.model['encoder']['output_norm'] == 'plain'
    assert 'encoder/norm/scale' not in plan.leaves


def test_held_out_data_may_come_from_elsewhere():
  from configs import two_stages_small

  config = two_stages_small.get_config()
  config.data.source = 'a'
  assert config.eval.source == 'a'
  config.eval.source = 'b'
  assert config.data.source == 'a'


def test_arguments_are_checked():
  with pytest.raises(ValueError, match='step=3.* is none of: steps=1000'):
    read('quickstart', 'step=3')
  with pytest.raises(ValueError, match='must be like steps=1000'):
    read('quickstart', 'steps=many')
  with pytest.raises(ValueError, match='must be stage=1 or stage=2'):
    read('simvq_siglip_l', 'stage=3')
  with pytest.raises(ValueError, match='preset=request or preset=paper'):
    read('simvq_siglip2_l', 'preset=papers')
  with pytest.raises(ValueError, match='has no place: there are none'):
    read('vqvae_16k', 'stage=2')
  with pytest.raises(ValueError, match='recipe=simvq_siglip_l or recipe='):
    read('finetune_decoder', 'recipe=quickstart')
  with pytest.raises(ValueError, match='stage=2 or frozen=False'):
    read('simvq_siglip_l', 'open=6')
  with pytest.raises(ValueError, match='last=30 must be 1 to 24 blocks'):
    read('simvq_siglip_l', 'stage=2,open=30')
  with pytest.raises(ValueError, match='decay=1.5 must lie in'):
    read('simvq_siglip_l', 'stage=2,decay=1.5')
