"""A tokenizer as ONNX: python examples/onnx_export.py TOKENIZER OUT [BATCH]

Writes OUT/encode.onnx (f32[b h w 3] in [0, 1] -> i32 indices) and
OUT/decode.onnx (indices -> f32[b h w 3] in [0, 1]) of the tokenizer's native
size, of any batch or of BATCH images, and compares both in onnxruntime with the
public functions, on random images.

It needs an environment of its own, since jax2onnx wants an older Orbax than
training does (0.17.1: orbax-checkpoint 0.11, and JAX before 0.12):

  python3.12 -m venv onnx
  onnx/bin/pip install 'jax2onnx==0.17.*' 'jax==0.11.*' onnxruntime \
    safetensors etils jaxtyping huggingface_hub absl-py ml_collections
  PYTHONPATH=. onnx/bin/python examples/onnx_export.py TOKENIZER OUT

jax2onnx knows neither `nn.scan` (2026-11) nor reductions with an initial value,
and remainders of FSQ's digits only of a fixed batch. So blocks are unrolled
here, and the nearest code is the plain search: centred, in f32, all scores at
once. A near tie of two codes may come out the other way. docs/formats.md lists
what was measured.
"""

import contextlib
import functools
import pathlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import jax2onnx
import numpy as np
import onnxruntime
from flax import linen as nn

import vqrae_jax
from vqrae_jax.quantizers import base, simvq, vq

PIXELS = 1e-4  # that decoded images may differ by


def unrolled(block: type[nn.Module], *, length: int, **_: Any):
  """`nn.scan` over stacked parameters, as a Python loop."""

  class Blocks(nn.Module):
    spec: Any
    emit: bool

    @nn.compact
    def __call__(self, x, rotation):
      stacked, outputs = self.variables['params'], []
      for i in range(length):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        one = block(self.spec, self.emit, parent=None)
        x, y = one.apply({'params': params}, x, rotation)
        outputs.append(y)
      return x, jnp.stack(outputs) if self.emit else None

  return Blocks


def nearest_code(z, codebook, *, distance='l2'):
  """`vqrae_jax.ops.nearest.nearest_code` without margins."""
  if distance == 'cosine':
    z, codebook = (
      x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)) for x in (z, codebook)
    )
  center = jnp.mean(codebook, 0)
  z, codebook = z - center, codebook - center
  scores = 0.5 * jnp.sum(codebook * codebook, -1) - z @ codebook.T
  return jnp.argmin(scores, -1).astype(jnp.int32)


@contextlib.contextmanager
def plain() -> Iterator[None]:
  """What jax2onnx converts, in place of what it does not."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(mock.patch.object(nn, 'scan', unrolled))
    for module in (base, simvq, vq):
      if hasattr(module, 'nearest_code'):
        stack.enter_context(
          mock.patch.object(module, 'nearest_code', nearest_code)
        )
    yield


def convert(
  function, like, batch, path: pathlib.Path
) -> onnxruntime.InferenceSession:
  """The function of one array as an ONNX file, opened."""
  shape = jax.ShapeDtypeStruct((batch, *like.shape[1:]), like.dtype)
  with plain():
    model = jax2onnx.to_onnx(function, [shape], model_name=path.stem)
  path.write_bytes(model.SerializeToString())
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3
  return onnxruntime.InferenceSession(
    str(path), options, providers=['CPUExecutionProvider']
  )


def main(source: str, out: str, batch: str = '') -> None:
  """Converts, compares, prints a line for each batch."""
  folder = pathlib.Path(out)
  folder.mkdir(parents=True)
  tokenizer, variables = vqrae_jax.load_tokenizer(source)
  encode, decode = (
    functools.partial(fn, tokenizer, variables)
    for fn in (vqrae_jax.encode_to_indices, vqrae_jax.decode_from_indices)
  )
  size = tokenizer.native_size
  (any_batch,) = jax.export.symbolic_shape('B')
  fixed, batches = (int(batch), [int(batch)]) if batch else (any_batch, [1, 3])
  images = np.random.default_rng(0).random((max(batches), *size, 3), 'f4')
  indices = np.asarray(jax.jit(encode)(images))
  encoder = convert(encode, images, fixed, folder / 'encode.onnx')
  decoder = convert(decode, indices, fixed, folder / 'decode.onnx')
  for n in batches:
    found, pixels = (
      session.run(None, {session.get_inputs()[0].name: x[:n]})[0]
      for session, x in ((encoder, images), (decoder, indices))
    )
    equal = float(np.mean(found == indices[:n]))
    want = np.asarray(jax.jit(decode)(indices[:n]))
    error = float(np.abs(pixels - want).max())
    print(f'batch {n}: {equal:.2%} of indices equal, pixels to {error:.1e}')
    if not (equal == 1 and error <= PIXELS):
      sys.exit(f'they differ: indices must be equal, pixels to {PIXELS}')


if __name__ == '__main__':
  main(*sys.argv[1:])
