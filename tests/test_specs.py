"""Specs from config sections: hashable, and clear about what is wrong."""

import pytest

from tests import tiny
from vqrae_jax.errors import UserError
from vqrae_jax.specs import (
  EncoderSpec,
  PixelNorm,
  ViTSpec,
  build_spec,
  merge_sections,
)


def test_nested_sections_and_lists_become_hashable_specs():
  section = dict(
    vit=tiny.VIT | dict(grid=[4, 6]),
    pixel_norm=dict(mean=[0, 0, 0], std=[1, 1, 1]),
  )
  spec = build_spec(EncoderSpec, section, 'encoder')
  assert spec.vit.grid == (4, 6) and spec.pixel_norm.std == (1, 1, 1)
  assert hash(spec) == hash(build_spec(EncoderSpec, section, 'encoder'))


@pytest.mark.parametrize(
  'change, words',
  [
    (dict(widht=3), 'unknown key "vit.widht"; did you mean "width"'),
    (dict(width='32'), "vit.width='32' must be of type int"),
    (dict(width=True), 'must be of type int'),
    (dict(width=-4), 'vit.width=-4 must be above 0'),
    (dict(num_heads=5), 'width=32 must be a multiple of vit.num_heads=5'),
    (dict(act='relu'), 'vit.act=.*gelu'),
    (dict(norm='batch'), 'vit.norm'),
    (dict(posemb='sincos2'), 'did you mean "sincos2d"'),
    (dict(dtype='float8'), 'vit.dtype'),
    (dict(grid=(4,)), 'rows, columns'),
    (dict(grid=(4.0, 4)), 'rows, columns'),
    (dict(num_prefix_tokens=-1), 'must not be negative'),
    (dict(num_registers=1), r'num_registers=1 must lie in \[0, 0\]'),
    (dict(dtype='float16'), 'vit.dtype'),
    (dict(width=6, num_heads=1, posemb='sincos2d'), 'multiple of 4'),
    (dict(qkv_bias=1), 'must be of type bool'),
  ],
)
def test_a_wrong_key_says_what_is_right(change, words):
  with pytest.raises(UserError, match=words):
    build_spec(ViTSpec, tiny.VIT | change, 'vit')


def test_a_missing_key_is_named():
  section = {k: v for k, v in tiny.VIT.items() if k != 'depth'}
  with pytest.raises(UserError, match='missing key "vit.depth"'):
    build_spec(ViTSpec, section, 'vit')


def test_pixel_norm_needs_positive_std():
  with pytest.raises(UserError, match='3 stds above 0'):
    PixelNorm((0, 0, 0), (1, 0, 1))


def test_sections_merge_deeply():
  base = dict(a=dict(b=1, c=2), d=3)
  assert merge_sections(base, dict(a=dict(c=4))) == dict(a=dict(b=1, c=4), d=3)
  assert base['a']['c'] == 2
