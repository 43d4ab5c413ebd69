"""A published RAE decoder: parity with torch, round trips, misfits."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from tests.weights import torch_rae
from vqrae_jax.errors import UserError
from vqrae_jax.models.decoder import Decoder
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import rae
from vqrae_jax.specs import IMAGENET_NORM, DecoderSpec, ViTSpec

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
LATENT = 24


def saved(tmp_path, value, name='decoder.pt'):
  torch.save(value, tmp_path / name)
  return tmp_path / name


def vit(**fields):
  return dataclasses.replace(SPEC, vit=dataclasses.replace(SPEC.vit, **fields))


@pytest.fixture(scope='module')
def state():
  return torch_rae.state_dict()


@functools.cache
def decoder(spec):
  return jax.jit(Decoder(spec).apply)


def decode(spec, leaves, z):
  variables = {'params': trees.unflatten(leaves)}
  with jax.default_matmul_precision('highest'):
    return np.asarray(decoder(spec)(variables, z)[0])


def error(path, spec=SPEC, latent=LATENT):
  with pytest.raises(UserError) as caught:
    rae.load_rae_decoder(path, spec, latent)
  message = str(caught.value)
  assert '\n' not in message
  return message


def latents():
  rng = np.random.default_rng(3)
  return rng.normal(size=(2, 4, 4, LATENT)).astype(np.float32)


def test_it_decodes_as_torch_does(tmp_path, state):
  z = latents()
  want = torch_rae.decode(
    state, z.reshape(2, 16, LATENT), 4, IMAGENET_NORM.mean, IMAGENET_NORM.std
  )
  leaves = rae.load_rae_decoder(saved(tmp_path, state), SPEC, LATENT)
  have = decode(SPEC, leaves, z)
  assert np.linalg.norm(have - want) < 1e-5 * np.linalg.norm(want)
  # It can fail: another layout of the head's values is far off.
  leaves['head/kernel'] = (
    leaves['head/kernel'].reshape(32, 4, 4, 3).swapaxes(1, 2).reshape(32, 48)
  )
  assert np.linalg.norm(decode(SPEC, leaves, z) - want) > 0.1


def test_round_trip_is_bitwise(tmp_path, state):
  leaves = rae.load_rae_decoder(saved(tmp_path, state), SPEC, LATENT)
  back = rae.export_rae_decoder(leaves, SPEC)
  assert back.keys() == state.keys()
  for key, value in state.items():
    if key == 'decoder_pos_embed':
      np.testing.assert_allclose(back[key], value.numpy(), atol=1e-6)
    else:
      assert back[key].tobytes() == value.numpy().tobytes(), key
      assert back[key].shape == value.shape
  again = {k: torch.from_numpy(v.copy()) for k, v in back.items()}
  reloaded = rae.load_rae_decoder(saved(tmp_path, again), SPEC, LATENT)
  for name, leaf in leaves.items():
    assert leaf.tobytes() == reloaded[name].tobytes(), name


@pytest.mark.parametrize(
  'wrap',
  [
    lambda s: {f'decoder.{k}': v for k, v in s.items()},
    lambda s: {f'module.decoder.{k}': v for k, v in s.items()},
    lambda s: dict(
      step=3,
      epoch=1,
      model={k: v * 0 for k, v in s.items()},
      ema=s,
      optimizer=dict(state={0: dict(exp_avg=torch.ones(2))}, lr=1e-4),
    ),
    lambda s: (
      {f'decoder.{k}': v for k, v in s.items()}
      | {'encoder.blocks.0.w': torch.ones(2), 'quantizer.basis': torch.ones(3)}
    ),
  ],
  ids=['prefix', 'two prefixes', 'training file', 'whole model'],
)
def test_dresses_of_one_file(tmp_path, state, wrap):
  want = rae.load_rae_decoder(saved(tmp_path, state), SPEC, LATENT)
  have = rae.load_rae_decoder(
    saved(tmp_path, wrap(state), 'b.pt'), SPEC, LATENT
  )
  for name, leaf in want.items():
    assert leaf.tobytes() == have[name].tobytes(), name


def test_misfits_name_both_sides(tmp_path, state):
  path = saved(tmp_path, state)
  for spec, latent, words in (
    (SPEC, 32, ('decoder_embed.weight', '(32, 24)', '(32, 32)')),
    (vit(depth=3), LATENT, ('decoder_layers.2.', 'depth=2')),
    (vit(depth=1), LATENT, ('decoder_layers.1.',)),
    (vit(grid=(6, 6)), LATENT, ('(1, 17, 32)', '(1, 37, 32)')),
    (vit(patch_size=8), LATENT, ('decoder_pred.weight', '(192, 32)')),
  ):
    message = error(path, spec, latent)
    assert all(word in message for word in words), message


def test_what_shapes_cannot_say_is_held_to_the_published(tmp_path, state):
  path = saved(tmp_path, state)
  assert 'act' in error(path, vit(act='gelu_tanh'))
  assert 'norm_eps' in error(path, vit(norm_eps=1e-6))
  big = dict(width=768, depth=12, mlp_dim=3072, num_heads=16)
  assert 'num_heads' in error(path, vit(**big))


def test_foreign_positions_are_named_or_carried(tmp_path, state):
  foreign = dict(state)
  foreign['decoder_pos_embed'] = state['decoder_pos_embed'] * 1.5 + 0.25
  path = saved(tmp_path, foreign)
  message = error(path)
  assert re.search(r'differs by up to 0\.75', message)
  assert 'posemb="learned"' in message
  assert 'prefix_has_posemb' in error(path, vit(posemb='learned'))
  spec = vit(posemb='learned', prefix_has_posemb=True)
  leaves = rae.load_rae_decoder(path, spec, LATENT)
  z = latents()
  want = torch_rae.decode(
    foreign, z.reshape(2, 16, LATENT), 4, IMAGENET_NORM.mean, IMAGENET_NORM.std
  )
  have = decode(spec, leaves, z)
  assert np.linalg.norm(have - want) < 1e-5 * np.linalg.norm(want)
  back = rae.export_rae_decoder(leaves, spec)
  for key, value in foreign.items():
    assert back[key].tobytes() == value.numpy().tobytes(), key


def test_what_was_taken_and_what_was_left_is_said(tmp_path, state):
  dress = dict(
    ema={f'decoder.{k}': v for k, v in state.items()}
    | {'encoder.w': torch.ones(2)},
    step=3,
  )
  fitted = rae.fit_rae_decoder(saved(tmp_path, dress), SPEC, LATENT)
  assert fitted.source.note == 'took "ema", left step'
  assert set(fitted.ignored) == {'encoder.w', 'decoder.decoder_pos_embed'}


def test_nan_is_named(tmp_path, state):
  bad = dict(state)
  key = 'decoder_layers.1.output.dense.weight'
  bad[key] = state[key].clone()
  bad[key][3, 4] = float('nan')
  message = error(saved(tmp_path, bad))
  assert key in message and '1 values' in message
