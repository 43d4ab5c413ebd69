"""LPIPS and the ConvNeXt term against plain torch, and where they could fail.

torch computes in f64, we in f32: values to 1e-5, gradients to 1e-5 of the
largest.
"""

import functools

import jax
import numpy as np
import pytest

from tests.losses import torch_networks
from vqrae_jax.losses import FROZEN_TERMS
from vqrae_jax.pretrained import networks
from vqrae_jax.types import LossInputs
from vqrae_jax.weights import hub

torch = pytest.importorskip('torch')

SMALL = torch_networks.SMALL


def pair(h, w, n=2):
  """(reconstruction, targets): the first leaves [0, 1] here and there."""
  rng = np.random.default_rng(0)
  targets = rng.random((n, h, w, 3), np.float32)
  noise = rng.normal(size=targets.shape).astype(np.float32)
  return targets + 0.1 * noise, targets


@functools.cache
def ours(term):
  """jit of (reconstruction, targets, weights) -> (loss, its gradients)."""

  def loss(image, targets, tree):
    return FROZEN_TERMS[term](LossInputs(image, targets, {term: tree}))

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


@functools.cache
def tiny(term):
  draw = functools.partial(networks.random, term, **SMALL[term])
  return jax.jit(draw)(jax.random.key(0))


def same(term, tree, nets, h, w):
  """Value and gradient are torch's; targets and weights have no gradient."""
  reconstruction, targets = pair(h, w)
  value, (gradient, *others) = ours(term)(reconstruction, targets, tree)
  assert not any(np.any(g) for g in jax.tree.leaves(others))
  # torch's own f32 gradients are off by up to 2e-4 here.
  nets = [net.double() for net in nets.values()]
  sides = map(torch.from_numpy, (reconstruction, targets))
  a, b = (x.double().movedim(-1, 1) for x in sides)
  want = getattr(torch_networks, term)(*nets, a.requires_grad_(), b).mean()
  want.backward()
  assert float(value) == pytest.approx(want.item(), rel=1e-5)
  slope = a.grad.movedim(1, -1).numpy()
  near = 1e-5 * abs(slope).max()
  np.testing.assert_allclose(gradient, slope, rtol=0, atol=near)


def test_lpips(tmp_path):
  """With its published heads where they are here, else with random ones."""
  nets = torch_networks.made('lpips')
  files = torch_networks.saved(tmp_path, torch_networks.states(nets))
  published = networks.installed_heads() or hub.FILES['lpips-vgg'].path
  if published.is_file():
    files['lpips-vgg'] = published
    nets['lpips-vgg'].load_state_dict(torch.load(published, 'cpu'))
  tree = networks.load('lpips', files)
  same('lpips', tree, nets, 33, 45)  # sides that two does not divide


@pytest.mark.parametrize(
  'h, w, sizes',
  [
    (64, 64, SMALL['convnext']),
    (256, 320, SMALL['convnext']),
    pytest.param(45, 32, {}, marks=pytest.mark.slow),  # as published
  ],
)
def test_convnext(tmp_path, h, w, sizes):
  """Smaller than 224, and larger, where antialias counts."""
  nets = torch_networks.made('convnext', **sizes)
  files = torch_networks.saved(tmp_path, torch_networks.states(nets))
  tree = networks.load('convnext', files, **sizes)
  same('convnext', tree, nets, h, w)


@pytest.mark.parametrize('term', FROZEN_TERMS)
def test_the_distance_to_itself_is_zero_and_flat(term):
  """To rounding, since XLA may compile the two passes differently: relative to
  the distance of unlike images, whose features differ by their own size."""
  _, targets = pair(32, 32)
  value, (gradient, *_) = ours(term)(targets, targets, tiny(term))
  scale, (slope, *_) = ours(term)(1 - targets, targets, tiny(term))
  assert value <= 1e-9 * scale
  assert np.abs(gradient).max() <= 1e-4 * np.abs(slope).max()


def test_features_near_zero_have_a_finite_gradient():
  """At zero a relu would hide an infinite slope, so near it too."""
  for scale in (0.0, 1e-30, 1e-12, 1e-6):
    net = jax.tree.map(lambda x, s=scale: np.full_like(x, s), tiny('lpips'))
    value, (gradient, *_) = ours('lpips')(*pair(32, 32), net)
    assert np.isfinite(value) and np.isfinite(gradient).all(), scale
