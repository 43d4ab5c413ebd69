"""A published RAE decoder: its wrappers, and files or specs that do not fit.

`tests/test_convert.py` has the parity with torch and the way back.
"""

import dataclasses

import numpy as np
import pytest

from tests import tiny
from tests.weights import torch_rae
from vqrae_jax.errors import UserError
from vqrae_jax.pretrained import rae
from vqrae_jax.specs import IMAGENET_NORM, DecoderSpec, ViTSpec
from vqrae_jax.weights import files

SPEC = DecoderSpec(ViTSpec(**(tiny.VIT | tiny.DECODER)), IMAGENET_NORM)
LATENT = 24
STATE = {k: v.numpy() for k, v in torch_rae.state_dict().items()}


def vit(**fields):
  return dataclasses.replace(SPEC, vit=dataclasses.replace(SPEC.vit, **fields))


def fit(state=STATE, spec=SPEC, latent=LATENT):
  return rae.fit_decoder(files.arrays('decoder.pt', state), spec, latent)


@pytest.mark.parametrize('prefix', ('', 'decoder.', 'module.decoder.'))
def test_wrappers_of_one_file(prefix):
  state = {prefix + k: v for k, v in STATE.items()}
  others = {'encoder.blocks.0.w': np.ones(2), 'quantizer.basis': np.ones(3)}
  fitted = fit(state | others)
  assert fitted.ignored.keys() == {*others, f'{prefix}decoder_pos_embed'}
  back = rae.export_rae_decoder(fitted.load(), SPEC)
  assert back.keys() == STATE.keys()
  for key, value in STATE.items():
    np.testing.assert_allclose(back[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ('spec', 'latent', 'words'),
  [
    (SPEC, 32, ('decoder_embed.weight', '(32, 24)', '(32, 32)')),
    (vit(depth=3), LATENT, ('decoder_layers.2.', 'depth=2')),
    (vit(depth=1), LATENT, ('decoder_layers.1.',)),
    (vit(grid=(6, 6)), LATENT, ('(1, 17, 32)', '(1, 37, 32)')),
    (vit(patch_size=8), LATENT, ('decoder_pred.weight', '(192, 32)')),
    # What shapes cannot say is held to the published.
    (vit(act='gelu_tanh'), LATENT, ('act',)),
    (vit(norm_eps=1e-6), LATENT, ('norm_eps',)),
    (
      vit(width=768, depth=12, mlp_dim=3072, num_heads=16),
      LATENT,
      ('num_heads',),
    ),
    (vit(posemb='learned'), LATENT, ('prefix_has_posemb',)),
  ],
)
def test_misfits_name_both_sides(spec, latent, words):
  with pytest.raises(UserError) as caught:
    fit(STATE, spec, latent)
  message = str(caught.value)
  assert '\n' not in message and all(word in message for word in words), message


def test_foreign_positions_are_named():
  positions = STATE['decoder_pos_embed'] * 1.5 + 0.25
  with pytest.raises(UserError, match=r'differs by up to 0\.75.*="learned"'):
    fit(STATE | {'decoder_pos_embed': positions})
