"""Opens the bundle that contains it. Needs jax, numpy and flatbuffers.

  encode, decode = load()
  indices = encode(images)  # uint8 [b h w 3]
  images = decode(indices)  # f32 [b h w 3] in [0, 1]

Shapes and ranges are in bundle.json.
"""

import functools
import pathlib

import jax.export
import numpy as np


def load(folder=pathlib.Path(__file__).parent):
  """(encode, decode), with their variables on the default device."""
  with np.load(folder / 'variables.npz') as file:
    variables = jax.device_put(dict(file))
  calls = []
  for name in ('encode', 'decode'):
    data = bytearray((folder / f'{name}.jax').read_bytes())
    program = jax.jit(jax.export.deserialize(data).call)
    calls.append(functools.partial(program, variables))
  return calls
