"""Adversarial losses on logits, LeCam, R1, and the adaptive weight.

Logits are f32 of any shape, high for real. The discriminator's losses are hinge
(arXiv 1705.02894), non-saturating (1406.2661) and vanilla, which is half of the
latter; each has its decoder loss. Nothing here depends on a network: the caller
passes logits, or a function that computes them.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vqrae_jax.ops import images as image_ops

Scalar = Float[Array, '']
Logits = Float[Array, '...']
LeCamState = dict[str, Scalar]

MAX_WEIGHT = 1e4  # of the adaptive weight


def d_hinge(real: Logits, fake: Logits) -> Scalar:
  """(mean relu(1 - real) + mean relu(1 + fake)) / 2."""
  return (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2


def d_non_saturating(real: Logits, fake: Logits) -> Scalar:
  """mean softplus(-real) + mean softplus(fake): cross-entropy, summed."""
  return jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()


def d_vanilla(real: Logits, fake: Logits) -> Scalar:
  """(mean softplus(-real) + mean softplus(fake)) / 2."""
  return d_non_saturating(real, fake) / 2


def g_hinge(fake: Logits) -> Scalar:
  """-mean fake."""
  return -fake.mean()


def g_softplus(fake: Logits) -> Scalar:
  """mean softplus(-fake): -log of the chance that it is real."""
  return jax.nn.softplus(-fake).mean()


# By the config's name: what the discriminator and what the decoder minimize.
D_LOSSES = dict(
  hinge=d_hinge, non_saturating=d_non_saturating, vanilla=d_vanilla
)
G_LOSSES = dict(hinge=g_hinge, non_saturating=g_softplus, vanilla=g_softplus)


def lecam_init() -> LeCamState:
  """{"real": f32[], "fake": f32[]}, averages of logits, at zero."""
  return {'real': jnp.zeros(()), 'fake': jnp.zeros(())}


def lecam(real: Logits, fake: Logits, state: LeCamState) -> Scalar:
  """LeCam's regulariser of the discriminator (arXiv 2104.03310).

  mean relu(real - average of fake)^2 + mean relu(average of real - fake)^2,
  a mean over logits, so that microbatches average to the batch. TiTok's form
  has `real.mean()` and `fake.mean()` instead, which microbatches do not.
  """
  above = jax.nn.relu(real - state['fake'])
  below = jax.nn.relu(state['real'] - fake)
  return jnp.mean(above**2) + jnp.mean(below**2)


def lecam_update(
  state: LeCamState, real_mean: Scalar, fake_mean: Scalar, decay: float = 0.999
) -> LeCamState:
  """The averages after one step, from the means of its global batch."""
  means = {'real': real_mean, 'fake': fake_mean}
  return {n: decay * state[n] + (1 - decay) * means[n] for n in state}


def r1_penalty(
  logits: Callable[[Array], Array], images: Float[Array, 'b h w 3']
) -> Scalar:
  """mean over images of |gradient of the sum of an image's logits|^2.

  R1 (arXiv 1801.04406) without its factor gamma/2. The gradient is that with
  respect to images in [0, 1]; over [-1, 1] the penalty would be a quarter.

  Args:
    logits: images f32[b h w 3] -> f32[b n], each row of its own image alone.
    images: real ones in [0, 1], augmented or not.
  """
  gradient = jax.grad(lambda x: logits(x).sum())(images)
  return jnp.mean(jnp.sum(gradient**2, axis=(1, 2, 3)))


def to_8_bits(images: Float[Array, 'b h w 3']) -> Float[Array, 'b h w 3']:
  """Clips to [0, 1] and rounds to multiples of 1/255, as in real images.

  For the reconstructions that the discriminator is trained on: otherwise it
  could tell real images by their rounding. No gradient passes.
  """
  return jnp.round(jnp.clip(images, 0.0, 1.0) * 255) / 255


def head_gradient(
  cotangent: Float[Array, 'b h w 3'],
  features: Float[Array, 'b n e'],
  std: Sequence[float],
  patch: int,
  prefix: int,
) -> Float[Array, 'e p']:
  """The gradient of a loss at the kernel of the decoder's head.

  The head is linear and only fixed operations follow it, so its gradient is one
  product of its inputs with the loss's gradient at the image. Computed in f32
  at the highest precision, whatever dtype the decoder computes in.

  Args:
    cotangent: the loss's gradient at the unclipped reconstruction.
    features: the head's inputs, prefix tokens first.
    std: of the decoder's pixel norm.
    patch: the side of a patch in pixels.
    prefix: how many prefix tokens there are, which decode to no pixels.

  Returns:
    f32[e patch*patch*3]; the gradients of microbatches add up.
  """
  g = cotangent.astype(jnp.float32) * jnp.asarray(std, jnp.float32)
  g = image_ops.patchify(g, patch)
  g = g.reshape(g.shape[0], g.shape[1] * g.shape[2], g.shape[3])
  x = features[:, prefix:].astype(jnp.float32)
  return jnp.einsum('bne,bnp->ep', x, g, precision='highest')


def adaptive_weight(norm_rec: Scalar, norm_gan: Scalar) -> Scalar:
  """clip(norm_rec / (norm_gan + 1e-6), 0, MAX_WEIGHT) (arXiv 2012.09841).

  Args:
    norm_rec, norm_gan: norms over the global batch of `head_gradient` for the
      weighted reconstruction losses and for the adversarial loss.
  """
  return jnp.clip(norm_rec / (norm_gan + 1e-6), 0.0, MAX_WEIGHT)
