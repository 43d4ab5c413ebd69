"""python -m vqrae_jax.preflight --config=configs/simvq_siglip_l.py --topology=v5e:8x8

Compiles a run's train step and `encode_to_indices` for devices that need not be
there (a TPU topology by its name, so many CPU devices, or those of this
machine) and reports what they take. Nothing runs, and no weights are opened.

Memory is the compiler's own analysis; the largest buffers and the collectives
are read from its text. FLOPs and types are those of the program as traced:
products only, bodies of scans times their length, of a `cond` the branch that
costs most, a while loop's body once. There is no such compiler for GPUs that
are not there.
"""

import collections
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags

from vqrae_jax import cli
from vqrae_jax.errors import UserError
from vqrae_jax.files import atomic_write

MODULE = 'vqrae_jax.preflight'
EXAMPLE = (
  f'python -m {MODULE} --config=configs/simvq_siglip_l.py --topology=v5e:8x8'
)
ABOUT = 'the run that is planned; --config.a.b=v changes one of its keys'

MIB, GIB = 2**20, 2**30
# GiB of a device that programs may use: what the compiler of libtpu 0.0.42.1
# names when one needs more (2026-11). Of v4 and TPU7x a device is a core.
HBM = {
  'TPU v4': 15.25, 'TPU v5 lite': 15.75, 'TPU v5': 95.74,
  'TPU v6 lite': 31.25, 'TPU7x': 94.75,
}  # fmt: skip
# An epoch of a recipe whose data is still to be named: ImageNet-1k's. Starts
# and durations are arguments of the step, so that the program is the same.
STAND_IN = 1_281_167


def main(argv: list[str]) -> None:
  """Parses flags, compiles, prints the report."""
  values = cli.parse_config_flag(argv, MODULE, EXAMPLE, ABOUT, _flags)
  cli.required(values, 'config')
  out = values.json and cli.new_file(values.json, '.json', '--json')
  report = preflight(values.config, devices_of(values), values.search)
  report['command'] = f'python -m {MODULE} {" ".join(argv)}'
  print(text_of(report))
  if out:
    with atomic_write(out) as file:
      file.write(json.dumps(report, indent=1).encode())
  if not report['fits']:
    raise UserError(verdict(report))


def _flags(values: flags.FlagValues) -> None:
  text = 'TPUs that need not be there: v5e:8x8, v5p:4x4x4, …; needs libtpu'
  flags.DEFINE_string('topology', None, text, values)
  text = 'so many CPU devices; without both flags the devices of this machine'
  flags.DEFINE_integer('mesh', None, text, lower_bound=1, flag_values=values)
  text = 'where it does not fit, double `accumulate` until it does'
  flags.DEFINE_bool('search', False, text, values)
  flags.DEFINE_string('json', None, 'a file for the report, F.json', values)


def devices_of(values: flags.FlagValues) -> list[Any]:
  """The devices that the flags ask for.

  Raises:
    UserError: both flags, no libtpu, or no such topology.
  """
  import jax

  name, count = values.topology, values.mesh
  if name and count:
    raise UserError(f'--topology={name} and --mesh={count}: give one of them')
  if not (name or count):
    return jax.devices()
  # These have no effect, and raise, once JAX has looked for devices.
  with contextlib.suppress(RuntimeError):
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', count or 1)
  if count:
    if len(found := jax.devices('cpu')) < count:
      raise UserError(f'--mesh={count}: this process has {len(found)} devices')
    return found[:count]
  # Else libtpu asks the network which machine this is.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(name, 'tpu').devices
  except jax.errors.JaxRuntimeError as e:
    right = 'like v5e:8x8 or v5p:4x4x4'
    raise UserError(f'--topology={name}: {e}; it must be {right}') from None
  except RuntimeError:
    raise UserError(
      f'--topology={name} needs libtpu: pip install libtpu'
    ) from None


# ----------------------------------------------------------------------------
# The report.


def preflight(config: Any, devices: list[Any], search: bool = False) -> dict:
  """What a run takes on these devices: plain JSON, sizes in bytes.

  Args:
    config: a ConfigDict or mapping.
    devices: of any process.
    search: double `accumulate` while the step does not fit and each device
      still has an image in each microbatch.

  Raises:
    UserError: a config that cannot run, or data that is not there and has no
      `data.examples`.
  """
  import jax

  from vqrae_jax import sharding
  from vqrae_jax.train import config as config_lib
  from vqrae_jax.train import setup as setup_lib

  run = config_lib.read_config(config)
  mesh = sharding.make_mesh(run.mesh.layout, devices, run.mesh.tensor)
  images, data = _data(run)
  plan = setup_lib.plan(run, images, mesh)
  share = run.batch_size // (mesh.shape['data'] * mesh.shape['fsdp'])
  devices = f'{mesh.size} × {mesh.devices.flat[0].device_kind}'
  tried = {}
  with jax.set_mesh(mesh):
    while True:
      parts = plan.config.accumulate
      what = f'the train step for {devices}, accumulate={parts}'
      step = _train_step(plan, what)
      tried[parts] = step['needs']
      if step['fits'] or not search or share % (2 * parts):
        break
      plan = _accumulating(plan, 2 * parts)
    encode = _encode(plan, devices) if step['fits'] else None
  return {
    'versions': _versions(mesh.devices.flat[0]),
    'devices': devices,
    'hosts': len({d.process_index for d in mesh.devices.flat}),
    'mesh': dict(mesh.shape),
    'data': data,
    'dtype': run.model.get('dtype', 'float32'),
    'batch': {
      'size': run.batch_size,
      'device': share,
      'accumulate': parts,
      'microbatch': share // parts,
    },
    'fits': step['fits'],
    'tried': {str(n): needs for n, needs in tried.items()},
    'train_step': step,
    'encode_to_indices': encode,
  }


def _data(run: Any) -> tuple[int, str]:
  """(images of an epoch, a line on the source)."""
  from vqrae_jax.train import config as config_lib
  from vqrae_jax.train import setup as setup_lib

  source, examples = run.data.source, run.data.examples
  try:
    found = len(setup_lib.open_data(run)[0])
    return found, f'{found} images at {source}'
  except UserError as e:
    if source == config_lib.PLACEHOLDERS['data.source'][0] and not examples:
      return STAND_IN, f'not named yet; {STAND_IN} images stand in for it'
    if not examples:
      raise UserError(
        f'{e}; where there is no data, --config.data.examples says how many '
        'images an epoch has'
      ) from None
    return examples, f'{examples:.0f} images; not found here: {e}'


def _versions(device: Any) -> dict[str, str]:
  import vqrae_jax

  found = {'vqrae_jax': vqrae_jax.__version__}
  for name in ('jax', 'jaxlib', 'flax'):
    found[name] = importlib.metadata.version(name)
  if device.platform == 'tpu':
    built = device.client.platform_version.splitlines()[-1]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      built = importlib.metadata.version('libtpu')
    found['libtpu'] = built
  return found | {'date': datetime.date.today().isoformat()}


def _accumulating(plan: Any, parts: int) -> Any:
  config = dataclasses.replace(plan.config, accumulate=parts)
  step = dataclasses.replace(plan.step, accumulate=parts)
  return dataclasses.replace(plan, config=config, step=step)


def _bytes_on_a_device(tree: Any) -> int:
  """Of ShapeDtypeStructs with shardings."""
  import jax

  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _batch(plan: Any, size: int) -> dict[str, Any]:
  import jax

  from vqrae_jax import sharding

  rows = sharding.batch_sharding(plan.mesh)
  shape = (size, *plan.config.data.size, 3)
  return {
    'images': jax.ShapeDtypeStruct(shape, np.uint8, sharding=rows),
    'skipped': jax.ShapeDtypeStruct(shape[:1], np.int32, sharding=rows),
  }


def _train_step(plan: Any, what: str) -> dict[str, Any]:
  """The report on the step of both networks."""
  from vqrae_jax.train import setup as setup_lib
  from vqrae_jax.train import state as state_lib

  state, frozen = state_lib.state_shapes(plan.step, plan.mesh)
  batch = _batch(plan, plan.config.batch_size)
  arguments = {
    'parameters': state.tokenizer.params,
    'moments': state.tokenizer.opt_state,
    'average': state.ema,
    'frozen': (frozen.params, frozen.losses, frozen.teacher),
    'codebook': state.codebook,
    'discriminator': (state.discriminator, frozen.discriminator),
    'usage window': state.usage,
    'batch': batch,
  }
  hparams = setup_lib.f32(plan.hparams)
  args = state, frozen, hparams, batch
  return {
    **_program(plan, plan.train_step(), args, arguments, what),
    'replicated': _replicated((state, frozen), plan.mesh),
  }


def _encode(plan: Any, devices: str) -> dict[str, Any]:
  """The report on a microbatch's indices, by the baked code table; on its
  latents where there are no codes."""
  import jax

  from vqrae_jax import inference, sharding
  from vqrae_jax.models.tokenizer import variable_shapes
  from vqrae_jax.ops import trees
  from vqrae_jax.train import setup as setup_lib

  tokenizer = plan.tokenizer
  name = 'encode_to_indices' if tokenizer.codebook_size else 'encode'
  method = getattr(inference, name)
  parts = ('encoder', 'latents', 'quantizer')
  leaves = {
    n: x for n, x in variable_shapes(tokenizer).items() if n.split('/')[1] in parts
  }  # fmt: skip
  if 'codebook/quantizer/codes' in leaves:
    leaves.pop('codebook/quantizer/basis', None)
  variables = trees.unflatten(leaves)
  variables = jax.tree.map(
    lambda leaf, place: leaf.update(sharding=place),
    variables, sharding.shardings_for(variables, plan.mesh),
  )  # fmt: skip
  size = plan.config.batch_size // plan.config.accumulate
  batch = _batch(plan, size)['images']
  fn = jax.jit(
    setup_lib.with_rules(lambda v, x: method(tokenizer, v, x)),
    out_shardings=sharding.batch_sharding(plan.mesh),
  )
  codebook = variables.pop('codebook', {})
  arguments = {**variables, 'codebook': codebook, 'batch': batch}
  args = {**variables, 'codebook': codebook}, batch
  return _program(plan, fn, args, arguments, f'{name} for {devices}')


def _program(
  plan: Any, fn: Any, args: tuple, arguments: Mapping[str, Any], what: str
) -> dict[str, Any]:
  """The report on one jitted function, compiled for `plan.mesh`.

  Args:
    arguments: {kind: those of `args` that are of this kind}.
  """
  import jax

  limit = memory_limit(plan.mesh.devices.flat[0])
  began, cpu = time.monotonic(), time.process_time()
  with _progress(f'tracing {what}'):
    traced = fn.trace(*args)
    lowered = traced.lower()
  seconds = {'trace': time.monotonic() - began}
  found = list(products(traced.jaxpr.jaxpr))
  images = jax.tree.leaves(arguments['batch'])[0].shape[0]
  report = {'images': images, 'flops': sum(p.flops for p in found)}
  report['f32_products'] = f32_products(found)
  began, cpu = time.monotonic(), time.process_time()
  compiled = failed = None
  with _progress(f'compiling {what}'):
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
      if (failed := exhausted(str(e))) is None:
        raise
  seconds['compile'] = time.monotonic() - began
  seconds['compile_cpu'] = time.process_time() - cpu
  report['seconds'] = {k: round(x, 1) for k, x in seconds.items()}
  kinds = {k: _bytes_on_a_device(tree) for k, tree in arguments.items()}
  if compiled is None:
    needs, limit, buffers = failed
    report |= {'memory': kinds, 'buffers': buffers, 'collectives': {}}
  else:
    stats, text = compiled.memory_analysis(), compiled.as_text()
    kinds['padding, numbers'] = stats.argument_size_in_bytes - sum(
      kinds.values()
    )
    kinds['results'] = stats.output_size_in_bytes - stats.alias_size_in_bytes
    kinds['temporaries'] = stats.temp_size_in_bytes
    kinds['code'] = stats.generated_code_size_in_bytes
    needs = sum(kinds.values())
    program = list(executed(text))
    report |= {
      'memory': kinds,
      'buffers': buffers_of(program)[:10],
      'collectives': collectives_of(program),
    }
  fits = limit is None or needs <= limit
  return report | {'needs': needs, 'limit': limit, 'fits': fits}


def _replicated(tree: Any, mesh: Any) -> dict[str, Any]:
  """Leaves that lie on every device although the layout shards."""
  from vqrae_jax.ops import trees

  sizes = {
    name: _bytes_on_a_device(leaf)
    for name, leaf in trees.flatten(tree).items()
    if leaf.sharding.is_fully_replicated
  }
  if mesh.shape['fsdp'] * mesh.shape['model'] == 1:
    sizes = {}
  largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
  return {
    'leaves': len(sizes),
    'bytes': sum(sizes.values()),
    'largest': [{'name': n, 'bytes': size} for n, size in largest],
  }


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
  """Says on stderr what takes so long, and every 20 s how long so far."""
  done, began = threading.Event(), time.monotonic()
  end = '\r' if sys.stderr.isatty() else '\n'

  def tell(end):
    seconds = time.monotonic() - began
    print(f'{what} … {seconds:.0f} s', end=end, file=sys.stderr, flush=True)

  def wait():
    while not done.wait(20):
      tell(end)

  thread = threading.Thread(target=wait, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    tell('\n')


# ----------------------------------------------------------------------------
# Memory, from what the compiler says.


def memory_limit(device: Any) -> int | None:
  """Bytes that a program may use of a device; None where nobody says."""
  import jax

  stats = None
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # it is not there
    stats = device.memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit']
  known = HBM.get(device.device_kind)
  return known and int(known * GIB)


_SIZE = r'([\d.]+)([KMGT]?)'
_NEEDS = (
  rf'HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)',
  rf'Used {_SIZE} of {_SIZE} hbm',
)
_ALLOCATION = re.compile(
  rf'Size: {_SIZE}\s+(?:Operator: op_name="([^"]*)".*\s+)?Shape: (\w+\[[\d,]*\])'
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
# The compiled program's text.

_HEADER = re.compile(r'^(ENTRY )?%?([\w.-]+) .*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$')
_CALLED = re.compile(
  r'(body|condition|calls|to_apply|branch_computations|\w+_computation)='
  r'\{?(%?[\w.-]+(?:, %?[\w.-]+)*)'
)
_ARRAY = re.compile(r'\b(pred|[a-z]+\d\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_COLLECTIVES = (
  'all-gather', 'all-reduce', 'all-to-all', 'collective-permute',
  'collective-broadcast', 'ragged-all-to-all', 'reduce-scatter',
)  # fmt: skip
# Results that are no buffers of their own.
_VIEWS = {
  'after-all', 'bitcast', 'call', 'conditional', 'constant', 'domain',
  'get-tuple-element', 'opt-barrier', 'parameter', 'tuple', 'while',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name, kind: "fusion.3", "all-reduce".
    result: its type as written, a tuple's in parentheses.
    rest: what follows: operands, attributes, metadata.
    operands: bytes of the operands, unpadded.
    times: how often it runs in one call of the program.
    owns: whether its result is a buffer of its own: not inside a fusion, and
      not what the program returns.
  """

  name: str
  kind: str
  result: str
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
      yield dataclasses.replace(
        row, operands=operands, times=times, owns=mine
      )
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
    name = named[1].partition('/')[2] if named else f'({row.kind})'
    arrays = _ARRAY.findall(row.result)
    for (dtype, shape, _), size in zip(
      arrays, sizes(row.result, padded=True), strict=True
    ):
      rows[size, f'{dtype}[{shape}]', name] += 1
  return [
    {'bytes': size, 'count': rows[size, shape, name], 'shape': shape, 'name': name}
    for size, shape, name in sorted(rows, key=lambda row: (-row[0], *row[1:]))
  ]  # fmt: skip


def collectives_of(program: list[Instruction]) -> dict[str, dict[str, int]]:
  """{kind: {"count", "bytes"}} of one call, on one device: of each the larger
  of what goes in and what comes out."""
  found: dict[str, dict[str, int]] = {}
  for row in program:
    kind = row.kind.removesuffix('-start')
    if kind not in _COLLECTIVES:
      continue
    result = sum(sizes(row.result))
    if kind != row.kind and kind != 'all-reduce':  # a start gives both
      result -= row.operands
    sums = found.setdefault(kind, {'count': 0, 'bytes': 0})
    sums['count'] += row.times
    sums['bytes'] += row.times * max(result, row.operands)
  return dict(sorted(found.items()))


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


# What transformations and control flow add to a name stack.
_STRUCTURE = {
  'body', 'checkpoint', 'closed_call', 'cond', 'rematted_computation', 'while',
}  # fmt: skip


def _where(stack: str) -> str:
  names = re.sub(r'\w*\(|\)', '', stack).split('/')
  kept = [n for n in names if n and n not in _STRUCTURE and not set('.,') & {*n}]
  return '/'.join(dict.fromkeys(kept))


def _file(eqn: Any) -> str:
  """Where the package writes it, below the package."""
  home = f'{os.sep}vqrae_jax{os.sep}'
  for frame in eqn.source_info.traceback.frames:
    if home in frame.file_name:
      return frame.file_name.rpartition(home)[2].replace(os.sep, '/')
  return ''


def _flops(eqn: Any) -> float:
  left, right = (v.aval for v in eqn.invars)
  (out,) = (v.aval for v in eqn.outvars)
  if eqn.primitive.name == 'dot_general':
    (contracted, _), _ = eqn.params['dimension_numbers']
    return 2.0 * math.prod(out.shape) * math.prod(
      left.shape[i] for i in contracted
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
  jaxpr: Any, stack: str = '', times: float = 1
) -> Iterator[Product]:
  """The products of a jaxpr and of all within it, over all devices."""
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
      list(products(j, here, repeats)) for value in p.values()
      for j in _jaxprs(value)
    ]  # fmt: skip
    if name == 'cond':
      inner = [max(inner, key=lambda found: sum(f.flops for f in found))]
    for found in inner:
      yield from found


def _jaxprs(value: Any) -> Iterator[Any]:
  """Those in a parameter of an equation."""
  for each in value if isinstance(value, tuple | list) else (value,):
    each = getattr(each, 'jaxpr', each)  # a closed one
    if hasattr(each, 'eqns'):
      yield each


# What computes in f32 whatever the run's dtype (docs/architecture.md,
# invariant 11), and the power iteration of spectral norm.
F32_BY_DESIGN = ('quantizers/', 'losses/', 'ops/', 'nn/spectral.py')


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


# ----------------------------------------------------------------------------
# The report as text.


def _table(rows: list[tuple], indent: int) -> list[str]:
  """Rows of words, the last column free, numbers to the right."""
  if not rows:
    return []
  columns = list(zip(*rows, strict=True))
  widths = [max(len(str(cell)) for cell in column) for column in columns]
  lines = []
  for row in rows:
    cells = [
      f'{cell:{">" if str(cell)[:1].isdigit() else "<"}{width}}'
      for cell, width in zip(map(str, row[:-1]), widths[:-1], strict=True)
    ]
    lines.append((' ' * indent + '  '.join([*cells, str(row[-1])])).rstrip())
  return lines


def _mib(size: float) -> str:
  return f'{size / MIB:,.1f}'


def verdict(report: Mapping[str, Any]) -> str:
  """One line with the figure."""
  step, batch = report['train_step'], report['batch']
  at = f'accumulate={batch["accumulate"]}, {batch["microbatch"]} images at once'
  if step['limit'] is None:
    return f'{step["needs"] / GIB:.2f} GiB a device ({at}); no limit is known'
  return (
    f'the train step {"fits" if report["fits"] else "does not fit"}: it needs '
    f'{step["needs"] / GIB:.2f} of {step["limit"] / GIB:.2f} GiB on each of '
    f'{report["devices"]} ({at})'
  )


def text_of(report: Mapping[str, Any]) -> str:
  """The report for a terminal."""
  batch, mesh = report['batch'], report['mesh']
  versions = report['versions'].items()
  lines = _table(
    [
      ('versions', ', '.join(f'{k} {v}' for k, v in versions)),
      ('devices', f'{report["devices"]}, hosts: {report["hosts"]}'),
      ('mesh', ', '.join(f'{k}={n}' for k, n in mesh.items())),
      ('data', report['data']),
      (
        'batch',
        f'{batch["size"]}: {batch["device"]} a device, {batch["microbatch"]} '
        f'at once (accumulate={batch["accumulate"]})',
      ),
      *(
        ('tried', f'accumulate={n} needs {needs / GIB:.2f} GiB')
        for n, needs in report['tried'].items() if len(report['tried']) > 1
      ),
    ],
    0,
  )  # fmt: skip
  for name in ('train_step', 'encode_to_indices'):
    if report[name] is not None:
      lines += ['', *_program_lines(name, report[name], report['dtype'])]
  return '\n'.join([*lines, '', verdict(report)])


def _program_lines(
  name: str, program: Mapping[str, Any], dtype: str
) -> list[str]:
  seconds, images = program['seconds'], program['images']
  lines = [
    f'{name} of {images} images: traced in {seconds["trace"]:.0f} s, compiled '
    f'in {seconds["compile"]:.0f} s ({seconds["compile_cpu"]:.0f} CPU-s)'
  ]
  kinds = [(k, _mib(size), '') for k, size in program['memory'].items()]
  limit = program['limit'] and f'of {_mib(program["limit"])}'
  kinds.append(('total', _mib(program['needs']), limit or ''))
  lines += ['  memory of a device, MiB', *_table(kinds, 4)]
  rows = [
    (_mib(b['bytes']), f'{b["count"]} ×', b['shape'], b['name'])
    for b in program['buffers']
  ]
  if rows:
    lines += ['  largest temporaries, MiB', *_table(rows, 4)]
  flops = program['flops']
  lines.append(f'  FLOPs  {flops:.3e}, {flops / images:.3e} an image')
  rows = [
    (kind, sums['count'], _mib(sums['bytes']), 'MiB')
    for kind, sums in program['collectives'].items()
  ]
  if rows:
    lines += ['  collectives of a device', *_table(rows, 4)]
  for meant, title in (
    (False, f'f32 products where {dtype} is meant'),
    (True, 'f32 products by design'),
  ):
    rows = [
      (f'{p["share"]:.2%}', p['file'], p['where'])
      for p in program['f32_products'] if p['meant'] == meant
    ]  # fmt: skip
    if rows and dtype != 'float32':
      lines += [f'  {title}, share of FLOPs', *_table(rows[:10], 4)]
  if (held := program.get('replicated')) and held['leaves']:
    lines.append(
      f'  on every device: {held["leaves"]} leaves, {_mib(held["bytes"])} MiB'
    )
    rows = [(_mib(leaf['bytes']), leaf['name']) for leaf in held['largest']]
    lines += _table(rows, 4)
  return lines


if __name__ == '__main__':
  cli.run(main)
