"""What a program costs, read from it: nothing runs.

Of a compiled program its text: the buffers it makes and its collectives, those
of a loop's body as often as it runs; of one that does not fit the compiler's
error. Of a traced one its products: FLOPs, and
whether they are f32. Bodies of scans count times their length, of a `cond` the
branch that costs most, a while loop's body once.
"""

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

# The compiled program's text.

_HEADER = re.compile(r'^(ENTRY )?%?([\w.-]+) .*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$')
_CALLED = re.compile(
  r'(body|condition|calls|to_apply|branch_computations|\w+_computation)='
  r'\{?(%[\w.-]+(?:, %[\w.-]+)*)'
)
_ARRAY = re.compile(r'\b(pred|[a-z]+\d\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_COLLECTIVES = (
  'all-gather', 'all-reduce', 'all-to-all', 'collective-permute',
  'collective-broadcast', 'ragged-all-to-all', 'reduce-scatter',
)  # fmt: skip
# What control flow adds to the names of operations.
_STRUCTURE = {
  'body', 'checkpoint', 'closed_call', 'cond', 'rematted_computation', 'while',
}  # fmt: skip
# Results that are no buffers of their own.
_VIEWS = {
  'after-all', 'bitcast', 'call', 'conditional', 'constant', 'domain',
  'get-tuple-element', 'opt-barrier', 'parameter', 'tuple', 'while',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: "fusion.3".
    result: its type as written, a tuple's in parentheses.
    kind: "fusion".
    rest: what follows: operands, attributes, metadata.
    operands: bytes of the operands, unpadded.
    times: how often it runs in one call of the program.
    owns: whether its result is a buffer of its own: not inside a fusion, and
      not what the program returns.
  """

  name: str
  result: str
  kind: str
  rest: str
  operands: int = 0
  times: int = 1
  owns: bool = True


def executed(text: str) -> Iterator[Instruction]:
  """All instructions that the optimized program runs, of every computation
  that it enters."""
  computations: dict[str, list[Instruction]] = {}
  entry = returned = ''
  rows: list[Instruction] = []
  for line in text.splitlines():
    if header := _HEADER.match(line):
      rows = computations[header[2]] = []
      entry = header[2] if header[1] else entry
    elif found := _LINE.match(line):
      rows.append(Instruction(*found.groups()[1:]))
      if found[1] and entry and rows is computations[entry]:
        returned = found[5]
  outputs = set(re.findall(r'%?([\w.-]+)', returned.partition(')')[0]))

  def trips(loop, condition):
    if known := re.search(r'known_trip_count\D+(\d+)', loop.rest):
      return int(known[1])
    # A scan's condition compares its counter with one constant.
    bounds = {
      row.rest.partition(')')[0]
      for row in computations[condition]
      if row.kind == 'constant' and row.result.startswith(('s32[]', 's64[]'))
    }
    return int(bounds.pop()) if len(bounds) == 1 else 1

  def walk(name, times, owns):
    rows = {row.name: row for row in computations[name]}
    for row in rows.values():
      words = re.findall(r'%([\w.-]+)', row.rest.partition(')')[0])
      operands = sum(
        n for w in words if w in rows for n in sizes(rows[w].result)
      )
      mine = owns and row.kind not in _VIEWS and row.name not in outputs
      yield dataclasses.replace(row, operands=operands, times=times, owns=mine)
      if row.kind.endswith(('-done', '-update')):
        continue  # its computation is the start's
      called = [
        (how, n.lstrip('%')) for how, names in _CALLED.findall(row.rest)
        for n in names.split(', ')
      ]  # fmt: skip
      repeats = 1
      if row.kind == 'while':
        repeats = trips(row, dict(called)['condition'])
      inner = owns and row.kind in ('while', 'conditional', 'call')
      for _, other in called:
        yield from walk(other, times * repeats, inner)

  yield from walk(entry, 1, True)


def sizes(result: str, padded: bool = False) -> list[int]:
  """Bytes of each array of a type, as written or as its tiles lie in memory;
  0 then for those that are not in the device's main memory."""
  found = []
  for dtype, shape, layout in _ARRAY.findall(result):
    bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
    dims = [int(n) for n in shape.split(',') if n]
    if padded:
      order, _, tiles = layout.partition(':')
      dims = [dims[int(i)] for i in reversed(order.split(',')) if i]
      if tile := re.search(r'T\(([\d,]+)\)', tiles):
        tile = [int(n) for n in tile[1].split(',')]
        dims = [1] * (len(tile) - len(dims)) + dims
        last = range(len(dims) - len(tile), len(dims))
        for i, n in zip(last, tile, strict=True):
          dims[i] = -(-dims[i] // n) * n
      if re.search(r'S\([1-9]', tiles):
        dims = [0]
    found.append(-(-math.prod(dims) * bits // 8))
  return found


def buffers_of(program: list[Instruction]) -> list[dict[str, Any]]:
  """Temporaries by size, largest first: those of one shape that one operation
  of the model makes are a row. They need not all be live at once."""
  rows: collections.Counter = collections.Counter()
  for row in program:
    if not row.owns or row.kind.endswith('-start'):
      continue
    named = re.search(r'op_name="([^"]*)"', row.rest)
    name = f'({row.kind})'
    if named:
      scopes = named[1].split('/')[1:]
      name = '/'.join(n for n in scopes if n not in _STRUCTURE)
    arrays = _ARRAY.findall(row.result)
    for (dtype, shape, _), size in zip(
      arrays, sizes(row.result, padded=True), strict=True
    ):
      rows[size, f'{dtype}[{shape}]', name] += 1
  return [
    {'bytes': row[0], 'count': rows[row], 'shape': row[1], 'name': row[2]}
    for row in sorted(rows, key=lambda row: (-row[0], *row[1:]))
  ]


def collectives_of(program: list[Instruction]) -> dict[str, dict[str, int]]:
  """{kind: {"count", "bytes"}} of one call, on one device: of each the larger
  of what goes in and what comes out."""
  rows: dict[Any, Instruction] = {}
  for row in program:
    if row.kind.removesuffix('-start') in _COLLECTIVES:
      channel = re.search(r'channel_id=(\d+)', row.rest)
      # One that overlaps other work is written in every fusion that it runs
      # beside; the first, which starts it, is outside the loops of the others.
      key = channel[1] if channel and not row.owns else -len(rows)
      rows[key] = min(row, rows.get(key, row), key=lambda row: row.times)
  found: dict[str, dict[str, int]] = {}
  for row in rows.values():
    kind, result = row.kind.removesuffix('-start'), sum(sizes(row.result))
    if kind != row.kind and kind != 'all-reduce':  # a start gives both
      result -= row.operands
    sums = found.setdefault(kind, {'count': 0, 'bytes': 0})
    sums['count'] += row.times
    sums['bytes'] += row.times * max(result, row.operands)
  return dict(sorted(found.items()))


_SIZE = r'([\d.]+)([KMGT]?)'
_NEEDS = (
  rf'HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)',
  rf'Used {_SIZE} of {_SIZE} hbm',
)
_ALLOCATION = re.compile(
  rf'Size: {_SIZE}\s+(?:Operator: op_name="([^"]*)".*\s+)?'
  r'Shape: (\w+\[[\d,]*\])'
)


def exhausted(message: str) -> tuple[int, int, list[dict]] | None:
  """(bytes needed, bytes there, the largest buffers) that the TPU compiler's
  error names, which may list no buffers; None for any other error."""

  def size(number, unit):
    return int(float(number) * 1024 ** ' KMGT'.index(unit or ' '))

  for pattern in _NEEDS:
    if found := re.search(pattern, message):
      break
  else:
    return None
  largest = [
    {'bytes': size(*row[:2]), 'count': 1, 'shape': row[3], 'name': row[2]}
    for row in _ALLOCATION.findall(message)
  ]
  return size(*found.groups()[:2]), size(*found.groups()[2:]), largest[:10]


# ----------------------------------------------------------------------------
# The traced program.


@dataclasses.dataclass(frozen=True)
class Product:
  """A `dot_general` or convolution, all its repetitions together.

  Attributes:
    where: the modules around it, "decoder/transformer/blocks/mlp".
    file: where the package writes it, "nn/vit.py".
    flops: two per multiply-add; a convolution's padding is left out.
    f32: whether an operand is f32.
  """

  where: str
  file: str
  flops: float
  f32: bool


_PACKAGE = pathlib.Path(__file__).resolve().parent


def _where(stack: str) -> str:
  names = re.sub(r'\w*\(|\)', '', stack).split('/')
  kept = [
    n for n in names if n and n not in _STRUCTURE and not set('.,') & {*n}
  ]
  return '/'.join(dict.fromkeys(kept))


def _file(eqn: Any) -> str:
  """Where the package writes it, below the package."""
  for frame in eqn.source_info.traceback.frames:
    file = pathlib.PurePath(frame.file_name)
    if file.is_relative_to(_PACKAGE):
      return file.relative_to(_PACKAGE).as_posix()
  return ''


def _flops(eqn: Any) -> float:
  left, right = (v.aval for v in eqn.invars)
  (out,) = (v.aval for v in eqn.outvars)
  if eqn.primitive.name == 'dot_general':
    (contracted, _), _ = eqn.params['dimension_numbers']
    return (
      2.0 * math.prod(out.shape) * math.prod(left.shape[i] for i in contracted)
    )
  p = eqn.params
  dims = p['dimension_numbers']
  outer = math.prod(out.shape[i] for i in dims.out_spec[:2])
  total = 2.0 * outer * right.shape[dims.rhs_spec[1]]
  for axis, (low, _) in enumerate(p['padding']):
    n, k, m = (
      x.shape[spec[2 + axis]]
      for x, spec in (
        (left, dims.lhs_spec), (right, dims.rhs_spec), (out, dims.out_spec)
      )
    )  # fmt: skip
    step, hole = p['window_strides'][axis], p['lhs_dilation'][axis]
    at = np.arange(m)[:, None] * step - low
    at = at + np.arange(k) * p['rhs_dilation'][axis]
    met = (at >= 0) & (at <= (n - 1) * hole) & (at % hole == 0)
    total *= int(met.sum())
  return total


def products(
  jaxpr: Any, platform: str = '', stack: str = '', times: float = 1
) -> Iterator[Product]:
  """The products of a jaxpr and of all within it, over all devices of a
  platform: "cpu", "cuda", "tpu"."""
  for eqn in jaxpr.eqns:
    name, p = eqn.primitive.name, eqn.params
    here = f'{stack}/{eqn.source_info.name_stack}'
    if name in ('dot_general', 'conv_general_dilated'):
      f32 = any(v.aval.dtype == np.float32 for v in eqn.invars)
      yield Product(_where(here), _file(eqn), times * _flops(eqn), f32)
      continue
    repeats = times * p['length'] if name == 'scan' else times
    if name == 'shard_map':
      repeats *= math.prod(p['mesh'].shape[a] for a in p['newly_manual_axes'])
    if name == 'pallas_call':
      repeats *= math.prod(p['grid_mapping'].grid)
    inner = [
      list(products(j, platform, here, repeats)) for value in p.values()
      for j in _jaxprs(value)
    ]  # fmt: skip
    if name == 'cond':
      inner = [_branch(inner, p.get('branches_platforms'), platform)]
    for found in inner:
      yield from found


def _branch(
  branches: list[list[Product]],
  platforms: tuple[tuple[str, ...] | None, ...] | None,
  platform: str,
) -> list[Product]:
  """The products of the branch that costs most, or of the platform's own. One
  that is a library's kernel has those of the others, in its inputs' dtype."""
  most = max(branches, key=lambda found: sum(f.flops for f in found))
  if not platforms:
    return most
  taken = [
    found for names, found in zip(platforms, branches, strict=True)
    if names is None or platform in names
  ] or [most]  # fmt: skip
  return taken[0] or [dataclasses.replace(f, f32=False) for f in most]


def _jaxprs(value: Any) -> Iterator[Any]:
  """Those in a parameter of an equation."""
  for each in value if isinstance(value, tuple | list) else (value,):
    each = getattr(each, 'jaxpr', each)  # a closed one
    if hasattr(each, 'eqns'):
      yield each


# What computes in f32 whatever the run's dtype (docs/architecture.md,
# invariant 11), and the power iteration of spectral norm.
F32_BY_DESIGN = (
  'quantizers/', 'losses/', 'ops/codes.py', 'ops/nearest.py', 'ops/images.py',
  'ops/posemb.py', 'nn/spectral.py', 'optim.py',
)  # fmt: skip


def f32_products(found: list[Product]) -> list[dict[str, Any]]:
  """Products with an f32 operand by the modules around them, the most FLOPs
  first; `meant` where they are f32 by design."""
  rows: collections.Counter = collections.Counter()
  for product in found:
    if product.f32:
      rows[product.where, product.file] += product.flops
  total = sum(p.flops for p in found) or 1.0
  return [
    {
      'where': where, 'file': file, 'share': flops / total,
      'meant': file.startswith(F32_BY_DESIGN),
    }
    for (where, file), flops in rows.most_common()
  ]  # fmt: skip
