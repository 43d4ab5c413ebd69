"""Writes shardings.json: where every leaf of three recipes' states lies.

    python -m tests.golden.make_shardings

Shapes alone; nothing is allocated. A line is a leaf of the state ("0/…") or of
the frozen leaves ("1/…"): its type and shape, and its spec in each layout on 8
devices; "." is a dimension that is whole. Optimizer moments and averages of
weights have no lines of their own if they lie as their parameter does, which
then says "(+ mu, nu, ema)".

Renew it when a rule, a leaf's name or a recipe's size is meant to change.
"""

import importlib
import json
import math
import pathlib
import re

import jax

from vqrae_jax import sharding
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import setup
from vqrae_jax.train import state as state_lib

PATH = pathlib.Path(__file__).with_name('shardings.json')
RECIPES = ('simvq_siglip_l', 'vq_dinov2_b', 'fsq_cosmos_64k')
LAYOUTS = {'fsdp': 1, 'fsdp+tp': 2}
PARAMETERS = '0/tokenizer/params/'


def placed(recipe: str, layout: str) -> dict:
  """{leaf name: its shape with its sharding} of the state and the frozen."""
  module = importlib.import_module(f'configs.{recipe}')
  spec = config_lib.read_config(module.get_config())
  tokenizer = build_tokenizer(spec.model)
  step, *_ = setup.plan_step(spec, tokenizer, 1000)
  mesh = sharding.make_mesh(layout, tensor=LAYOUTS[layout])
  leaves = trees.flatten(state_lib.state_shapes(step, mesh))
  return {n: x for n, x in leaves.items() if x is not None}


def parameter_of(name: str) -> tuple[str, str] | None:
  """("mu" | "nu" | "ema", the parameter's leaf), or None."""
  found = re.fullmatch(r'0/(?:tokenizer/opt_state/\d+/)?(mu|nu|ema)/(.*)', name)
  return found and (found[1], PARAMETERS + found[2])


def bytes_of(leaf) -> int:
  """Of the whole leaf; a key counts as nothing."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return 0
  return math.prod(leaf.shape) * leaf.dtype.itemsize


def bytes_per_device(leaf) -> int:
  """Of the leaf's share on one device."""
  share = math.prod(leaf.sharding.shard_shape(leaf.shape))
  return bytes_of(leaf) * share // max(math.prod(leaf.shape), 1)


def _words(leaf) -> str:
  spec = [*leaf.sharding.spec]
  spec += [None] * (len(leaf.shape) - len(spec))
  return ' '.join(axis or '.' for axis in spec) or '-'


def table(recipe: str) -> dict[str, str]:
  """{leaf: "shape | fsdp: … | fsdp+tp: …"}."""
  layouts = {layout: placed(recipe, layout) for layout in LAYOUTS}
  lines, beside = {}, {}
  for name, leaf in layouts['fsdp'].items():
    specs = {n: _words(leaves[name]) for n, leaves in layouts.items()}
    shape = 'x'.join(map(str, leaf.shape)) or 'scalar'
    line = f'{leaf.dtype} {shape}'
    line += ''.join(f' | {n}: {words}' for n, words in specs.items())
    lines[name] = line
  for name in list(lines):
    found = parameter_of(name)
    if found and lines.get(found[1], '') == lines[name]:
      beside.setdefault(found[1], []).append(found[0])
      del lines[name]
  for name, parts in beside.items():
    order = [p for p in ('mu', 'nu', 'ema') if p in parts]
    lines[name] += f' (+ {", ".join(order)})'
  return lines


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 8)
  tables = {recipe: table(recipe) for recipe in RECIPES}
  PATH.write_text(json.dumps(tables, indent=1) + '\n')
