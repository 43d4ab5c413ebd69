"""VGG16's five features against plain torch, in f32 to 1e-5 of the largest."""

import jax
import jax.numpy as jnp

from tests.losses import torch_networks
from tests.nn.parity import compare
from vqrae_jax.nn.vgg import VGG16
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import networks


def test_parity():
  theirs = torch_networks.randomised(torch_networks.VGG16())
  compare(VGG16(), networks.VGG16_TABLE, theirs, 32)


def test_sides_that_two_does_not_divide():
  widths = (4, 4, 8, 8, 8)
  theirs = torch_networks.randomised(torch_networks.VGG16(widths))
  compare(VGG16(widths), networks.VGG16_TABLE, theirs, 29)


def test_the_published_size():
  image = jnp.zeros((1, 32, 32, 3))
  params = jax.eval_shape(VGG16().init, jax.random.key(0), image)['params']
  leaves = trees.flatten(params)
  # torchvision's `features`: 138,357,544 less the classifier's 123,642,856.
  assert sum(x.size for x in leaves.values()) == 14_714_688
  assert len(leaves) == 26
