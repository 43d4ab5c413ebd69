"""Adversarial losses against torch; the adaptive weight's bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vqrae_jax.losses import adversarial
from vqrae_jax.models.decoder import Decoder
from vqrae_jax.specs import DecoderSpec, build_spec

torch = pytest.importorskip('torch')
F = torch.nn.functional

RNG = np.random.default_rng(0)
REAL = jnp.asarray(RNG.normal(0.5, 1.5, (4, 7)), jnp.float32)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
FAKE = jnp.asarray(RNG.normal(-0.3, 1.5, (4, 7)), jnp.float32)


def cross_entropy(logits, label):
  return F.binary_cross_entropy_with_logits(
    logits, torch.full_like(logits, label)
  )


D_WANT = {
  'hinge': lambda r, f: (
    torch.clamp(1 - r, min=0).mean() / 2 + torch.clamp(1 + f, min=0).mean() / 2
  ),
  'non_saturating': lambda r, f: cross_entropy(r, 1) + cross_entropy(f, 0),
  'vanilla': lambda r, f: (cross_entropy(r, 1) + cross_entropy(f, 0)) / 2,
}
G_WANT = {
  'hinge': lambda f: -f.mean(),
  'non_saturating': lambda f: cross_entropy(f, 1),
  'vanilla': lambda f: cross_entropy(f, 1),
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


@pytest.mark.parametrize('name', D_WANT)
def test_losses_equal_torch(name):
  held(adversarial.D_LOSSES[name], D_WANT[name], REAL, FAKE)
  held(adversarial.G_LOSSES[name], G_WANT[name], FAKE)
  assert set(D_WANT) == set(adversarial.D_LOSSES) == set(adversarial.G_LOSSES)


def test_losses_stay_finite_far_out():
  far = jnp.array([-1e4, 1e4])
  for name, loss in adversarial.D_LOSSES.items():
    value, grads = jax.value_and_grad(loss, (0, 1))(far, far)
    assert np.isfinite(value) and np.isfinite(grads).all(), name


def test_lecam_over_three_steps():
  """An independent count in f64, with a decay that shows."""
  state, averages = adversarial.lecam_init(), [0.0, 0.0]
  for step in range(3):
    real, fake = REAL + step, FAKE - step

    def want(r, f, averages=tuple(averages)):
      above = torch.clamp(r - averages[1], min=0)
      below = torch.clamp(averages[0] - f, min=0)
      return (above**2).mean() + (below**2).mean()

    held(functools.partial(adversarial.lecam, state=state), want, real, fake)
    means = real.mean(), fake.mean()
    state = adversarial.lecam_update(state, *means, decay=0.9)
    averages = [
      0.9 * a + 0.1 * float(m) for a, m in zip(averages, means, strict=True)
    ]
    np.testing.assert_allclose(state['real'], averages[0], rtol=1e-5)
    np.testing.assert_allclose(state['fake'], averages[1], rtol=1e-5)
  # Microbatches average to the batch.
  parts = [adversarial.lecam(REAL[i::2], FAKE[i::2], state) for i in range(2)]
  batch = adversarial.lecam(REAL, FAKE, state)
  np.testing.assert_allclose(np.mean(parts), batch, rtol=1e-5)


def test_r1_equals_torch_and_reaches_the_parameters():
  x = jnp.asarray(RNG.random((3, 4, 4, 3)), jnp.float32)
  w = jnp.asarray(RNG.normal(size=(12, 5)), jnp.float32)

  def ours(w):
    def logits(images):
      rows = images.reshape(3, 4, 12)
      y = jnp.einsum('bnc,ck->bnk', rows, w, precision='highest')
      return jnp.tanh(y).sum(-1)

    return adversarial.r1_penalty(logits, x)

  def theirs(w):
    images = torch.tensor(np.asarray(x)).double().requires_grad_()
    y = torch.tanh(images.reshape(3, 4, 12) @ w).sum(-1)
    (g,) = torch.autograd.grad(y.sum(), images, create_graph=True)
    return g.pow(2).flatten(1).sum(1).mean()

  held(ours, theirs, w)


def test_eight_bits():
  x = np.array([-0.2, 0.1, 0.4999, 1.7], np.float32).reshape(1, 1, 4, 1)
  x = jnp.asarray(np.repeat(x, 3, -1))
  levels = np.asarray(adversarial.to_8_bits(x))[0, 0, :, 0]
  want = np.array([0, 26, 127, 255], np.float32) / 255
  np.testing.assert_allclose(levels, want, rtol=1e-6)


def test_head_gradient_is_autograds():
  """Of a loss on the image, at the kernel of a decoder's head; parts add."""
  section = dict(vit=tiny.VIT | tiny.DECODER, pixel_norm=IMAGENET)
  decoder = Decoder(build_spec(DecoderSpec, section, 'decoder'))
  z = jnp.asarray(RNG.normal(size=(3, 4, 4, 24)), jnp.float32)
  params = jax.jit(decoder.init)(jax.random.key(0), z)['params']

  def loss(images):
    return (images**3).mean()

  def through(kernel, z):
    changed = params | {'head': params['head'] | {'kernel': kernel}}
    return loss(decoder.apply({'params': changed}, z)[0])

  @jax.jit
  def both(z):
    images, features = decoder.apply({'params': params}, z)
    g = jax.grad(loss)(images)
    found = sum(
      adversarial.head_gradient(g[n], features[n], IMAGENET['std'], 4, 1)
      for n in (slice(1), slice(1, 3))
    )
    return found, jax.grad(through)(params['head']['kernel'], z)

  found, want = both(z)
  assert np.linalg.norm(found - want) < 1e-5 * np.linalg.norm(want)


def test_the_weight_is_clipped():
  weight = adversarial.adaptive_weight
  zero, one = jnp.zeros(()), jnp.ones(())
  assert weight(one, zero) == 1e4
  assert weight(zero, zero) == 0
  assert weight(one, one, low=2.0) == 2
  np.testing.assert_allclose(weight(one, one, eps=1.0), 0.5)
