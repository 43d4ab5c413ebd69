"""The loss tables: a config's `losses` section names their keys.

An image term maps `LossInputs` to f32[]; its gradient is taken at the
reconstruction. A latent term maps `LatentInputs` to f32[]; the forward
carries it and the one pullback brings its gradient. Each loss takes images in
[0, 1], keeps one name from config to plot, and is logged unweighted.
"""

from vqrae_jax.losses.latent import codebook, commit, distill
from vqrae_jax.losses.reconstruction import l1, l2

IMAGE_TERMS = {'l1': l1, 'l2': l2}
LATENT_TERMS = {'commit': commit, 'codebook': codebook, 'distill': distill}
