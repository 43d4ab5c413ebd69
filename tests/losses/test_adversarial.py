"""Adversarial losses against torch; the adaptive weight's bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vqrae_jax.losses import adversarial
from vqrae_jax.models.decoder import Decoder
from vqrae_jax.specs import IMAGENET_NORM, DecoderSpec, ViTSpec, build_spec

torch = pytest.importorskip('torch')
F = torch.nn.functional

RNG = np.random.default_rng(0)
REAL = jnp.asarray(RNG.normal(0.5, 1.5, (4, 7)), jnp.float32)
FAKE = jnp.asarray(RNG.normal(-0.3, 1.5, (4, 7)), jnp.float32)


def cross_entropy(logits, label):
  return F.binary_cross_entropy_with_logits(
    logits, torch.full_like(logits, label)
  )


# What the discriminator and what the decoder minimize.
WANT = {
  'hinge': (
    lambda r, f: (F.relu(1 - r).mean() + F.relu(1 + f).mean()) / 2,
    lambda f: -f.mean(),
  ),
  'non_saturating': (
    lambda r, f: cross_entropy(r, 1) + cross_entropy(f, 0),
    lambda f: cross_entropy(f, 1),
  ),
  'vanilla': (
    lambda r, f: (cross_entropy(r, 1) + cross_entropy(f, 0)) / 2,
    lambda f: cross_entropy(f, 1),
  ),
}


def held(ours, reference, *logits):
  """Values and gradients to 1e-5."""
  found, grads = jax.value_and_grad(ours, tuple(range(len(logits))))(*logits)
  tensors = [
    torch.tensor(np.asarray(x)).double().requires_grad_() for x in logits
  ]
  want = reference(*tensors)
  want.backward()
  np.testing.assert_allclose(found, want.detach(), rtol=1e-5)
  for g, t in zip(grads, tensors, strict=True):
    error = np.linalg.norm(g - t.grad.numpy())
    assert error < 1e-5 * np.linalg.norm(t.grad)


@pytest.mark.parametrize('name', adversarial.D_LOSSES)
def test_losses_equal_torch(name):
  discriminators, decoders = WANT[name]
  held(adversarial.D_LOSSES[name], discriminators, REAL, FAKE)
  held(adversarial.G_LOSSES[name], decoders, FAKE)


def test_losses_stay_finite_far_out():
  far = jnp.array([-1e4, 1e4])
  for name, loss in adversarial.D_LOSSES.items():
    value, grads = jax.value_and_grad(loss, (0, 1))(far, far)
    assert np.isfinite(value) and np.isfinite(grads).all(), name


def test_lecam_over_three_steps():
  """An independent count in f64, with a decay that shows."""
  state, averages = adversarial.lecam_init(), {'real': 0.0, 'fake': 0.0}
  for step in range(3):
    real, fake = REAL + step, FAKE - step

    def want(r, f, averages=averages):
      above = F.relu(r - averages['fake']).square().mean()
      return above + F.relu(averages['real'] - f).square().mean()

    held(functools.partial(adversarial.lecam, state=state), want, real, fake)
    means = {'real': real.mean(), 'fake': fake.mean()}
    state = adversarial.lecam_update(state, *means.values(), decay=0.9)
    averages = {n: 0.9 * averages[n] + 0.1 * float(means[n]) for n in means}
    for name, average in averages.items():
      np.testing.assert_allclose(state[name], average, rtol=1e-5)


def test_r1_equals_torch_and_reaches_the_parameters():
  x = jnp.asarray(RNG.random((3, 4, 4, 3)), jnp.float32)
  w = jnp.asarray(RNG.normal(size=(4, 4, 3)), jnp.float32)

  def logits(images, w):
    return (w * images**3).reshape(3, -1)

  def theirs(w):
    images = torch.tensor(np.asarray(x)).double().requires_grad_()
    total = logits(images, w).sum()
    (g,) = torch.autograd.grad(total, images, create_graph=True)
    return g.square().sum((1, 2, 3)).mean()

  held(
    lambda w: adversarial.r1_penalty(lambda images: logits(images, w), x),
    theirs,
    w,
  )


def test_eight_bits():
  x = jnp.array([[[[-0.2, 0.1, 0.4999], [1.7, 0.0, 1.0]]]])
  want = np.array([[[[0, 26, 127], [255, 0, 255]]]]) / 255
  np.testing.assert_allclose(adversarial.to_8_bits(x), want, rtol=1e-6)


def test_head_gradient_is_autograds():
  """Of a loss on the image, at the kernel of a decoder's head; parts add."""
  vit = build_spec(ViTSpec, tiny.VIT | tiny.DECODER, 'vit')
  decoder = Decoder(DecoderSpec(vit, IMAGENET_NORM))
  z = jnp.asarray(RNG.normal(size=(3, 4, 4, 24)), jnp.float32)
  params = jax.jit(decoder.init)(jax.random.key(0), z)['params']

  def through(params):
    images, features = decoder.apply({'params': params}, z)
    return (images**3).mean(), (images, features)

  grads, (images, features) = jax.jit(jax.grad(through, has_aux=True))(params)
  want, g = grads['head']['kernel'], 3 * images**2 / images.size
  found = sum(
    adversarial.head_gradient(g[n], features[n], IMAGENET_NORM.std, 4, 1)
    for n in (slice(1), slice(1, 3))
  )
  assert np.linalg.norm(found - want) < 1e-5 * np.linalg.norm(want)


def test_the_weight_is_clipped():
  weight = adversarial.adaptive_weight
  zero, one = jnp.zeros(()), jnp.ones(())
  assert weight(one, zero) == 1e4
  assert weight(zero, zero) == 0
  np.testing.assert_allclose(weight(one, 2 * one), 0.5, rtol=1e-6)
