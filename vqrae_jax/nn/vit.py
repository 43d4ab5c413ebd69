"""The vision transformer: one stack of pre-norm blocks for every network.

ViT (arXiv 2010.11929) with the variations that the published encoders need:
LayerNorm or RMSNorm, gelu, tanh-gelu, quick-gelu or SwiGLU, biases on q k v,
RMS norm of queries and keys (over the full width, as in InternViT), rotated
queries and keys (RoPE, as in DINOv3), LayerScale (arXiv 2103.17239).

The blocks' parameters are stacked [depth, ...], on disk too; without `scan` the
same loop is unrolled. `PatchEmbed` embeds patches, positions and prefix tokens;
complete networks are in `models/`.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vqrae_jax.ops import images, posemb
from vqrae_jax.ops.attention import attention, target
from vqrae_jax.specs import ViTSpec

XAVIER = nn.initializers.xavier_uniform()
BATCH_TOKENS = ('batch', 'tokens', 'embed')
# {spec.remat: what a block keeps for its gradient besides its input}.
REMAT = {
  True: None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def norm(spec: ViTSpec, name: str, affine: bool = True) -> nn.Module:
  """The spec's norm. Variance is two-pass: E[x²] - E[x]² loses digits."""
  if spec.norm == 'rms':
    return nn.RMSNorm(
      spec.norm_eps, dtype=spec.dtype, use_scale=affine, name=name
    )
  return nn.LayerNorm(
    spec.norm_eps,
    dtype=spec.dtype,
    use_scale=affine,
    use_bias=affine,
    use_fast_variance=False,
    name=name,
  )


@jax.custom_vjp
def product(x: Float[Array, '... i'], kernel: Float[Array, 'i o']) -> Array:
  """x @ kernel, whose gradient for the kernel is computed as [i o]. JAX's own
  rule transposes it from [o i], which takes a CPU twice as long. Like fused
  attention, it has no forward-mode derivative."""
  return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _product_gradient(given, dy):
  x, kernel = given
  dx = jax.lax.dot_general(dy, kernel, (((x.ndim - 1,), (1,)), ((), ())))
  if target().platform == 'cpu':  # it would copy tokens of several dimensions
    tokens = math.prod(x.shape[:-1])
    x, dy = (a.reshape(tokens, a.shape[-1]) for a in (x, dy))
  rows = tuple(range(x.ndim - 1))
  return dx, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))


product.defvjp(lambda *given: (product(*given), given), _product_gradient)


def dense(
  spec: ViTSpec, features: int, name: str, bias: bool = True
) -> nn.Dense:
  """A dense layer of a ViT, [... i] -> [... features]."""
  return nn.Dense(
    features,
    use_bias=bias,
    dtype=spec.dtype,
    kernel_init=XAVIER,
    dot_general=lambda x, kernel, *_, **__: product(x, kernel),
    name=name,
  )


def rotation(s: ViTSpec, grid: tuple[int, int]) -> posemb.Rotation | None:
  """The rotation of a grid's tokens, prefix first; None without "rope2d"."""
  if s.posemb != 'rope2d':
    return None
  return posemb.rope2d(s.width // s.num_heads, grid, s.num_prefix_tokens)


class Attention(nn.Module):
  """Multi-head attention, [b n d] -> [b n d], to itself or to `context`
  [b m d]."""

  spec: ViTSpec

  @nn.compact
  def __call__(
    self,
    x: Array,
    rotation: posemb.Rotation | None = None,
    context: Array | None = None,
  ) -> Array:
    s = self.spec
    head = s.width // s.num_heads

    def project(name):
      source = x if context is None or name == 'query' else context
      bias = name != 'key' if s.qkv_bias == 'qv' else bool(s.qkv_bias)
      y = dense(s, s.width, name, bias)(source)
      if s.qk_norm and name != 'value':
        y = nn.RMSNorm(s.norm_eps, dtype=s.dtype, name=f'{name}_norm')(y)
      y = y.reshape(*y.shape[:-1], s.num_heads, head)
      if rotation is not None and name != 'value':
        y = posemb.rotate(y, rotation)
      return y

    y = attention(project('query'), project('key'), project('value'))
    return dense(s, s.width, 'out')(y.reshape(x.shape))


class Mlp(nn.Module):
  """Two dense layers; three with SwiGLU: fc2(silu(gate(x)) * fc1(x))."""

  spec: ViTSpec

  @nn.compact
  def __call__(self, x: Array) -> Array:
    s = self.spec
    y = dense(s, s.mlp_dim, 'fc1')(x)
    if s.act == 'swiglu':
      y = jax.nn.silu(dense(s, s.mlp_dim, 'gate')(x)) * y
    elif s.act == 'quick_gelu':
      y = y * jax.nn.sigmoid(1.702 * y)
    else:
      y = jax.nn.gelu(y, approximate=s.act == 'gelu_tanh')
    return dense(s, s.width, 'fc2')(y)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); a body for `nn.scan`.

  With `emit` the scan also returns the output of each block.
  """

  spec: ViTSpec
  emit: bool = False

  @nn.compact
  def __call__(
    self, x: Array, rotation: posemb.Rotation | None = None
  ) -> tuple[Array, Array | None]:
    s = self.spec

    def scaled(y, name):
      if s.layer_scale is None:
        return y
      init = nn.initializers.constant(s.layer_scale)
      # Cast: an f32 scale would change the scan's carry type in bf16.
      return y * self.param(name, init, (s.width,)).astype(y.dtype)

    x = nn.with_logical_constraint(x, BATCH_TOKENS)
    y = Attention(s, name='attention')(norm(s, 'norm1')(x), rotation)
    x = x + scaled(y, 'scale1')
    y = Mlp(s, name='mlp')(norm(s, 'norm2')(x))
    x = x + scaled(y, 'scale2')
    return x, x if self.emit else None


class Transformer(nn.Module):
  """`depth` blocks over tokens [b n d]; parameters stacked under "blocks".

  With `layers` [t b n d], the outputs of these blocks, counted from 0, in that
  order, repeated or not. The scan then keeps the outputs of all blocks.
  """

  spec: ViTSpec
  layers: tuple[int, ...] | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b n d'], rotation: posemb.Rotation | None = None
  ) -> Float[Array, '*t b n d']:
    s = self.spec
    # On a GPU a loop copies what it reads and keeps, a quarter of the time of
    # forward and backward; but only a loop guarantees remat, and it compiles in
    # seconds.
    unrolls = not (s.remat or self.is_initializing())
    scan = s.scan and not (unrolls and target().platform == 'gpu')
    block = Block
    if s.remat:
      # Outside a loop XLA would merge the recomputation with the first one.
      block = nn.remat(Block, prevent_cse=not scan, policy=REMAT[s.remat])
    stack = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=s.depth,
      unroll=1 if scan else s.depth,
    )(s, self.layers is not None, name='blocks')
    x, outputs = stack(x.astype(s.dtype), rotation)
    if self.layers is None:
      return x
    return jnp.stack([outputs[i] for i in self.layers])


class PatchEmbed(nn.Module):
  """Linear embedding of a grid, plus positions, plus prefix tokens.

  [b gh gw p] -> [b prefix+gh*gw d]. Positions follow `spec.posemb`: fixed
  sin-cos in the native grid's coordinates, a learned table resampled (f32) to
  the given grid, or none here ("rope2d": `rotation`). Prefix tokens come first,
  registers last among them. With `spec.embed_norm` the linear layer has no bias
  and a norm follows.
  """

  spec: ViTSpec
  resize: str = 'bicubic'
  antialias: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, 'b gh gw p']) -> Float[Array, 'b n d']:
    s = self.spec
    b, *grid, _ = x.shape
    x = dense(s, s.width, 'linear', bias=not s.embed_norm)(x)
    x = x.reshape(b, grid[0] * grid[1], s.width)
    small = nn.initializers.normal(0.02)
    if s.posemb == 'sincos2d':
      positions = posemb.sincos2d(s.width, tuple(grid), s.grid)
      x = x + jnp.asarray(positions, x.dtype)
    elif s.posemb == 'learned':
      table = self.param('positions', small, (*s.grid, s.width))
      table = images.resize(table, tuple(grid), self.resize, self.antialias)
      x = x + jnp.asarray(table.reshape(-1, s.width), x.dtype)
    prefixes = []
    if others := s.num_prefix_tokens - s.num_registers:
      # Not zeros, as in published code: a norm with eps 1e-12 over a zero token
      # has a slope of 1e6, and gradient clipping would leave other leaves none.
      prefix = self.param('prefix', small, (others, s.width))
      if s.prefix_has_posemb:
        prefix = prefix + self.param('prefix_positions', small, prefix.shape)
      prefixes.append(prefix)
    if s.num_registers:
      shape = (s.num_registers, s.width)
      prefixes.append(self.param('registers', small, shape))
    prefixes = [
      jnp.broadcast_to(t.astype(x.dtype)[None], (b, *t.shape)) for t in prefixes
    ]
    if prefixes:
      x = jnp.concatenate([*prefixes, x], axis=1)
    return norm(s, 'norm')(x) if s.embed_norm else x
