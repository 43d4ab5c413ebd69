"""Every recipe builds, is documented by its launch line, and is found."""

import dataclasses
import importlib
import pathlib

import jax
import pytest

from vqrae_jax import sharding
from vqrae_jax.models.decoder import DECODERS
from vqrae_jax.models.tokenizer import build_tokenizer
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


def planned(name, arguments=None):
  module = importlib.import_module(f'configs.{name}')
  spec = config_lib.read_config(module.get_config(arguments))
  return spec, state_lib.make_plan(spec, build_tokenizer(spec.model), 1000)


# What else each recipe can be asked for; `None` is the recipe itself.
VARIANTS = {
  'quickstart': ('steps=60,lr=1e-3',),
  'simvq_siglip_l': ('stage=2', 'frozen=false'),
  'simvq_siglip2_l': ('stage=2', 'preset=paper', 'preset=paper,stage=2'),
  'internvit_6b': ('decoder=symmetric', 'decoder=B', 'decoder=L', 'stage=2'),
}
ALL = [(n, a) for n in NAMES for a in (None, *VARIANTS.get(n, ()))]


@pytest.mark.parametrize('name, arguments', ALL)
def test_builds_and_every_leaf_is_moved(name, arguments):
  spec, plan = planned(name, arguments)
  named = spec.model['encoder'].get('name')
  assert spec.init.encoder == (None if spec.init_from else named)
  state, frozen = jax.eval_shape(lambda: state_lib.fresh_state(plan, 0))
  images = jax.ShapeDtypeStruct((2, *spec.data.size, 3), 'uint8')
  step_lib.check_reach(plan, state, frozen, images)
  mesh = sharding.make_mesh(spec.mesh.layout, tensor=spec.mesh.tensor)
  sharding.shardings_for((state, frozen), mesh)
  sharding.check_batch(spec.batch_size, mesh)


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
  losses: tuple = ('codebook', 'commit', 'l2')
  fields: dict = dataclasses.field(default_factory=dict)


SIGLIP = 'siglip-large-patch16-384'
SIGLIP2 = 'siglip2-large-patch16-256'
DINO = 'dinov2-with-registers-base'
INTERN = 'internvit-6b-448px-v2_5'
EPOCHS, EMA = '30 epochs', dict(update='ema', decay=0.99, epsilon=1e-5)
WANTED = {
  ('simvq_siglip_l', None): Numbers(
    SIGLIP, 'L', 16384, 1536, 14, 224, 4096, EPOCHS, 1e-3,
    fields=dict(distance='cosine'),
  ),
  ('simvq_siglip_l', 'stage=2'): Numbers(
    SIGLIP, 'L', 16384, 1536, 14, 224, 4096, '10 epochs', 1e-5
  ),
  ('simvq_siglip2_l', None): Numbers(
    SIGLIP2, 'L', 16384, 1536, 16, 256, 4096, EPOCHS, 1e-3,
    fields=dict(distance='cosine'),
  ),
  ('simvq_siglip2_l', 'stage=2'): Numbers(
    SIGLIP2, 'L', 16384, 1536, 16, 256, 4096, '10 epochs', 1e-5
  ),
  ('simvq_siglip2_l', 'preset=paper'): Numbers(
    SIGLIP2, 'symmetric', 16384, 1536, 16, 256, 1024, '100000 steps', 4e-4,
    fields=dict(distance='l2'),
  ),
  ('simvq_siglip2_l', 'preset=paper,stage=2'): Numbers(
    SIGLIP2, 'symmetric', 16384, 1536, 16, 256, 1024, '70000 steps', 1e-4
  ),
  ('vq_dinov2_b', None): Numbers(
    DINO, 'B', 8192, 768, 16, 256, 512, '16 epochs', 2e-4,
    ('commit', 'l1'), EMA,
  ),
  ('vq_dinov2_b_decxl', None): Numbers(
    DINO, 'XL', 8192, 768, 16, 256, 512, '16 epochs', 2e-4,
    ('commit', 'l1'), EMA,
  ),
  ('fsq_siglip_l', None): Numbers(
    SIGLIP, 'L', 512, 3, 14, 224, 4096, EPOCHS, 1e-3, ('commit', 'l2'),
    dict(levels=(8, 8, 8), convention='centered', post_quant=None),
  ),
  ('fsq_cosmos_64k', None): Numbers(
    'siglip2-base-patch16-256', 'XL', 64000, 6, 16, 256, 4096, EPOCHS, 1e-3,
    ('l2',),
    dict(
      levels=(8, 8, 8, 5, 5, 5), convention='cosmos', projection=True,
      post_quant=PostQuantSpec(kernel=1, space='code'),
    ),
  ),
  ('vqvae_16k', None): Numbers(
    SIGLIP, 'L', 16384, 1024, 14, 224, 4096, EPOCHS, 1e-3,
    ('commit', 'l2'), EMA,
  ),
  ('internvit_6b', None): Numbers(
    INTERN, 'XL', 16384, 1536, 16, 256, 768, '45000 steps', 4e-4
  ),
  ('internvit_6b', 'decoder=symmetric'): Numbers(
    INTERN, 'symmetric', 16384, 1536, 16, 256, 768, '45000 steps', 4e-4
  ),
  ('internvit_6b', 'stage=2'): Numbers(
    INTERN, 'XL', 16384, 1536, 16, 256, 768, '60000 steps', 1e-4
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
  second = ('distill',) if arguments and 'stage=2' in arguments else ()
  assert tuple(sorted(spec.losses)) == tuple(sorted(want.losses + second))
  for field, value in want.fields.items():
    assert getattr(tokenizer.quantizer, field) == value, field
  open_encoder = any(n.startswith('encoder/') for n in plan.trainable)
  second = 'stage=2' in (arguments or '')
  assert open_encoder == second
  assert (spec.init_from is not None) == second
  decoder = plan.rates['decoder/head/kernel']
  peak = max(float(decoder(step)) for step in range(0, 4001, 500))
  assert peak == pytest.approx(want.lr, rel=0.02)
  if open_encoder:
    assert plan.rates['encoder/embed/linear/kernel'](2000) == pytest.approx(
      1e-5, rel=1e-3
    )


def test_every_recipe_is_held_to_its_numbers():
  assert {name for name, _ in WANTED} == {*NAMES} - {'quickstart'}


def test_decoders_and_conventions_are_all_exercised():
  used = {want.decoder for want in WANTED.values()}
  assert used == {*DECODERS, 'symmetric'}


def test_simvq_siglip_l():
  """1024-wide latents, a table of 16384 x 1536, an encoder that can open."""
  _, plan = planned('simvq_siglip_l')
  assert plan.tokenizer.latent_dim == 1024
  leaves = trees.flatten(plan.shapes)
  assert leaves['codebook/quantizer/basis'].shape == (16384, 1536)
  assert leaves['params/quantizer/project_in/kernel'].shape == (1024, 1536)
  _, free = planned('simvq_siglip_l', 'frozen=false')
  assert any(n.startswith('encoder/') for n in free.trainable)


def test_a_plain_latent_norm_has_no_parameters():
  """Every recipe names its output norm; RAE's has no affine part."""
  for name in {*NAMES} - {'quickstart'}:
    spec, plan = planned(name)
    assert spec.model['encoder']['output_norm'] == 'plain'
    assert 'encoder/norm/scale' not in plan.leaves


def test_arguments_are_checked():
  with pytest.raises(ValueError, match='step=3.* is none of: steps=1000'):
    planned('quickstart', 'step=3')
  with pytest.raises(ValueError, match='must be like steps=1000'):
    planned('quickstart', 'steps=many')
  with pytest.raises(ValueError, match='must be stage=1 or stage=2'):
    planned('simvq_siglip_l', 'stage=3')
  with pytest.raises(ValueError, match='preset=request or preset=paper'):
    planned('simvq_siglip2_l', 'preset=papers')
  with pytest.raises(ValueError, match='is none of'):
    planned('vqvae_16k', 'stage=2')
