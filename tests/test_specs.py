"""Specs from config sections: hashable, and clear about what is wrong."""

import dataclasses
import math

import pytest

from tests import tiny
from tests.weights.files import error_of
from vqrae_jax import specs
from vqrae_jax.specs import EncoderSpec, ViTSpec, build_spec


def test_nested_sections_and_lists_become_hashable_specs():
  section = dict(
    vit=tiny.VIT | dict(grid=[4, 6]),
    pixel_norm=dict(mean=[0, 0, 0], std=[1, 1, 1]),
  )
  spec = build_spec(EncoderSpec, section, 'encoder')
  assert spec.vit.grid == (4, 6) and spec.pixel_norm.std == (1, 1, 1)
  assert hash(spec) == hash(build_spec(EncoderSpec, section, 'encoder'))


@pytest.mark.parametrize(
  'change, key',
  [
    (dict(widht=3), '"width"'),
    (dict(width='32'), "vit.width='32'"),
    (dict(width=True), 'vit.width=True'),
    (dict(width=-4), 'vit.width=-4'),
    (dict(num_heads=5), 'vit.num_heads=5'),
    (dict(act='relu'), "vit.act='relu'"),
    (dict(norm='batch'), 'vit.norm'),
    (dict(norm_eps=math.nan), 'vit.norm_eps=nan'),
    (dict(norm_eps=0.0), 'vit.norm_eps=0'),
    (dict(layer_scale=10**400), 'vit.layer_scale='),
    (dict(posemb='sincos2'), '"sincos2d"'),
    (dict(grid=(4,)), 'vit.grid'),
    (dict(grid=(4.0, 4)), 'vit.grid'),
    (dict(grid=(0, 4)), 'vit.grid'),
    (dict(num_prefix_tokens=-1), 'num_prefix_tokens=-1'),
    (dict(num_registers=1), 'vit.num_registers=1'),
    (dict(width=6, num_heads=1, posemb='sincos2d'), 'vit.width=6'),
    (dict(width=24, num_heads=4, posemb='rope2d'), 'vit.width=24'),
    (dict(qkv_bias=1), 'vit.qkv_bias=1'),
    (dict(qkv_bias='qk'), "vit.qkv_bias='qk'"),
  ],
)
def test_a_wrong_value_is_named(change, key):
  assert key in error_of(build_spec, ViTSpec, tiny.VIT | change, 'vit')


def test_all_missing_keys_are_named_at_once():
  required = {
    f'"encoder.vit.{f.name}"'
    for f in dataclasses.fields(ViTSpec)
    if f.default is dataclasses.MISSING
  }
  for section in ({}, dict(vit={})):
    message = error_of(build_spec, EncoderSpec, section, 'encoder')
    assert all(name in message for name in required)


def test_elements_of_tuples_are_checked():
  for std in (('a', 'b', 'c'), (1, 1), (1, math.nan, 1), (1, 0, 1)):
    message = error_of(build_spec, specs.PixelNorm, dict(std=std), 'pixel_norm')
    assert 'norm' in message and 'std=' in message


def test_sections_merge_deeply():
  base = dict(a=dict(b=1, c=2), d=3)
  assert specs.merge_sections(base, dict(a=dict(c=4))) == dict(
    a=dict(b=1, c=4), d=3
  )
  assert base['a']['c'] == 2
