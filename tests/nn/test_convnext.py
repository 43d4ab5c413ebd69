"""ConvNeXt's logits against plain torch, in f32 to 1e-5 of the largest."""

import jax
import jax.numpy as jnp
import pytest

from tests.losses import torch_networks
from tests.nn.parity import compare
from vqrae_jax.nn.convnext import ConvNeXt
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import networks


def check(side, **sizes):
  theirs = torch_networks.randomised(torch_networks.ConvNeXt(**sizes))
  compare(ConvNeXt(**sizes), networks.CONVNEXT_TABLE, theirs, side)


@pytest.mark.parametrize('side', (32, 45))
def test_parity(side):
  check(side, depths=(1, 2, 1, 1), widths=(8, 16, 24, 32), classes=10)


@pytest.mark.slow
def test_parity_at_the_published_size():
  check(32)


def test_the_published_size():
  image = jnp.zeros((1, 32, 32, 3))
  params = jax.eval_shape(ConvNeXt().init, jax.random.key(0), image)['params']
  leaves = trees.flatten(params)
  # As torchvision states it for convnext_small.
  assert sum(x.size for x in leaves.values()) == 50_223_688
  assert leaves['blocks3/depthwise/kernel'].shape == (27, 7, 7, 1, 384)
