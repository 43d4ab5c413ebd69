"""Pixels against the PIL processors of transformers, on real photographs.

What is compared is a whole photograph resized to the processor's size, as the
size rule resizes it, after the pixel norm, whose std is divided out again. Two
processors also cut the middle out of what they resized: they resize by the
shorter side, so ours resizes to that size and is cut alike.
"""

import functools
import itertools
import pathlib

import jax
import numpy as np
import PIL
import pytest
from PIL import Image

from tests.golden import make_encoder_params as golden
from vqrae_jax.ops import images
from vqrae_jax.ops import images as pixels

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
  'siglip-large-patch16-384': ('Siglip', _square(384, BICUBIC, HALF)),
  'siglip2-so400m-patch16-256': ('Siglip', _square(256, BILINEAR, HALF)),
  'dinov2-with-registers-base': ('Bit', _middle(256, 224, IMAGENET)),
  'vit-mae-base': ('ViT', _square(224, BILINEAR, IMAGENET)),
  'internvit-300m-448px': ('CLIP', _middle(448, 448, IMAGENET)),
}


@pytest.fixture(scope='module')
def photographs(shared_data):
  """All of Kodak and forty of ImageNet, six of them of any size.

  A size is a compilation: the others have the two commonest.
  """
  kodak = sorted((shared_data / 'kodak').glob('*.png'))
  sample = sorted((shared_data / 'imagenet_sample').glob('*.jpg'))
  every = [_read(path) for path in sample[::3]]
  usual = [x for x in every if x.shape in ((288, 384, 3), (384, 288, 3))]
  other = [x for x in every if x.shape[0] not in (288, 384)]
  found = [_read(path) for path in kodak] + usual[:34] + other[:6]
  assert len(found) == 64
  return found


def _read(path: pathlib.Path) -> np.ndarray:
  with Image.open(path) as image:
    return np.asarray(image.convert('RGB'))


@functools.cache
def _ours(spec, size):
  """uint8 -> pixels that the encoder's patches are cut from."""

  def apply(image):
    x = pixels.resize_exact(images.to_unit(image), size, spec.resize)
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
def test_pixels_are_those_of_the_published_processor(name, photographs):
  transformers = pytest.importorskip('transformers')
  kind, fields = PROCESSORS[name]
  spec = golden.encoder(name).spec
  processor = getattr(transformers, f'{kind}ImageProcessorPil')(**fields)
  crop = tuple(fields.get('crop_size', fields['size']).values())
  std = np.array(fields['image_std'])
  worst, total = 0.0, []
  for image in photographs:
    out = processor(images=Image.fromarray(image), return_tensors='np')
    want = out['pixel_values'][0].transpose(1, 2, 0)
    size = _resized(image.shape, fields['size'])
    found = _cut(np.asarray(_ours(spec, size)(image)), crop)
    assert found.shape == want.shape
    off = np.abs(found - want) * std
    worst = max(worst, off.max())
    total.append(off.mean())
  print(
    f'\n{name}: max {worst:.2e}, mean {np.mean(total):.2e} over '
    f'{len(photographs)} photographs'
  )
  assert worst <= 1 / 255
  assert max(total) <= 1e-3


def _noise(h, w):
  """Black and white pixels: every kernel overshoots, every sum is rounded."""
  draw = np.random.default_rng(0).integers(0, 2, (h, w, 3))
  return (draw * 255).astype(np.uint8)


@pytest.mark.parametrize('method', ('bicubic', 'bilinear'))
def test_every_bit_is_pils(method):
  code = dict(bicubic=Image.BICUBIC, bilinear=Image.BILINEAR)[method]
  compared = 0
  for h, w in ((40, 40), (24, 60), (60, 24)):
    image = _noise(h, w)
    pil = Image.fromarray(image)
    for size in itertools.product((7, 24, 40, 60, 90), repeat=2):
      if OLDER and pixels._rows_first(h, w, size):
        continue  # other rounding: one pass before the other
      want = np.asarray(pil.resize(size[::-1], code))
      found = pixels.resize_exact(images.to_unit(image), size, method)
      np.testing.assert_array_equal(np.round(found * 255), want, str(size))
      compared += 1
  assert compared >= 45


def test_a_float_image_is_rounded_to_what_it_was_read_from():
  image = _noise(9, 9)
  size = (16, 12)
  found = pixels.resize_exact(images.to_unit(image), size, 'bicubic')
  moved = images.to_unit(image) + np.float32(1e-3)
  np.testing.assert_array_equal(
    pixels.resize_exact(moved, size, 'bicubic'), found
  )
  # At its own size an image stays as it is.
  np.testing.assert_array_equal(
    pixels.resize_exact(moved, (9, 9), 'bicubic'), moved
  )


def test_gradients_are_those_without_rounding():
  image = jax.random.uniform(jax.random.key(0), (2, 9, 9, 3))

  def total(resize):
    return jax.grad(lambda x: (resize(x, (14, 12), 'bicubic') ** 2).sum())

  one = total(lambda *a: pixels.resize_exact(*a))(image)
  other = total(images.resize)(image)
  # The values that are squared differ by rounding and clipping.
  assert np.abs(one - other).max() < 0.5
  direction = jax.random.normal(jax.random.key(1), image.shape)
  _, tangent = jax.jvp(
    lambda x: pixels.resize_exact(x, (14, 12), 'bicubic'),
    (image,),
    (direction,),
  )
  want = images.resize(direction, (14, 12), 'bicubic')
  np.testing.assert_array_equal(tangent, want)
