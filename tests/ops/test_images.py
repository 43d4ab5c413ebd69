"""Resizing against torch and PIL, positions against MAE's formula."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vqrae_jax.errors import UserError
from vqrae_jax.ops import images, posemb

SIZES = ((16, 16), (9, 23), (37, 30), (24, 48))


@pytest.mark.parametrize('antialias', (False, True))
@pytest.mark.parametrize('method', ('bicubic', 'bilinear'))
def test_resize_is_torchs(method, antialias):
  torch = pytest.importorskip('torch')
  x = np.random.default_rng(0).random((2, 24, 18, 3), np.float32)
  for size in SIZES:
    want = torch.nn.functional.interpolate(
      torch.from_numpy(x.transpose(0, 3, 1, 2)),
      size,
      mode=method,
      antialias=antialias,
      align_corners=False,
    ).numpy()
    found = images.resize(jnp.array(x), size, method, antialias)
    # torch takes its sampling positions in f32: up to 3e-6 off.
    np.testing.assert_allclose(found, want.transpose(0, 2, 3, 1), atol=1e-5)


def test_resize_is_pils():
  x = np.random.default_rng(0).random((40, 30), np.float32)
  for size in SIZES:
    want = np.asarray(Image.fromarray(x).resize(size[::-1], Image.BICUBIC))
    found = images.resize(jnp.array(x)[..., None], size)[..., 0]
    np.testing.assert_allclose(found, want, atol=2e-6)


def test_equal_size_is_the_identity():
  x = jnp.asarray(np.random.default_rng(0).random((1, 8, 8, 3)), jnp.float32)
  np.testing.assert_array_equal(images.resize(x, (8, 8)), x)


def test_patches_are_row_column_channel_and_invert():
  x = jnp.arange(2.0 * 8 * 12 * 3).reshape(2, 8, 12, 3)
  patches = images.patchify(x, 4)
  assert patches.shape == (2, 2, 3, 48)
  np.testing.assert_array_equal(
    patches[1, 1, 2], np.asarray(x[1, 4:8, 8:12]).reshape(-1)
  )
  np.testing.assert_array_equal(images.unpatchify(patches, 4), x)


def test_pixel_norm_inverts():
  x = jnp.asarray(np.random.default_rng(0).random((1, 4, 4, 3)), jnp.float32)
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  y = images.denormalize(images.normalize(x, mean, std), mean, std)
  np.testing.assert_allclose(y, x, atol=1e-6)


def test_unknown_method_says_what_is_right():
  with pytest.raises(UserError, match='did you mean "bicubic"'):
    images.resize(jnp.zeros((1, 4, 4, 3)), (8, 8), 'cubic')


def mae_sincos(width, side):
  """MAE's table, from its formula: columns first, [sin | cos] each."""
  omega = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
  table = np.zeros((side, side, width))
  for i in range(side):
    for j in range(side):
      table[i, j] = np.concatenate(
        [np.sin(j * omega), np.cos(j * omega),
         np.sin(i * omega), np.cos(i * omega)]
      )  # fmt: skip
  return table.reshape(side * side, width)


def test_sincos_is_maes_at_the_native_grid():
  found = posemb.sincos2d(32, (5, 5), (5, 5))
  np.testing.assert_allclose(found, mae_sincos(32, 5), atol=1e-6)


def test_sincos_of_another_grid_spans_the_same_extent():
  wide = posemb.sincos2d(16, (4, 8), (4, 4)).reshape(4, 8, 16)
  native = posemb.sincos2d(16, (4, 4), (4, 4)).reshape(4, 4, 16)
  np.testing.assert_allclose(wide[:, 0, 8:], native[:, 0, 8:], atol=1e-6)
  # Columns 0 and 1 lie at -1/4 and 1/4 of the native grid's coordinates.
  np.testing.assert_allclose(wide[0, 0, 0], np.sin(-0.25), atol=1e-6)


def test_learned_table_resamples_as_torch_does():
  torch = pytest.importorskip('torch')
  table = np.random.default_rng(0).normal(size=(6, 6, 8)).astype(np.float32)
  want = torch.nn.functional.interpolate(
    torch.from_numpy(table.transpose(2, 0, 1)[None]),
    (4, 9),
    mode='bicubic',
    align_corners=False,
  ).numpy()[0]
  found = posemb.resample(jnp.array(table), (4, 9), 'bicubic', False)
  np.testing.assert_allclose(
    found, want.transpose(1, 2, 0).reshape(36, 8), atol=5e-6
  )
