"""LPIPS and the ConvNeXt term against plain torch, and where they could fail.

torch computes in f64, we in f32: values to 1e-5, gradients to 1e-5 of the
largest.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses import torch_networks
from vqrae_jax.errors import UserError
from vqrae_jax.losses import FROZEN_TERMS
from vqrae_jax.losses.perceptual import _unit, convnext, lpips
from vqrae_jax.pretrained import networks
from vqrae_jax.types import LossInputs
from vqrae_jax.weights import hub

torch = pytest.importorskip('torch')

WIDTHS = (8, 8, 16, 16, 16)
SMALL = dict(depths=(1, 2, 1, 1), widths=(4, 8, 12, 16), classes=10)
SIZES = {'lpips': dict(widths=WIDTHS), 'convnext': SMALL}


def pair(h, w, n=2, seed=0):
  """(reconstruction, targets): the first leaves [0, 1] here and there."""
  rng = np.random.default_rng(seed)
  targets = rng.random((n, h, w, 3), np.float32)
  noise = rng.normal(size=targets.shape).astype(np.float32)
  return targets + 0.1 * noise, targets


def saved(module, path):
  torch.save(module.state_dict(), path)
  return path


def ours(term, tree, reconstruction, targets):
  def loss(image, targets, tree):
    return term(LossInputs(image, targets, {term.__name__: tree}))

  return jax.jit(jax.value_and_grad(loss))(reconstruction, targets, tree)


def double(*modules):
  """Copies in f64: torch's own f32 gradients are off by up to 2e-4 here."""
  return [copy.deepcopy(m).double() for m in modules]


def same(term, tree, loss, h, w):
  """Values and gradients equal those of the torch function `loss`."""
  reconstruction, targets = pair(h, w)
  value, gradient = ours(term, tree, reconstruction, targets)
  sides = map(torch.from_numpy, (reconstruction, targets))
  a, b = (x.double().movedim(-1, 1) for x in sides)
  want = loss(a.requires_grad_(), b).mean()
  want.backward()
  assert float(value) == pytest.approx(want.item(), rel=1e-5)
  slope = a.grad.movedim(1, -1).numpy()
  near = 1e-5 * abs(slope).max()
  np.testing.assert_allclose(gradient, slope, rtol=0, atol=near)


@functools.cache
def vgg(widths=(64, 128, 256, 512, 512)):
  return torch_networks.randomised(torch_networks.VGG16(widths))


def test_lpips(tmp_path):
  heads = torch_networks.randomised(torch_networks.Heads())
  files = {
    'vgg16': saved(vgg(), tmp_path / 'vgg16.pth'),
    'lpips-vgg': saved(heads, tmp_path / 'heads.pth'),
  }
  tree = networks.load('lpips', files)
  loss = functools.partial(torch_networks.lpips, *double(vgg(), heads))
  same(lpips, tree, loss, 33, 45)  # sides that two does not divide


def test_lpips_with_its_published_heads(tmp_path):
  row = hub.FILES['lpips-vgg']
  path = networks.installed_heads() or row.path
  if not path.is_file():
    pytest.skip(
      'no heads of LPIPS: neither the package lpips nor a fetched row'
    )
  heads = torch_networks.Heads()
  heads.load_state_dict(torch.load(path, 'cpu'))
  files = {'vgg16': saved(vgg(), tmp_path / 'vgg16.pth'), 'lpips-vgg': path}
  tree = networks.load('lpips', files)
  assert min(float(w.min()) for w in tree['heads'].values()) >= 0
  loss = functools.partial(torch_networks.lpips, *double(vgg(), heads.eval()))
  same(lpips, tree, loss, 32, 32)


@pytest.mark.parametrize(
  'h, w, sizes',
  [
    (64, 64, SMALL),
    (256, 320, SMALL),
    pytest.param(45, 32, {}, marks=pytest.mark.slow),  # as published
  ],
)
def test_convnext(tmp_path, h, w, sizes):
  """Smaller than 224, and larger, where antialias counts."""
  net = torch_networks.randomised(torch_networks.ConvNeXt(**sizes))
  files = {'convnext-small': saved(net, tmp_path / 'net.pth')}
  tree = networks.load('convnext', files, **sizes)
  loss = functools.partial(torch_networks.convnext, *double(net))
  same(convnext, tree, loss, h, w)


@functools.cache
def tiny(term):
  draw = functools.partial(networks.random, term, **SIZES[term])
  return jax.jit(draw)(jax.random.key(0))


@pytest.mark.parametrize('term', FROZEN_TERMS)
def test_the_distance_to_itself_is_zero_and_flat(term):
  """To rounding, since XLA may compile the two passes differently: relative to
  the distance of unlike images, whose features differ by their own size."""
  _, targets = pair(32, 32)
  loss = functools.partial(ours, FROZEN_TERMS[term], tiny(term))
  value, gradient = loss(targets, targets)
  scale, slope = loss(np.ascontiguousarray(1 - targets), targets)
  assert value <= 1e-9 * scale
  assert np.abs(gradient).max() <= 1e-4 * np.abs(slope).max()


@pytest.mark.parametrize('term', FROZEN_TERMS)
def test_mean_over_the_batch(term):
  """Parts of a batch average to the whole: what accumulating counts on."""
  loss = jax.jit(FROZEN_TERMS[term])
  parts = [pair(32, 32, 2, seed) for seed in (0, 1)]
  whole = map(np.concatenate, zip(*parts, strict=True))
  weights = {term: tiny(term)}
  one, two = (loss(LossInputs(*part, weights)) for part in parts)
  want = (float(one) + float(two)) / 2
  assert float(loss(LossInputs(*whole, weights))) == pytest.approx(want, 1e-5)


@pytest.mark.parametrize('term', FROZEN_TERMS)
def test_only_the_reconstruction_has_a_gradient(term):
  reconstruction, targets = pair(32, 32, 1)

  def loss(targets, tree):
    x = LossInputs(jnp.asarray(reconstruction), targets, {term: tree})
    return FROZEN_TERMS[term](x)

  grads = jax.jit(jax.grad(loss, (0, 1)))(targets, tiny(term))
  assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_the_slope_at_zero_is_finite():
  """Without the relu that hides it: at zero, and near it."""
  for scale in (0.0, 1e-30, 1e-12, 1e-6):
    x = jnp.full((1, 1, 1, 8), scale)
    slope = jax.jacobian(_unit)(x)
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() <= 1.01e5
  np.testing.assert_array_equal(_unit(jnp.zeros((1, 1, 1, 8))), 0)
  x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
  np.testing.assert_allclose(np.square(_unit(x)).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize('term', FROZEN_TERMS)
def test_no_weights(term):
  _, targets = pair(32, 32, 1)
  for weights in (None, {'other': {}}):
    with pytest.raises(UserError, match=f'"{term}"'):
      FROZEN_TERMS[term](LossInputs(targets, targets, weights))


def test_images_too_small_for_lpips():
  _, targets = pair(32, 15, 1)
  x = LossInputs(targets, targets, {'lpips': tiny('lpips')})
  with pytest.raises(UserError, match='16 pixels a side'):
    lpips(x)
