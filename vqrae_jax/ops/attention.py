"""Softmax attention, in bf16 by the platform's fused kernel.

cuDNN's flash attention on CUDA (arXiv 2307.08691), splash attention on TPU:
neither writes the scores [b heads n n] to memory. Shapes that the kernel does
not take use `jax.nn.dot_product_attention`, types other than bf16 `plain`; all
agree to bf16's error. No masks, no dropout, no caches.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from vqrae_jax.ops.codes import BATCH_AXES, auto_axes

LANES = 128  # a TPU's tile, of which splash takes a multiple of tokens
# With fewer, a token's scores are fewer than its MLP's hidden channels, and
# padding to full tiles costs more than the scores.
TPU_TOKENS = 512

Heads = Float[Array, 'b n heads d']
Others = Float[Array, 'b m heads d']


def attention(q: Heads, k: Others, v: Others) -> Heads:
  """softmax(q k^T / sqrt(d)) v.

  Args:
    q, k, v: of one dtype; bfloat16 uses the fused kernels, if q has as many
      tokens as k and v.
  """
  if q.dtype != jnp.bfloat16:
    return plain(q, k, v)
  fused = {}
  # An export with symbols in its shapes is for several platforms, none of which
  # may hold another one's kernel.
  known = all(isinstance(n, int) for n in q.shape)
  if known and q.shape == k.shape:
    if cudnn_takes(q.shape):
      fused['cuda'] = flash
    if splash_takes(q.shape):
      fused['tpu'] = splash
  return jax.lax.platform_dependent(
    q, k, v, default=jax.nn.dot_product_attention, **fused
  )


def plain(q: Heads, k: Others, v: Others) -> Heads:
  """`jax.nn.dot_product_attention` in half its time on CPUs: heads are moved in
  front for both products, and rows are divided by their sums after the second,
  so that exponentials are written once."""
  q, k, v = (x.swapaxes(1, 2) for x in (q / math.sqrt(q.shape[-1]), k, v))
  scores = q @ k.swapaxes(2, 3)
  largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(scores - largest)
  return (weights @ v / weights.sum(-1, keepdims=True)).swapaxes(1, 2)


def target() -> Any:
  """A device that is compiled for, with its `platform` and `device_kind`: one
  of the ambient mesh, which may be in no machine, or of this process."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.abstract_device or jax.devices()[0]


def cudnn_takes(shape: tuple[int, ...]) -> bool:
  """Whether cuDNN's kernel runs where q of `shape` is computed: on an NVIDIA
  GPU, in a mesh that cuts no heads."""
  # JAX takes heads of up to 256 on Hopper, but asks this process's devices.
  cut = shape[2] % jax.sharding.get_abstract_mesh().shape.get('model', 1)
  fits = shape[-1] % 8 == 0 and shape[-1] <= 128
  return target().device_kind.startswith('NVIDIA') and fits and not cut


def flash(q: Heads, k: Heads, v: Heads) -> Heads:
  """cuDNN's kernel, whose gradient needs an even number of tokens: odd ones are
  padded."""
  tokens = q.shape[1]
  lengths = None
  if tokens % 2:
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full(len(q), tokens, jnp.int32)
  out = jax.nn.dot_product_attention(
    q,
    k,
    v,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation='cudnn',
  )
  return out[:, :tokens]


def splash_takes(shape: tuple[int, ...]) -> bool:
  """Whether splash pays off for q of `shape` and can be split over the ambient
  mesh, which XLA cannot do by itself for a kernel: one of `sharding.make_mesh`,
  or none and a single device."""
  mesh = jax.sharding.get_abstract_mesh()
  ours = {*BATCH_AXES, 'model'} <= auto_axes()
  if not (ours or (mesh.empty and jax.device_count() == 1)):
    return False
  rows = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
  return shape[1] >= TPU_TOKENS and shape[0] % rows == 0


def splash(q: Heads, k: Heads, v: Heads, interpret: bool = False) -> Heads:
  """TPU's kernel over the ambient mesh, tokens padded to full tiles."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  tokens = q.shape[1]
  padded = -(-tokens // LANES) * LANES
  block = max(b for b in (128, 256, 384, 512) if padded % b == 0)
  sizes = kernel.BlockSizes(
    **{
      f'block_{name}': block
      for name in (
        'q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq',
        'kv_dq',
      )
    }
  )  # fmt: skip
  # Padding is a segment of its own, which no token attends to.
  segment = (jnp.arange(padded) >= tokens).astype(jnp.int32)

  def local(q, k, v):
    heads = q.shape[1]
    mask = masks.MultiHeadMask([masks.FullMask((padded, padded))] * heads)
    one = kernel.make_splash_mha_single_device(
      mask, block_sizes=sizes, interpret=interpret
    )
    return jax.vmap(
      lambda q, k, v: one(q, k, v, kernel.SegmentIds(*2 * (segment,)))
    )(q, k, v)

  mesh = jax.sharding.get_abstract_mesh()
  split = q.shape[2] % mesh.shape.get('model', 1) == 0
  spec = PartitionSpec(BATCH_AXES, 'model' if split else None)
  if not mesh.empty:
    local = jax.shard_map(
      local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )

  def tiles(x):
    x = jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0), (0, 0)))
    return x.swapaxes(1, 2)

  out = local(tiles(q / math.sqrt(q.shape[-1])), tiles(k), tiles(v))
  return out.swapaxes(1, 2)[:, :tokens]
