"""Writes encoder_params.json: the exact parameter count of every encoder.

    python -m tests.golden.make_encoder_params

Renew it when a row is added. If the count of an existing row changes, its
published weights no longer fit.
"""

import json
import math
import pathlib

import jax

from vqrae_jax.encoders import ENCODERS
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.specs import EncoderSpec, build_spec

PATH = pathlib.Path(__file__).with_name('encoder_params.json')


def spec_of(name: str) -> EncoderSpec:
  return build_spec(EncoderSpec, ENCODERS[name], name)


def counts() -> dict[str, int]:
  """{row: parameters}, in the table's order, by shapes alone."""
  return {name: _count(spec_of(name)) for name in ENCODERS}


def _count(spec: EncoderSpec) -> int:
  p = spec.vit.patch_size
  image = jax.ShapeDtypeStruct((1, p, p, 3), 'float32')
  shapes = jax.eval_shape(Encoder(spec).init, jax.random.key(0), image)
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


if __name__ == '__main__':
  PATH.write_text(json.dumps(counts(), indent=1) + '\n')
