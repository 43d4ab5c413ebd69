"""A published RAE decoder: its wrappers, and files or specs that do not fit.

`tests/test_convert.py` has the parity with torch and the way back.
"""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from tests import tiny
from tests.weights import torch_rae
from tests.weights.files import equal, error_of
from vqrae_jax.models.decoder import DECODERS
from vqrae_jax.pretrained import rae
from vqrae_jax.specs import IMAGENET_NORM, DecoderSpec, ViTSpec
from vqrae_jax.weights import files

SPEC = DecoderSpec(ViTSpec(**(tiny.VIT | tiny.DECODER)), IMAGENET_NORM)
LATENT = 24
STATE = {k: v.numpy() for k, v in torch_rae.state_dict().items()}


def fit(state=STATE, spec=SPEC, latent=LATENT):
  return rae.fit_decoder(files.arrays('decoder.pt', state), spec, latent)


@pytest.mark.parametrize('prefix', ('', 'decoder.', 'module.decoder.'))
def test_wrappers_of_one_file(prefix):
  state = {prefix + k: v for k, v in STATE.items()}
  others = {'encoder.blocks.0.w': np.ones(2), 'quantizer.basis': np.ones(3)}
  fitted = fit(state | others)
  assert fitted.ignored.keys() == {*others, f'{prefix}decoder_pos_embed'}
  back = rae.export_rae_decoder(fitted.load(), SPEC)
  fixed = 'decoder_pos_embed'
  np.testing.assert_allclose(back.pop(fixed), STATE[fixed], rtol=0, atol=1e-6)
  equal(back, {k: v for k, v in STATE.items() if k != fixed})


@pytest.mark.parametrize(
  ('fields', 'latent', 'words'),
  [
    ({}, 32, ('decoder_embed.weight', '(32, 24)', '(32, 32)')),
    (dict(depth=3), LATENT, ('decoder_layers.2.', 'depth=2')),
    (dict(grid=(6, 6)), LATENT, ('(1, 17, 32)', '(1, 37, 32)')),
    # What shapes cannot say is held to the published.
    (dict(act='gelu_tanh'), LATENT, ('act',)),
    (dict(norm_eps=1e-6), LATENT, ('norm_eps',)),
    (DECODERS['B'] | dict(num_heads=16), LATENT, ('num_heads',)),
    (dict(posemb='learned'), LATENT, ('prefix_has_posemb',)),
    (dict(posemb='rope2d'), LATENT, ('rope2d', 'sincos2d')),
  ],
)
def test_misfits_name_both_sides(fields, latent, words):
  vit = dataclasses.replace(SPEC.vit, **fields)
  spec = dataclasses.replace(SPEC, vit=vit)
  message = error_of(fit, STATE, spec, latent)
  assert all(word in message for word in words), message


@pytest.mark.parametrize('dtype', ('float16', ml_dtypes.bfloat16))
def test_fixed_positions_of_fewer_bits_are_still_fixed(dtype):
  state = dict(STATE, decoder_pos_embed=STATE['decoder_pos_embed'] + 3e-6)
  state = {k: v.astype(dtype) for k, v in state.items()}
  assert not rae.has_trained_positions(files.arrays('d.pt', state), SPEC)
  assert 'decoder_pos_embed' in fit(state).ignored


def test_foreign_positions_are_named():
  positions = STATE['decoder_pos_embed'] * 1.5 + 0.25
  message = error_of(fit, STATE | {'decoder_pos_embed': positions})
  assert 'differs by up to 0.75' in message and '="learned"' in message
