"""Resizing against torch and PIL, positions of other grids.

The published processors are compared on whole real images after the pixel norm,
whose std is divided out again. Two of them also crop the middle of what they
resized by the shorter side; that is left out.
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
HALF = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
IMAGENET = dict(
  image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
)
# Encoder: the published processor's class and fields.
PROCESSORS = {
  'siglip-base-patch16-224': ('Siglip', 224, Image.BICUBIC, HALF),
  'siglip2-so400m-patch16-256': ('Siglip', 256, Image.BILINEAR, HALF),
  'dinov2-with-registers-base': ('Bit', 256, Image.BICUBIC, IMAGENET),
  'vit-mae-base': ('ViT', 224, Image.BILINEAR, IMAGENET),
  'internvit-300m-448px': ('CLIP', 448, Image.BICUBIC, IMAGENET),
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


@pytest.mark.parametrize('name', PROCESSORS)
def test_pixels_are_those_of_the_published_processor(name, real_images):
  transformers = pytest.importorskip('transformers')
  kind, side, resample, norm = PROCESSORS[name]
  spec = golden.spec_of(name)
  size = dict(height=side, width=side)
  if kind in ('Bit', 'CLIP'):
    size = dict(shortest_edge=side)
  processor = getattr(transformers, f'{kind}ImageProcessorPil')(
    size=size, resample=resample, do_center_crop=False, **norm
  )

  @functools.partial(jax.jit, static_argnums=1)
  def ours(image, size):
    x = images.resize_exact(images.to_unit(image), size, spec.resize)
    return images.normalize(x, spec.pixel_norm.mean, spec.pixel_norm.std)

  for image in real_images:
    out = processor(images=Image.fromarray(image), return_tensors='np')
    want = out['pixel_values'][0].transpose(1, 2, 0)
    off = np.abs(ours(image, want.shape[:2]) - want) * norm['image_std']
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
  """At its own size an image stays as it is."""
  read = images.to_unit(_noise(9, 9))
  moved = read + np.float32(1e-3)
  for size, want in (
    ((16, 12), images.resize_exact(read, (16, 12), 'bicubic')),
    ((9, 9), moved),
  ):
    found = images.resize_exact(moved, size, 'bicubic')
    np.testing.assert_array_equal(found, want)


def test_gradients_are_those_without_rounding():
  image = jax.random.uniform(jax.random.key(0), (2, 9, 9, 3))
  cotangent = jax.random.normal(jax.random.key(1), (2, 14, 12, 3))

  def pulled(resize):
    _, pull = jax.vjp(lambda x: resize(x, (14, 12), 'bicubic'), image)
    return pull(cotangent)[0]

  np.testing.assert_array_equal(
    pulled(images.resize_exact), pulled(images.resize)
  )
