"""Every product whose rounding would move codes or losses asks for HIGHEST.

The jaxprs are walked, sub-jaxprs and gradients included: of quantizers, the
losses' own arithmetic, the adaptive weight and the resampling of positions.
ViTs and the networks of losses compute in the run's precision.
"""

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from vqrae_jax import losses, quantizers
from vqrae_jax.losses import adversarial, perceptual
from vqrae_jax.ops import codes, images
from vqrae_jax.types import LossInputs

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
D = 32


def products(fn, *args):
  """[precision] of each dot_general and convolution, sub-jaxprs included."""
  found = []

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name in ('dot_general', 'conv_general_dilated'):
        found.append(eqn.params['precision'])
      for value in jax.tree.leaves(list(eqn.params.values())):
        value = getattr(value, 'jaxpr', value)  # closed ones
        if hasattr(value, 'eqns'):
          walk(value)

  walk(jax.make_jaxpr(fn)(*args).jaxpr)
  return found


def total(tree):
  return sum(jnp.sum(x) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize('kind', [*tiny.FORMS, 'none'])
def test_quantizers(kind):
  section = tiny.quantizer(kind, post_quant=dict(kernel=3))
  quantizer = quantizers.build(section, D, 'float32')
  z = jnp.zeros((1, 4, 4, D))
  variables = jax.eval_shape(quantizer.init, jax.random.key(0), z)

  def loss(params, rest, z):
    out = quantizer.apply(
      {**rest, 'params': params}, z, train=True, losses=quantizer.loss_names
    )
    return total((out.z_q, out.losses))

  rest = {k: v for k, v in variables.items() if k != 'params'}
  found = products(jax.grad(loss, (0, 2)), variables['params'], rest, z)
  # The search for the nearest code has a branch of its own for GPUs.
  searches = kind.startswith(('vq', 'simvq'))
  if kind in tiny.NESTED and kind not in ('residual-fsq', 'grouped-bsq'):
    searches = 2  # one a stage, group or scale
  assert found.count(codes.SIX_BF16) == searches
  assert len(found) >= 3 and set(found) - {codes.SIX_BF16} == {HIGHEST}
  if kind.startswith(('residual', 'multiscale')):
    lookup = lambda v, i: quantizer.apply(v, i, method='indices_to_codes')  # noqa: E731
    indices = jax.eval_shape(quantizer.apply, variables, z).indices
    assert set(products(lookup, variables, indices)) <= {HIGHEST}
  elif kind != 'none':
    back = jax.eval_shape(quantizer.apply, variables, z).codes
    lookup = lambda v, c: quantizer.apply(v, c, method='codes_to_indices')  # noqa: E731
    assert set(products(lookup, variables, back)) <= {HIGHEST, codes.SIX_BF16}


class NoNetwork:
  """In place of a loss network: outputs without a product."""

  def __init__(self, *sizes):
    self.sizes = sizes[:-1]  # the last says how it is run

  def apply(self, variables, x):
    mean = x.mean((1, 2), keepdims=True)[..., :1]
    if len(self.sizes) == 1:  # VGG16's five features
      return [mean * jnp.ones(width) for width in self.sizes[0]]
    return mean[:, 0, 0] * jnp.ones(self.sizes[2])


def test_losses(monkeypatch):
  monkeypatch.setattr(perceptual, 'VGG16', NoNetwork)
  monkeypatch.setattr(perceptual, 'ConvNeXt', NoNetwork)
  heads = {f'tap{n}': jnp.ones(4) for n in range(1, 6)}
  blocks = {f'blocks{n}': {'scale': jnp.ones((1, 4))} for n in range(1, 5)}
  net = blocks | {'head': {'bias': jnp.ones(10)}}
  weights = dict(lpips=dict(net={}, heads=heads), convnext=dict(net=net))
  x = jnp.zeros((1, 32, 32, 3))
  found = []
  for term in (losses.IMAGE_TERMS | losses.FROZEN_TERMS).values():
    loss = jax.grad(lambda x, t=term: t(LossInputs(x, 0 * x, weights)))
    found += products(loss, x)
  assert len(found) >= 10 and set(found) == {HIGHEST}


def test_adaptive_weight_and_resampling():
  g, features = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 5, D))
  norm = (1.0, 1.0, 1.0)
  for fn, args in (
    (lambda g, f: adversarial.head_gradient(g, f, norm, 4, 1), (g, features)),
    (lambda t: images.resize(t, (4, 9), 'bicubic', False), (g[0],)),
    (lambda x: images.resize_exact(x, (5, 9), 'bicubic'), (g,)),
    (jax.grad(lambda x: images.resize_exact(x, (5, 9), 'bicubic').sum()), (g,)),
  ):
    found = products(fn, *args)
    assert found and set(found) == {HIGHEST}
  nearest = products(codes.nearest_code, jnp.zeros((9, 4)), jnp.zeros((7, 4)))
  assert len(nearest) == 2 and set(nearest) == {HIGHEST, codes.SIX_BF16}
