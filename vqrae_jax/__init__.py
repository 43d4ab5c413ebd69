"""vqrae_jax: images to discrete tokens and back, in JAX.

The public API. Everything but the two `load_` is pure: it jits, vmaps, shards
over any mesh and exports with a symbolic batch.
"""

import importlib

# The module of each public name, imported on first use.
_PUBLIC = {
  # build and open
  'build_tokenizer': 'vqrae_jax.models.tokenizer',
  'load_tokenizer': 'vqrae_jax.export',
  'load_encoder': 'vqrae_jax.pretrained.encoders',
  # images to tokens and back
  'encode_to_indices': 'vqrae_jax.inference',
  'decode_from_indices': 'vqrae_jax.inference',
  'encode': 'vqrae_jax.inference',
  'reconstruct': 'vqrae_jax.inference',
  # health
  'codebook_usage': 'vqrae_jax.inference',
  # errors a user can fix
  'UserError': 'vqrae_jax.errors',
}

__all__ = sorted(_PUBLIC)
__version__ = '0.2.0'


def __getattr__(name: str):
  if name not in _PUBLIC:
    raise AttributeError(f'module "vqrae_jax" has no attribute "{name}"')
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
  return [*__all__, '__version__']
