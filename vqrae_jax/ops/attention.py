"""Softmax attention, in bf16 through the fused kernel of the platform.

cuDNN's flash attention on CUDA (arXiv 2307.08691), splash attention on TPU:
neither writes the scores [b heads n n] to memory. Where a kernel does not take
the shapes, and in f32, attention is the plain one, which equals them to bf16's
error. No masks, no dropout, no caches.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

BATCH_AXES = ('data', 'fsdp')  # of the mesh (`sharding.py`)
LANES = 128  # a TPU's tile: what splash counts tokens in
# Below it a token's scores are fewer than its MLP's hidden channels, and
# padding to whole tiles costs more than the scores.
TPU_TOKENS = 512

Heads = Float[Array, 'b n heads d']
Others = Float[Array, 'b m heads d']


def attention(q: Heads, k: Others, v: Others) -> Heads:
  """softmax(q k^T / sqrt(d)) v.

  Args:
    q, k, v: one dtype; bfloat16 takes the fused kernels, if q is as long as
      k and v.
  """
  if q.dtype != jnp.bfloat16:
    return plain(q, k, v)
  fused, alike = {}, q.shape == k.shape
  if alike and cudnn_takes(q.shape):
    fused['cuda'] = flash
  if alike and splash_takes(q.shape):
    fused['tpu'] = splash
  return jax.lax.platform_dependent(
    q, k, v, default=jax.nn.dot_product_attention, **fused
  )


def plain(q: Heads, k: Others, v: Others) -> Heads:
  """`jax.nn.dot_product_attention` for CPUs, in half its time: products take
  their operands in order, and a row is divided by its sum after the second one,
  for which exponentials are written once."""
  q, k, v = (x.swapaxes(1, 2) for x in (q / math.sqrt(q.shape[-1]), k, v))
  scores = q @ k.swapaxes(2, 3)
  largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(scores - largest)
  return (weights @ v / weights.sum(-1, keepdims=True)).swapaxes(1, 2)


def cudnn_takes(shape: tuple[int, ...]) -> bool:
  """Whether cuDNN's kernel runs here, at these heads."""
  device = jax.devices()[0]
  if 'cuda' not in device.client.platform_version:
    return False
  hopper = float(device.compute_capability) >= 9
  return shape[-1] % 8 == 0 and shape[-1] <= (256 if hopper else 128)


def flash(q: Heads, k: Heads, v: Heads) -> Heads:
  """cuDNN's kernel; a gradient of it wants an even number of tokens."""
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
  """Whether splash is worth it, and the mesh at hand says how to split it:
  XLA cannot split a kernel by itself."""
  mesh = jax.sharding.get_abstract_mesh()
  rows = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
  return not mesh.empty and shape[1] >= TPU_TOKENS and shape[0] % rows == 0


def splash(q: Heads, k: Heads, v: Heads, interpret: bool = False) -> Heads:
  """TPU's kernel over the mesh at hand, tokens padded to whole tiles."""
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
