"""Every recipe builds, trains all that it means to, and has its launch line.

Their numbers are cited in `configs/common.py` and held by the golden contract.
"""

import ast
import dataclasses
import functools
import importlib
import pathlib
import re

import jax
import pytest

from tests.contract import today
from tests.contract.today import recipe as get
from vqrae_jax import sharding
from vqrae_jax.losses import FROZEN_TERMS
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import setup as setup_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib
from vqrae_jax.train.__main__ import default_workdir

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'
NAMES = sorted({p.stem for p in CONFIGS.glob('[!_]*.py')} - {'common'})
SMALL = {'quickstart', 'scratch', 'two_stages_small'}  # of no paper
LARGE = [n for n in NAMES if n not in SMALL]
# With what else they can be asked for; None is the recipe itself.
ALL = [(n, None) for n in NAMES] + [
  tuple(row.split(':'))
  for row in (
    *today.golden('recipes'),
    'finetune_decoder:recipe=vq_dinov2_b',
    'scratch:quantizer=simvq',
    'scratch:quantizer=fsq,pixels=64',
    'scratch:quantizer=none',
    'finetune_decoder:recipe=ideal_siglip2_l',
    'raev2_dinov3_l:blocks=7',
  )
  if ':' in row
]
FAST = [
  ('quickstart', None), ('scratch', None), ('vq_dinov2_b', None),
  ('simvq_siglip_l', 'stage=2'),
]  # fmt: skip


def read(name, arguments=None):
  return config_lib.read_config(get(name, arguments))


@functools.cache  # a plan traces a full model
def planned(name, arguments):
  spec = read(name, arguments)
  tokenizer = build_tokenizer(spec.model)
  return spec, *setup_lib.plan_step(spec, tokenizer, 1000)[:2]


def check_builds(spec, step, numbers):
  """Every leaf is reached by a loss and has a place on the mesh."""
  mesh = sharding.make_mesh(spec.mesh.layout, tensor=spec.mesh.tensor)
  shapes = state_lib.state_shapes(step, mesh)
  images = jax.ShapeDtypeStruct((2, *spec.data.size, 3), 'uint8')
  step_lib.check_reach(step, *shapes, setup_lib.f32(numbers), images)
  sharding.check_batch(spec.batch_size, mesh)


@pytest.mark.parametrize('name', LARGE)
def test_weights_come_from_the_table(name):
  """And latents are RAE's, but those of several blocks."""
  spec = read(name)
  section = spec.model['encoder']
  build_tokenizer(spec.model)
  assert section['output_norm'] == 'plain' or section.get('layers')
  assert spec.init.encoder == (None if spec.init_from else section['name'])


@pytest.mark.parametrize(
  'name, arguments',
  [
    pytest.param(*row, marks=() if row in FAST else pytest.mark.slow)
    for row in ALL
  ],
)
def test_builds_and_every_leaf_is_moved(name, arguments):
  """Without the networks of losses, whose tracing takes long and is the same
  in all."""
  spec, step, numbers = planned(name, arguments)
  light = tuple(n for n in step.losses if n not in FROZEN_TERMS)
  light = dataclasses.replace(step, losses=light, gan=None)
  check_builds(spec, light, numbers)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, arguments',
  [('vq_dinov2_b', None), ('paper_internvit_300m', 'stage=2')],
)
def test_builds_with_all_its_networks(name, arguments):
  """DINO's discriminator with LPIPS, PatchGAN with both and a teacher."""
  spec, step, numbers = planned(name, arguments)
  assert step.networks and step.gan
  check_builds(spec, step, numbers)


def launch_lines(name):
  """(config's source, {flag: value}) of each command in a docstring."""
  text = (CONFIGS / f'{name}.py').read_text()
  for line in ast.get_docstring(ast.parse(text)).splitlines():
    if line.startswith('python -m vqrae_jax.train '):
      flags = dict(
        word.removeprefix('--').split('=', 1) for word in line.split()[3:]
      )
      yield flags.pop('config'), flags


@pytest.mark.parametrize('name', LARGE)
def test_launch_lines_are_commands(name):
  """A second stage starts where the first, by its line, has left its run."""
  lines = list(launch_lines(name))
  asked = [source.partition(':')[2] for source, _ in lines]
  staged = (name, 'stage=2') in ALL
  assert any('stage=2' in a for a in asked) == staged
  for (source, flags), arguments in zip(lines, asked, strict=True):
    assert source.partition(':')[0] == f'configs/{name}.py'
    read(name, arguments or None)
    assert flags.pop('config.data.source') == 'FOLDER'
    if name == 'finetune_decoder':
      assert flags == {'config.init_from': 'TOKENIZER'}
    elif 'stage=2' in arguments:
      first = re.sub(r',?stage=2', '', arguments)
      assert first in asked
      before = f'configs/{name}.py' + (f':{first}' if first else '')
      assert flags == {'config.init_from': default_workdir(before)}
    else:
      assert not flags


def test_a_finetuned_decoder_moves_no_index():
  """Nothing that an index is a function of: encoder, quantizer, its table."""
  _, step, _ = planned('finetune_decoder', 'recipe=vq_dinov2_b')
  assert {n.split('/')[0] for n in step.trainable} == {'decoder'}
  assert not step.updates_codebook
  recipes = importlib.import_module('configs.finetune_decoder').RECIPES
  assert {*recipes} == {*LARGE} - {
    'finetune_decoder', 'rae_dinov2_b', 'raev2_dinov3_l'
  }  # fmt: skip
  spec = read('finetune_decoder', 'recipe=simvq_siglip2_l,preset=paper')
  like = read('simvq_siglip2_l', 'preset=paper')
  assert spec.model == like.model and spec.data == like.data


@pytest.mark.parametrize('name', LARGE)
def test_images_can_be_held_out_by_flags(name):
  """Tiles are as large as training images unless a flag says otherwise."""
  config = get(name)
  assert config_lib.read_config(config).eval is None
  config.eval.update(source='photos', every=1000)
  spec = config_lib.read_config(config)
  assert (spec.eval.source, spec.eval.every) == ('photos', 1000)
  assert spec.eval.tile == config.data.image_size


def test_held_out_data_may_come_from_elsewhere():
  config = get('two_stages_small')
  config.data.source = 'a'
  assert config.eval.source == 'a'
  config.eval.source = 'b'
  assert config.data.source == 'a'


@pytest.mark.parametrize(
  'name, arguments, words',
  [
    ('quickstart', 'step=3', 'step=3.* steps=4000'),
    ('quickstart', 'steps=many', 'steps=4000'),
    ('simvq_siglip_l', 'stage=3', 'stage=1 or stage=2'),
    ('simvq_siglip2_l', 'preset=papers', 'preset=request or preset=paper'),
    ('vqvae_16k', 'stage=2', 'stage=2'),
    ('finetune_decoder', 'recipe=quickstart', 'recipe=simvq_siglip_l or'),
    ('simvq_siglip_l', 'open=6', 'open=6.*frozen=False'),
    ('simvq_siglip_l', 'stage=2,open=30', 'last=30'),
    ('simvq_siglip_l', 'stage=2,decay=1.5', 'decay=1.5'),
  ],
)
def test_arguments_are_checked(name, arguments, words):
  with pytest.raises(ValueError, match=words):
    get(name, arguments)
