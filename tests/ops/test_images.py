"""Resizing against torch and PIL, positions of other grids.

The published processors are compared on whole real images after the pixel norm,
whose std is divided out again. Two of them also crop the middle of what they
resized by the shorter side: ours resizes to that size and is cropped alike.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import PIL
import pytest
from PIL import Image

from tests.golden import make_encoder_params as golden
from vqrae_jax.data import sources
from vqrae_jax.errors import UserError
from vqrae_jax.ops import images, posemb

SIZES = ((16, 16), (9, 23), (37, 30))


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


def test_patches_are_row_column_channel_and_invert():
  x = jnp.arange(2.0 * 8 * 12 * 3).reshape(2, 8, 12, 3)
  patches = images.patchify(x, 4)
  assert patches.shape == (2, 2, 3, 48)
  np.testing.assert_array_equal(
    patches[1, 1, 2], np.asarray(x[1, 4:8, 8:12]).reshape(-1)
  )
  np.testing.assert_array_equal(images.unpatchify(patches, 4), x)


def test_unknown_method_says_what_is_right():
  with pytest.raises(UserError, match='did you mean "bicubic"'):
    images.resize(jnp.zeros((1, 4, 4, 3)), (8, 8), 'cubic')


def test_sincos_of_another_grid_spans_the_same_extent():
  wide = posemb.sincos2d(16, (4, 8), (4, 4)).reshape(4, 8, 16)
  native = posemb.sincos2d(16, (4, 4), (4, 4)).reshape(4, 4, 16)
  np.testing.assert_allclose(wide[:, 0, 8:], native[:, 0, 8:], atol=1e-6)
  # Columns 0 and 1 lie at -1/4 and 1/4 of the native grid's coordinates.
  np.testing.assert_allclose(wide[0, 0, 0], np.sin(-0.25), atol=1e-6)


# -- as PIL resizes 8-bit images ----------------------------------------------
OLDER = int(PIL.__version__.split('.')[0]) < 13  # never rows first
BILINEAR, BICUBIC = 2, 3  # PIL's numbers, as `preprocessor_config.json` has
HALF = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
IMAGENET = dict(
  image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
)


def _square(side, resample, norm):
  return dict(size=dict(height=side, width=side), resample=resample, **norm)


def _middle(shorter, crop, norm):
  return dict(
    size=dict(shortest_edge=shorter),
    crop_size=dict(height=crop, width=crop),
    resample=BICUBIC,
    do_center_crop=True,
    **norm,
  )


# Encoder: the published processor's class and fields.
PROCESSORS = {
  'siglip-base-patch16-224': ('Siglip', _square(224, BICUBIC, HALF)),
  'siglip2-so400m-patch16-256': ('Siglip', _square(256, BILINEAR, HALF)),
  'dinov2-with-registers-base': ('Bit', _middle(256, 224, IMAGENET)),
  'vit-mae-base': ('ViT', _square(224, BILINEAR, IMAGENET)),
  'internvit-300m-448px': ('CLIP', _middle(448, 448, IMAGENET)),
}


@pytest.fixture(scope='module')
def real_images(shared_data):
  """Of Kodak and ImageNet, two of them of any size: a size is a compilation."""
  names = 'kodak', 'imagenet_sample'
  kodak, sample = (sources.open_source(str(shared_data / n)) for n in names)
  every = [sample[i] for i in range(0, len(sample), 3)]
  usual = [x for x in every if x.shape in ((288, 384, 3), (384, 288, 3))]
  other = [x for x in every if x.shape[0] not in (288, 384)]
  found = [*map(kodak.__getitem__, range(0, 24, 4)), *usual[:8], *other[:2]]
  assert len(found) == 16
  return found


@functools.cache
def _ours(spec, size):
  """uint8 -> pixels that the encoder's patches are cut from."""

  def apply(image):
    x = images.resize_exact(images.to_unit(image), size, spec.resize)
    norm = spec.pixel_norm
    return images.normalize(x, norm.mean, norm.std)

  return jax.jit(apply)


def _resized(shape, size):
  """The processor's size before it cuts: (h, w)."""
  if 'height' in size:
    return size['height'], size['width']
  short, long = sorted(shape[:2])
  longer = int(size['shortest_edge'] * long / short)
  pair = (size['shortest_edge'], longer)
  return pair if shape[0] <= shape[1] else pair[::-1]


def _cut(x, crop):
  top, left = ((n - c) // 2 for n, c in zip(x.shape, crop, strict=False))
  return x[top : top + crop[0], left : left + crop[1]]


@pytest.mark.parametrize('name', PROCESSORS)
def test_pixels_are_those_of_the_published_processor(name, real_images):
  transformers = pytest.importorskip('transformers')
  kind, fields = PROCESSORS[name]
  spec = golden.spec_of(name)
  processor = getattr(transformers, f'{kind}ImageProcessorPil')(**fields)
  crop = tuple(fields.get('crop_size', fields['size']).values())
  std = np.array(fields['image_std'])
  for image in real_images:
    out = processor(images=Image.fromarray(image), return_tensors='np')
    want = out['pixel_values'][0].transpose(1, 2, 0)
    size = _resized(image.shape, fields['size'])
    found = _cut(np.asarray(_ours(spec, size)(image)), crop)
    assert found.shape == want.shape
    off = np.abs(found - want) * std
    assert off.max() <= 1 / 255 and off.mean() <= 1e-3


def _noise(h, w):
  """Black and white pixels: every kernel overshoots, every sum is rounded."""
  draw = np.random.default_rng(0).integers(0, 2, (h, w, 3))
  return (draw * 255).astype(np.uint8)


# Both sides shrink, grow or stay, by little or much, and in either order.
EVERY = (
  (7, 7), (7, 24), (24, 7), (7, 60), (60, 7), (24, 40), (40, 24), (24, 60),
  (60, 24), (40, 90), (90, 40), (90, 90),
)  # fmt: skip


@pytest.mark.parametrize('method', ('bicubic', 'bilinear'))
def test_every_bit_is_pils(method):
  code = dict(bicubic=Image.BICUBIC, bilinear=Image.BILINEAR)[method]
  ours = jax.jit(images.resize_exact, static_argnums=(1, 2))
  compared = 0
  for h, w in ((40, 40), (24, 60), (60, 24)):
    image = _noise(h, w)
    pil = Image.fromarray(image)
    for size in EVERY:
      if OLDER and images._rows_first(h, w, size):
        continue  # other rounding: one pass before the other
      want = np.asarray(pil.resize(size[::-1], code))
      found = ours(image / np.float32(255), size, method)
      np.testing.assert_array_equal(np.round(found * 255), want, str(size))
      compared += 1
  assert compared >= 20


def test_a_float_image_is_rounded_to_what_it_was_read_from():
  image = _noise(9, 9)
  size = (16, 12)
  found = images.resize_exact(images.to_unit(image), size, 'bicubic')
  moved = images.to_unit(image) + np.float32(1e-3)
  np.testing.assert_array_equal(
    images.resize_exact(moved, size, 'bicubic'), found
  )
  # At its own size an image stays as it is.
  np.testing.assert_array_equal(
    images.resize_exact(moved, (9, 9), 'bicubic'), moved
  )


def test_gradients_are_those_without_rounding():
  image = jax.random.uniform(jax.random.key(0), (2, 9, 9, 3))

  def total(resize):
    return jax.grad(lambda x: (resize(x, (14, 12), 'bicubic') ** 2).sum())

  one = total(lambda *a: images.resize_exact(*a))(image)
  other = total(images.resize)(image)
  # The values that are squared differ by rounding and clipping.
  assert np.abs(one - other).max() < 0.5
  direction = jax.random.normal(jax.random.key(1), image.shape)
  _, tangent = jax.jvp(
    lambda x: images.resize_exact(x, (14, 12), 'bicubic'),
    (image,),
    (direction,),
  )
  want = images.resize(direction, (14, 12), 'bicubic')
  np.testing.assert_array_equal(tangent, want)
