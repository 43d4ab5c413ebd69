"""Published sizes against transformers, weights random: minutes each.

f32 under the highest matmul precision to 1e-5; bf16 to 2e-2 and no worse than
1.25 times what torch's own bf16 loses. Images are of the native size, of twice
it (f32 alone: bf16 is slow on CPUs), and of ratio 2:1.
Weights pass through a file, as published ones do. `-s` prints the figures.

Largest figures on two CPU cores (2026-11-21, torch 2.13, jax 0.10.2):

                               f32       bf16      torch's bf16
  siglip-large-patch16-256     9.1e-07   1.03e-02  1.03e-02
  siglip2-so400m-patch14-384   9.5e-07   1.09e-02  1.10e-02
  dinov2-with-registers-base   7.5e-07   8.67e-03  8.73e-03
  dinov2-giant                 1.4e-06   1.53e-02  1.53e-02
  vit-mae-base                 8.0e-07   8.50e-03  8.51e-03
  internvit-300m-448px         9.3e-07   1.11e-02  1.10e-02
  internvit-6b, two layers     5.0e-07   5.38e-03  5.15e-03

And on 2026-11-26, but for the first the f32 figures alone (torch 2.13, jax
0.10.2, transformers 5.23):

  dinov3-vits16                6.2e-07   8.52e-03  8.60e-03
  clip-vit-base-patch16        8.3e-07
  two blocks of dinov3-vits16plus 4.4e-07, -vitb16 4.4e-07, -vitl16 4.8e-07,
  -vith16plus 5.8e-07, -vit7b16 6.5e-07, of clip-vit-h-14-laion2b 7.9e-07
"""

import ctypes
import dataclasses
import gc

import jax
import numpy as np
import pytest

import vqrae_jax
from tests import tiny
from tests.encoders import references
from tests.golden import make_encoder_params as golden

torch = pytest.importorskip('torch')

pytestmark = pytest.mark.slow


# row: (kind, a shape of ratio 2:1)
CASES = {
  'siglip-large-patch16-256': ('siglip', (192, 384)),
  'siglip2-so400m-patch14-384': ('siglip', (224, 448)),
  'dinov2-with-registers-base': ('dinov2-registers', (224, 448)),
  'dinov2-giant': ('dinov2-swiglu', (224, 448)),
  'vit-mae-base': ('mae', (160, 320)),
  'internvit-300m-448px': ('internvit-300m', (224, 448)),
  'internvit-6b-448px-v2_5': ('internvit-6b', (224, 448)),
  'dinov3-vits16-pretrain-lvd1689m': ('dinov3', (160, 320)),
  'dinov3-vits16plus-pretrain-lvd1689m': ('dinov3-gated', (160, 320)),
  'dinov3-vitb16-pretrain-lvd1689m': ('dinov3', (160, 320)),
  'dinov3-vitl16-pretrain-lvd1689m': ('dinov3', (160, 320)),
  'dinov3-vith16plus-pretrain-lvd1689m': ('dinov3-gated', (160, 320)),
  'dinov3-vit7b16-pretrain-lvd1689m': ('dinov3-7b', (160, 320)),
  'clip-vit-base-patch16': ('clip', (160, 320)),
  'clip-vit-h-14-laion2b-s32b-b79k': ('clip-laion', (140, 280)),
}
# Two of their blocks, at full width; `test_sources.py` has all their shapes.
TWO_BLOCKS = (
  'internvit-6b-448px-v2_5',
  *[n for n in CASES if 'dinov3' in n and 'vits16-' not in n],
  'clip-vit-h-14-laion2b-s32b-b79k',
)


def free():
  """Frees what programs and tests before hold, and has the C library give it
  back: the largest encoder needs most of a machine of 24 GB."""
  jax.clear_caches()
  gc.collect()
  if hasattr(ctypes.CDLL(None), 'malloc_trim'):
    ctypes.CDLL(None).malloc_trim(0)


def _jit(encoder):
  # Unlike the suite's tiny programs, these are worth optimizing.
  return jax.jit(encoder.apply, compiler_options=tiny.AS_USERS)


@pytest.mark.parametrize('name', CASES)
def test_parity(name, tmp_path):
  free()
  kind, wide = CASES[name]
  sizes = references.sizes_of(golden.spec_of(name).vit)
  if name in TWO_BLOCKS:
    sizes['depth'] = 2
  sizes['pixels'] += 6 * name.endswith('patch14-384')  # of no patch
  pixels, patch = sizes['pixels'], sizes['patch']
  native = (pixels, pixels)
  model = references.make(kind, **sizes)
  model.save_pretrained(tmp_path)
  shapes = native, (2 * pixels, 2 * pixels), wide
  rng = np.random.default_rng(0)
  images = {s: rng.random((1, *s, 3), np.float32) for s in shapes}
  want, theirs = {}, {}
  for shape, x in images.items():
    want[shape] = references.latents(kind, model, x, patch)
  for shape in (native, wide):
    half = references.latents(
      kind, model, images[shape], patch, dtype=torch.bfloat16
    )
    theirs[shape] = references.error(half, want[shape])
  # One framework at a time: 16 GB for the largest encoder, 21 with both.
  del model
  free()
  row = None if name in TWO_BLOCKS or 'internvit' in name else name
  encoder, variables = vqrae_jax.load_encoder(str(tmp_path), row=row)
  for shape, x in images.items():
    with jax.default_matmul_precision('highest'):
      error = references.error(_jit(encoder)(variables, x), want[shape])
    print(f'\n{name} {shape} f32 {error:.2e}', flush=True)
    assert error <= 1e-5
  vit = dataclasses.replace(encoder.spec.vit, dtype='bfloat16')
  encoder = encoder.clone(spec=dataclasses.replace(encoder.spec, vit=vit))
  for shape, reference in theirs.items():
    ours = _jit(encoder)(variables, images[shape])
    ours = references.error(ours, want[shape])
    print(f'{name} {shape} bf16 {ours:.2e}, torch {reference:.2e}', flush=True)
    assert ours <= 2e-2
    assert ours <= 1.25 * reference
