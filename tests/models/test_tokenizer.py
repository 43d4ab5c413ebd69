"""The size rule, index shapes, configs in and out."""

import json

import jax
import ml_collections
import numpy as np
import pytest

import vqrae_jax
from tests import tiny
from vqrae_jax.models.tokenizer import (
  build_tokenizer,
  describe,
  variable_shapes,
)

UNEVEN = dict(
  encoder=dict(vit=tiny.VIT | dict(patch_size=6)),
  quantizer=tiny.quantizer('vq-ema'),
  decoder=dict(vit=tiny.VIT | tiny.DECODER | dict(patch_size=8)),
)


@pytest.mark.parametrize('h, w', ((16, 40), (48, 8)))
def test_size_rule_with_unlike_patches(h, w):
  """Decoder patch 8, encoder patch 6: the grid is h/8 x w/8."""
  tokenizer, variables = tiny.built(UNEVEN)

  @jax.jit
  def run(variables, images):
    args = tokenizer, variables, images
    indices = vqrae_jax.encode_to_indices(*args)
    return indices, vqrae_jax.reconstruct(*args), vqrae_jax.encode(*args)

  images = tiny.images(2, h, w)
  indices, out, latents = run(variables, images)
  assert tokenizer.index_shape(h, w) == (h // 8, w // 8) == indices.shape[1:]
  assert out.images.shape == images.shape
  assert out.latents.shape == (2, h // 8, w // 8, 32)
  assert out.features.shape == (2, 1 + h * w // 64, 32)
  np.testing.assert_allclose(latents, out.latents, atol=1e-5)


def test_the_native_size_is_one_that_the_quantizer_takes():
  """Also where the decoder's positions are of another grid."""
  model = tiny.model('multiscale')
  model['quantizer'] = model['quantizer'] | dict(scales=(1, 2))
  tokenizer = build_tokenizer(model)
  assert tokenizer.decoder_spec.vit.grid == (4, 4)
  assert tokenizer.index_shape(*tokenizer.native_size) == (5,)


def test_rope2d_on_both_sides_takes_any_grid():
  """No leaf is of positions, yet moving an image's patches moves more than
  their latents."""
  config = tiny.model('none', dtype='bfloat16', remat=True)
  for part in ('encoder', 'decoder'):
    config[part]['vit'] |= dict(posemb='rope2d')
  tokenizer, variables = tiny.built(config)
  assert build_tokenizer(describe(tokenizer)) == tokenizer.with_run_options(
    dtype='float32', remat=False
  )
  assert not [n for n in variable_shapes(tokenizer) if 'positions' in n]

  @jax.jit
  def run(variables, images):
    out = vqrae_jax.reconstruct(tokenizer, variables, images)
    return out.images, out.latents.astype('float32')

  for h, w in ((16, 16), (8, 24)):
    images = tiny.images(2, h, w)
    out, latents = run(variables, images)
    assert out.shape == images.shape and np.isfinite(out).all()
    _, moved = run(variables, np.roll(images, 4, axis=2))
    back = np.roll(moved, -1, axis=2)
    assert np.abs(back - latents).max() > 0.05 * np.abs(latents).max()


@pytest.mark.parametrize('kind', [*tiny.FORMS, 'none'])
def test_describe_inverts_build(kind):
  config = tiny.model(kind, post_quant=dict(kernel=3, space='latent'))
  tokenizer = build_tokenizer(ml_collections.ConfigDict(config))
  again = build_tokenizer(json.loads(json.dumps(describe(tokenizer))))
  assert again == tokenizer and hash(again) == hash(tokenizer)


def test_run_options_are_no_part_of_what_a_tokenizer_is():
  plain = build_tokenizer(tiny.model())
  fast = build_tokenizer(tiny.model(dtype='bfloat16', remat=True, scan=False))
  assert describe(plain) == describe(fast)
  assert fast.with_run_options(dtype='float32', remat=False, scan=True) == plain


def test_named_rows_and_overrides():
  config = dict(
    encoder=dict(name='siglip-large-patch16-384', output_norm='plain'),
    quantizer=dict(name='simvq'),
    decoder=dict(name='symmetric', vit=dict(depth=3)),
  )
  tokenizer = build_tokenizer(config)
  encoder, decoder = tokenizer.encoder_spec, tokenizer.decoder_spec
  assert encoder.vit.grid == (24, 24) and encoder.output_norm == 'plain'
  assert (decoder.vit.width, decoder.vit.depth) == (1024, 3)
  assert decoder.pixel_norm == encoder.pixel_norm
  assert decoder.vit.posemb == 'sincos2d'


DECODER_SIZES = {'B': 86.4, 'L': 304.2, 'XL': 415.4}  # M, published


@pytest.mark.parametrize('name', DECODER_SIZES)
def test_decoder_sizes_are_the_published(name):
  """At 768 latent channels; the published count holds the fixed positions."""
  config = dict(
    encoder=dict(vit=tiny.VIT | dict(width=768, patch_size=16)),
    quantizer=dict(name='none'),
    decoder=dict(name=name),
  )
  tokenizer = build_tokenizer(config)
  leaves = variable_shapes(tokenizer).items()
  total = 257 * tokenizer.decoder_spec.vit.width
  total += sum(x.size for n, x in leaves if n.startswith('params/decoder/'))
  assert round(total / 1e6, 1) == DECODER_SIZES[name]
