"""Attention by the platforms' kernels against the plain one in f32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from vqrae_jax import sharding
from vqrae_jax.ops import attention

HEADS, WIDTH = 2, 64


def drawn(tokens, dtype='bfloat16', rows=2):
  shape = (rows, tokens, HEADS, WIDTH)
  keys = jax.random.split(jax.random.key(0), 4)
  *qkv, cotangent = (1.5 * jax.random.normal(k, shape, dtype) for k in keys)
  return qkv, cotangent


@functools.partial(jax.jit, static_argnums=0)
def with_gradients_of(fn, qkv, cotangent):
  y, back = jax.vjp(fn, *qkv)
  return y, *back(cotangent)


def with_gradients(fn, qkv, cotangent):
  found = with_gradients_of(fn, qkv, cotangent)
  return [np.asarray(x, np.float32) for x in found]


# Not a multiple of a tile, one tile more than that, exact tiles.
@pytest.mark.parametrize('tokens', (130, 256))
def test_splash_equals_plain_attention_to_bf16(tokens):
  qkv, cotangent = drawn(tokens)
  fused = functools.partial(attention.splash, interpret=True)
  found = with_gradients(fused, qkv, cotangent)
  plain = with_gradients(jax.nn.dot_product_attention, qkv, cotangent)
  up = jax.tree.map(lambda x: x.astype(jnp.float32), (qkv, cotangent))
  exact = with_gradients(jax.nn.dot_product_attention, *up)
  for a, b, c in zip(found, plain, exact, strict=True):
    error, allowed = (np.linalg.norm(x - c) / np.linalg.norm(c) for x in (a, b))
    assert error < 1.2 * allowed and error < 5e-3


def test_splash_is_split_over_the_mesh():
  qkv, cotangent = drawn(130, rows=8)
  fused = functools.partial(attention.splash, interpret=True)
  alone = with_gradients(fused, qkv, cotangent)
  with jax.set_mesh(sharding.make_mesh('fsdp+tp', tensor=2)):
    split = with_gradients(fused, qkv, cotangent)
    for a, b in zip(alone, split, strict=True):
      np.testing.assert_array_equal(a, b)


def test_bf16_on_a_cpu_takes_the_plain_one():
  qkv, _ = drawn(600)
  found, plain = (
    jax.jit(fn)(*qkv)
    for fn in (attention.attention, jax.nn.dot_product_attention)
  )
  np.testing.assert_array_equal(*(np.asarray(x, 'f4') for x in (found, plain)))


def test_f32_attention_is_exact():
  """Like JAX's own against f64, also where exponentials would overflow."""
  qkv, cotangent = drawn(197, 'float32')
  given = [10 * qkv[0], *qkv[1:]], cotangent
  found = with_gradients(attention.attention, *given)
  library = with_gradients(jax.nn.dot_product_attention, *given)
  with jax.enable_x64(True):
    up = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), given)
    exact = with_gradients_of(jax.nn.dot_product_attention, *up)
    exact = [np.asarray(x) for x in exact]
  for a, b, c in zip(found, library, exact, strict=True):
    error, allowed = (np.linalg.norm(x - c) / np.linalg.norm(c) for x in (a, b))
    assert error < 1.5 * allowed and error < 1e-5


def test_who_takes_what():
  big, small = (8, 785, 6, 64), (8, 257, 16, 64)
  assert not attention.cudnn_takes(small)  # no CUDA here
  assert not attention.splash_takes(big)  # no mesh to split over
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'device_count', lambda: 1)
    assert attention.splash_takes(big)
  with jax.set_mesh(sharding.make_mesh()):
    assert attention.splash_takes(big)
    assert not attention.splash_takes(small)
    assert not attention.splash_takes((9, *big[1:]))


def test_a_mesh_of_the_users_own():
  """The kernel of a TPU, traced on every platform, is split over ours alone."""
  big = (8, 600, HEADS, WIDTH)
  q = jax.ShapeDtypeStruct(big, jnp.bfloat16)
  mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
  inside = jax.shard_map(
    attention.attention, mesh=mesh, in_specs=jax.P('x'), out_specs=jax.P('x')
  )
  for fn in (attention.attention, inside):
    with jax.set_mesh(mesh):
      assert jax.eval_shape(fn, q, q, q).shape == big


def test_cudnn_cuts_no_heads():
  """The GPUs are the mesh's: this process has none."""
  gpu = AbstractDevice('NVIDIA H200', None, 'gpu')
  mesh = AbstractMesh((2, 4), ('fsdp', 'model'), abstract_device=gpu)
  with jax.sharding.use_abstract_mesh(mesh):
    assert attention.cudnn_takes((8, 784, 8, 64))
    assert not attention.cudnn_takes((8, 784, 6, 64))
    assert not attention.cudnn_takes((8, 784, 8, 68))
    assert not attention.cudnn_takes((8, 784, 8, 136))


@pytest.mark.parametrize('takes', ('cudnn_takes', 'splash_takes'))
def test_an_export_for_all_platforms_has_no_kernel(takes, monkeypatch):
  """Whatever the machine that writes it; JAX lowers each branch for all."""
  monkeypatch.setattr(attention, takes, lambda shape: True)
  (b,) = jax.export.symbolic_shape('b')
  q = jax.ShapeDtypeStruct((b, 600, HEADS, WIDTH), jnp.bfloat16)
  export = jax.export.export(
    jax.jit(attention.attention), platforms=('cpu', 'tpu', 'cuda')
  )
  loaded = jax.export.deserialize(export(q, q, q).serialize())
  qkv, _ = drawn(600)
  want = jax.jit(jax.nn.dot_product_attention)(*qkv)
  found = jax.jit(loaded.call)(*qkv)
  np.testing.assert_array_equal(*(np.asarray(x, 'f4') for x in (found, want)))
