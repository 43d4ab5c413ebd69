"""The ViT: run options change nothing; tokens and positions.

Its variations are held by the encoders' parity (`tests/encoders/`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from tests import tiny
from vqrae_jax.nn import vit
from vqrae_jax.ops import trees
from vqrae_jax.specs import ViTSpec, build_spec


def spec(**fields):
  return build_spec(ViTSpec, tiny.VIT | fields, 'vit')


def made(**fields):
  s = spec(**fields)
  x = jax.random.normal(jax.random.key(0), (2, 9, s.width))
  model = vit.Transformer(s)
  return s, model, jax.jit(model.init)(jax.random.key(1), x), x


def test_scan_and_remat_change_nothing_but_the_program():
  fields = dict(act='swiglu', layer_scale=0.1, posemb='rope2d')
  s, model, variables, x = made(**fields)
  rotation = vit.rotation(s, (3, 3))

  @functools.partial(jax.jit, static_argnums=0)
  def outputs(model, variables):
    out, pull = jax.vjp(lambda v: model.apply(v, x, rotation), variables)
    return out, pull(2 * out)

  want, gradient = outputs(model, variables)
  for options in (dict(scan=False), dict(remat=True)):
    other = vit.Transformer(spec(**fields, **options))
    found, grads = outputs(other, variables)
    np.testing.assert_allclose(found, want, atol=1e-5)
    both = grads, gradient
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
      # Sums of values near 200: f32 leaves 1e-5 of the largest.
      atol = 1e-4 + 1e-5 * abs(b).max()
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)


@pytest.mark.parametrize('platform, alone', (('cpu', 1), ('gpu', 2)))
def test_a_gpu_loops_only_where_it_must(platform, alone):
  """For remat and to make weights; else a loop's copies cost a quarter. The
  GPU is the mesh's: this process has none."""
  s, model, variables, x = made()
  device = AbstractDevice('any', None, platform)
  mesh = AbstractMesh((1,), ('x',), abstract_device=device)

  def blocks_at_once(fn, *args):
    with jax.sharding.use_abstract_mesh(mesh):
      loops = jax.make_jaxpr(fn)(*args).eqns
    return [e.params['unroll'] for e in loops if e.primitive.name == 'scan']

  assert s.depth == 2
  assert blocks_at_once(model.apply, variables, x) == [alone]
  remat = vit.Transformer(spec(remat=True))
  assert blocks_at_once(remat.apply, variables, x) == [1]
  assert blocks_at_once(model.init, jax.random.key(0), x) == [1]


def test_product_has_the_gradients_of_matmul():
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((2, 3, 5), (5, 7), (2, 3, 7))
  x, kernel, dy = map(jax.random.normal, keys, shapes)
  assert vit.product(x[:0], kernel).shape == (0, 3, 7)
  for a in (x, x[0], x[0, 0]):
    found, want = (jax.vjp(f, a, kernel) for f in (vit.product, jnp.matmul))
    cotangent = dy.reshape(-1, 7)[: a.size // 5].reshape(want[0].shape)
    found, want = ((y, *pull(cotangent)) for y, pull in (found, want))
    for b, c in zip(found, want, strict=True):
      np.testing.assert_allclose(b, c, rtol=1e-6, atol=1e-6)


def test_bf16_with_f32_parameters():
  fields = dict(layer_scale=0.1, posemb='rope2d')
  s, model, variables, x = made(**fields)
  rotation = vit.rotation(s, (3, 3))
  half = vit.Transformer(spec(**fields, dtype='bfloat16'))
  found = jax.jit(half.apply)(variables, x, rotation)
  assert found.dtype == jnp.bfloat16
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))
  want = model.apply(variables, x, rotation)
  error = np.linalg.norm(found - want) / np.linalg.norm(want)
  assert error < 2e-2, error


def test_blocks_are_stacked():
  s, _, variables, _ = made()
  for name, leaf in trees.flatten(variables['params']).items():
    assert name.startswith('blocks/') and leaf.shape[0] == s.depth


@pytest.mark.parametrize('posemb', ('learned', 'sincos2d'))
@pytest.mark.parametrize('grid', ((4, 4), (2, 6)))
def test_prefix_comes_first_and_positions_fit_any_grid(posemb, grid):
  s = spec(posemb=posemb, num_prefix_tokens=3, prefix_has_posemb=True)
  x = jax.random.normal(jax.random.key(0), (2, *grid, 5))
  model = vit.PatchEmbed(s)
  variables = model.init(jax.random.key(1), x)
  out = model.apply(variables, x)
  p = variables['params']
  assert out.shape == (2, 3 + grid[0] * grid[1], s.width)
  np.testing.assert_allclose(
    out[0, :3], p['prefix'] + p['prefix_positions'], atol=1e-6
  )


def test_rope2d_has_no_table_and_leaves_prefix_tokens_alone():
  s = spec(posemb='rope2d', num_prefix_tokens=2, num_registers=1)
  x = jax.random.normal(jax.random.key(0), (2, 2, 3, 5))
  model = vit.PatchEmbed(s)
  variables = model.init(jax.random.key(1), x)
  assert {*variables['params']} == {'linear', 'prefix', 'registers'}
  assert model.apply(variables, x).shape == (2, 2 + 6, s.width)
  cos, sin = vit.rotation(s, (2, 3))
  assert (cos[:2] == 1).all() and (sin[:2] == 0).all()
  assert len(np.unique(sin[2:], axis=0)) == 6
