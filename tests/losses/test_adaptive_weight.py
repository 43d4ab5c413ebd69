"""The adaptive weight against two backward passes of torch.

RAE's decoder and the PatchGAN in plain torch and f64: autograd takes both
losses' gradients at the head's kernel through the whole decoder. Ours has one
forward, two cotangents at the image and a product each, in f32: to 1e-5.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.nn import torch_discriminators
from tests.weights import torch_rae
from vqrae_jax.losses import IMAGE_TERMS, adversarial
from vqrae_jax.models.decoder import Decoder
from vqrae_jax.nn.patchgan import PatchGAN
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import rae
from vqrae_jax.specs import IMAGENET_NORM, DecoderSpec, ViTSpec
from vqrae_jax.types import LossInputs
from vqrae_jax.weights.files import arrays

torch = pytest.importorskip('torch')

SPEC = DecoderSpec(
  ViTSpec(
    width=32,
    depth=2,
    mlp_dim=48,
    num_heads=4,
    patch_size=4,
    grid=(4, 4),
    norm_eps=1e-12,
    posemb='sincos2d',
    num_prefix_tokens=1,
  ),
  IMAGENET_NORM,
)
LATENT, HEADS = 24, 4
PIXELS = (IMAGENET_NORM.mean, IMAGENET_NORM.std)
PATCH = dict(hidden=8, halvings=2, groups=4, pool=3)
WEIGHTS = {'l1': 1.0, 'l2': 0.7}


def by_torch(state, discriminator, z, target):
  """(gradients [p e] at the head's weight of both losses, their balance)."""
  w = {name: x.double() for name, x in state.items()}
  kernel = w['decoder_pred.weight'].requires_grad_()
  images = torch_rae.decode(
    w, torch.from_numpy(z).double().flatten(1, 2), HEADS, *PIXELS
  )
  error = images - torch.from_numpy(target)
  rec = WEIGHTS['l1'] * error.abs().mean() + WEIGHTS['l2'] * (error**2).mean()
  gan = -discriminator(2 * images.permute(0, 3, 1, 2) - 1).mean()
  (r,) = torch.autograd.grad(rec, kernel, retain_graph=True)
  (g,) = torch.autograd.grad(gan, kernel)
  return r, g, torch.clamp(r.norm() / (g.norm() + 1e-6), 0, 1e4)


def test_it_equals_two_autograd_passes_of_torch():
  torch.manual_seed(0)
  state = torch_rae.state_dict(latent=LATENT)
  file = arrays('w.pt', {k: x.numpy() for k, x in state.items()})
  reference = torch_discriminators.PatchGAN(**PATCH)
  rng = np.random.default_rng(0)
  z = rng.normal(size=(3, 4, 4, LATENT)).astype(np.float32)
  target = rng.random((3, 16, 16, 3), np.float32)
  *want, balance = by_torch(state, reference, z, target)

  leaves = rae.fit_decoder(file, SPEC, LATENT).load()
  params, disc = map(trees.unflatten, (leaves, reference.leaves()))
  head_gradient = functools.partial(
    adversarial.head_gradient, std=IMAGENET_NORM.std, patch=4, prefix=1
  )

  @jax.jit
  def ours(params, disc, z, target):
    images, features = Decoder(SPEC).apply({'params': params}, z)

    def rec(x):
      inputs = LossInputs(x, target)
      return sum(w * IMAGE_TERMS[n](inputs) for n, w in WEIGHTS.items())

    def gan(x):
      return adversarial.g_hinge(PatchGAN(**PATCH).apply({'params': disc}, x))

    cotangents = [jax.grad(f)(images) for f in (rec, gan)]
    found = [head_gradient(g, features) for g in cotangents]
    # Images apart, as microbatches hold them, add.
    parts = [
      head_gradient(g[:1], features[:1]) + head_gradient(g[1:], features[1:])
      for g in cotangents
    ]
    weight = adversarial.adaptive_weight(*map(jnp.linalg.norm, found))
    return found, parts, weight

  with jax.default_matmul_precision('highest'):
    found, parts, weight = ours(params, disc, z, jnp.asarray(target))
  for have in (found, parts):
    for h, there in zip(have, want, strict=True):
      off = np.linalg.norm(h - there.numpy().T) / there.norm()
      assert off < 1e-5, f'{off:.1e}'
  assert float(weight) == pytest.approx(balance.item(), rel=1e-5)
