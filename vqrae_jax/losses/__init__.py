"""The loss tables: a config's `losses` section names their keys.

An image term maps `LossInputs` to f32[]; its gradient is taken at the
reconstruction. A frozen term is an image term that uses a frozen network, whose
arrays are in the inputs (`pretrained/networks.py` loads them). A latent term
maps `LatentInputs` to f32[]; it is part of the forward pass and gets its
gradient from the single pullback. The name "gan" is reserved for the
discriminator (`adversarial.py`). Each loss takes images in [0, 1], has one name
from config to plot, and is logged unweighted.
"""

from vqrae_jax.losses.latent import (
  codebook,
  commit,
  deep_features,
  distill,
  diversity,
  entropy,
  kl,
  orthogonal,
  shallow_features,
)
from vqrae_jax.losses.perceptual import convnext, lpips
from vqrae_jax.losses.reconstruction import l1, l2

IMAGE_TERMS = {'l1': l1, 'l2': l2}
FROZEN_TERMS = {'lpips': lpips, 'convnext': convnext}
# Of the quantizer, if it has them (`Quantizer.loss_names`).
QUANTIZER_TERMS = {
  'commit': commit, 'codebook': codebook, 'entropy': entropy,
  'diversity': diversity, 'orthogonal': orthogonal, 'kl': kl,
}  # fmt: skip
LATENT_TERMS = QUANTIZER_TERMS | {
  'distill': distill,
  'features/deep': deep_features,  # losses.features=dict(deep=…, shallow=…)
  'features/shallow': shallow_features,
}
