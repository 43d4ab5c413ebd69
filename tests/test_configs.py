"""Every recipe builds, is documented by its launch line, and is found."""

import importlib
import pathlib

import jax
import pytest

from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.ops import trees
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


@pytest.mark.parametrize('name', NAMES)
def test_builds_and_every_leaf_is_moved(name):
  spec, plan = planned(name)
  state, frozen = jax.eval_shape(lambda: state_lib.fresh_state(plan, 0))
  images = jax.ShapeDtypeStruct((2, *spec.data.size, 3), 'uint8')
  step_lib.check_reach(plan, state, frozen, images)


def test_simvq_siglip_l():
  """The request's numbers: 1024-wide latents, 16384 codes of 1536, 14 x 14."""
  _, plan = planned('simvq_siglip_l')
  tokenizer = plan.tokenizer
  assert tokenizer.index_shape(224, 224) == (14, 14)
  assert tokenizer.latent_dim == 1024
  leaves = trees.flatten(plan.shapes)
  assert leaves['codebook/quantizer/basis'].shape == (16384, 1536)
  assert leaves['params/quantizer/project_in/kernel'].shape == (1024, 1536)
  encoder = sum(
    leaf.size for n, leaf in leaves.items() if n.startswith('params/encoder/')
  )
  assert 302e6 < encoder < 305e6  # 316M with the unused pooling head
  assert not any(n.startswith('encoder/') for n in plan.trainable)
  _, free = planned('simvq_siglip_l', 'frozen=false')
  assert any(n.startswith('encoder/') for n in free.trainable)


def test_arguments_are_checked():
  with pytest.raises(ValueError, match='step=3.* is none of: steps=1000'):
    planned('quickstart', 'step=3')
  with pytest.raises(ValueError, match='must be like steps=1000'):
    planned('quickstart', 'steps=many')
