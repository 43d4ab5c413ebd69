"""The ViT: run options change nothing, every variation against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vqrae_jax.nn import vit
from vqrae_jax.ops import trees
from vqrae_jax.specs import ViTSpec, build_spec

VARIATIONS = {
  'plain': {},
  'tanh': dict(act='gelu_tanh'),
  'swiglu': dict(act='swiglu'),
  'rms': dict(norm='rms'),
  'no bias': dict(qkv_bias=False),
  'qk norm': dict(qk_norm=True),
  'layer scale': dict(layer_scale=0.1),
}


def spec(**fields):
  return build_spec(ViTSpec, tiny.VIT | fields, 'vit')


def randomised(variables):
  """Every leaf random: default biases and scales hide wiring errors."""
  leaves, shape = jax.tree.flatten(variables)
  keys = jax.random.split(jax.random.key(7), len(leaves))
  return jax.tree.unflatten(
    shape,
    [
      leaf + 0.1 * jax.random.normal(k, leaf.shape)
      for k, leaf in zip(keys, leaves, strict=True)
    ],
  )


def made(**fields):
  s = spec(**fields)
  x = jax.random.normal(jax.random.key(0), (2, 9, s.width))
  model = vit.Transformer(s)
  return s, model, randomised(model.init(jax.random.key(1), x)), x


def reference(s, params, x):
  """The same stack in plain torch, f64."""
  torch = pytest.importorskip('torch')
  blocks = {
    n: torch.tensor(np.asarray(p, np.float64))
    for n, p in trees.flatten(params['blocks']).items()
  }
  x = torch.tensor(np.asarray(x, np.float64))

  def norm(name, y, i, eps=s.norm_eps, rms=s.norm == 'rms'):
    center = 0 if rms else y.mean(-1, keepdim=True)
    y = y - center
    y = y / torch.sqrt((y**2).mean(-1, keepdim=True) + eps)
    y = y * blocks[f'{name}/scale'][i]
    return y if rms else y + blocks[f'{name}/bias'][i]

  def dense(name, y, i):
    y = y @ blocks[f'{name}/kernel'][i]
    bias = blocks.get(f'{name}/bias')
    return y if bias is None else y + bias[i]

  def heads(y):
    return y.reshape(*y.shape[:2], s.num_heads, -1).transpose(1, 2)

  def scaled(name, y, i):
    return y * blocks[name][i] if s.layer_scale is not None else y

  for i in range(s.depth):
    y = norm('norm1', x, i)
    q, k, v = (dense(f'attention/{n}', y, i) for n in ('query', 'key', 'value'))
    if s.qk_norm:
      q = norm('attention/query_norm', q, i, rms=True)
      k = norm('attention/key_norm', k, i, rms=True)
    y = torch.nn.functional.scaled_dot_product_attention(
      heads(q), heads(k), heads(v)
    )
    y = y.transpose(1, 2).reshape(x.shape)
    x = x + scaled('scale1', dense('attention/out', y, i), i)
    y = norm('norm2', x, i)
    h = dense('mlp/fc1', y, i)
    if s.act == 'swiglu':
      h = torch.nn.functional.silu(dense('mlp/gate', y, i)) * h
    else:
      tanh = 'tanh' if s.act == 'gelu_tanh' else 'none'
      h = torch.nn.functional.gelu(h, approximate=tanh)
    x = x + scaled('scale2', dense('mlp/fc2', h, i), i)
  return x.numpy()


@pytest.mark.parametrize('name', VARIATIONS)
def test_parity_with_torch(name):
  s, model, variables, x = made(**VARIATIONS[name])
  want = reference(s, variables['params'], x)
  found = np.asarray(jax.jit(model.apply)(variables, x))
  assert np.linalg.norm(found - want) / np.linalg.norm(want) < 1e-5


def test_scan_and_remat_change_nothing_but_the_program():
  fields = dict(act='swiglu', layer_scale=0.1)
  _, model, variables, x = made(**fields)
  want = jax.jit(model.apply)(variables, x)
  for options in (dict(scan=False), dict(remat=True)):
    other = vit.Transformer(spec(**fields, **options))
    np.testing.assert_allclose(
      jax.jit(other.apply)(variables, x), want, atol=1e-5
    )

    def loss(model, variables):
      return jnp.sum(model.apply(variables, x) ** 2)

    grads = [
      jax.jit(jax.grad(lambda v, m=m: loss(m, v)))(variables)
      for m in (model, other)
    ]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
      # Sums of values near 200: f32 leaves 1e-5 of the largest.
      atol = 1e-4 + 1e-5 * abs(b).max()
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)


def test_bf16_with_f32_parameters():
  _, model, variables, x = made(layer_scale=0.1)
  half = vit.Transformer(spec(layer_scale=0.1, dtype='bfloat16'))
  found = jax.jit(half.apply)(variables, x)
  assert found.dtype == jnp.bfloat16
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))
  want = model.apply(variables, x)
  error = np.linalg.norm(found - want) / np.linalg.norm(want)
  assert error < 2e-2, error


def test_blocks_are_stacked():
  s, _, variables, _ = made()
  for name, leaf in trees.flatten(variables['params']).items():
    assert name.startswith('blocks/') and leaf.shape[0] == s.depth


@pytest.mark.parametrize('posemb', ('learned', 'sincos2d'))
@pytest.mark.parametrize('grid', ((4, 4), (2, 6), (8, 8)))
def test_prefix_comes_first_and_positions_fit_any_grid(posemb, grid):
  s = spec(posemb=posemb, num_prefix_tokens=3, prefix_has_posemb=True)
  x = jax.random.normal(jax.random.key(0), (2, *grid, 5))
  model = vit.PatchEmbed(s)
  variables = randomised(model.init(jax.random.key(1), x))
  out = model.apply(variables, x)
  p = variables['params']
  assert out.shape == (2, 3 + grid[0] * grid[1], s.width)
  np.testing.assert_allclose(
    out[0, :3], p['prefix'] + p['prefix_positions'], atol=1e-6
  )


def test_registers_follow_the_other_prefix_tokens_without_positions():
  s = spec(num_prefix_tokens=5, prefix_has_posemb=True, num_registers=4)
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 5))
  model = vit.PatchEmbed(s)
  variables = randomised(model.init(jax.random.key(1), x))
  p = variables['params']
  out = model.apply(variables, x)
  assert out.shape == (2, 5 + 16, s.width)
  np.testing.assert_allclose(
    out[1, :1], p['prefix'] + p['prefix_positions'], atol=1e-6
  )
  np.testing.assert_array_equal(out[1, 1:5], p['registers'])
  # The grid does not know of them.
  bare = vit.PatchEmbed(spec())
  fewer = {'params': {k: p[k] for k in ('linear', 'positions')}}
  np.testing.assert_array_equal(out[:, 5:], bare.apply(fewer, x))
