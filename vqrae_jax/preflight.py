"""python -m vqrae_jax.preflight --config=F.py [--topology=v5e:8x8 | --mesh=8]

Compiles a run's train step and `encode_to_indices` for devices that you need
not have (TPUs or GPUs by their names, a number of CPU devices, or those of this
machine) and reports what they need. Nothing runs, and no weights are opened.

Memory is the compiler's own analysis; `programs.py` says what the other
figures are. On GPUs that are not there no algorithms can be timed: the
compiler takes cuBLAS's products and cuDNN's convolutions, and what the latter
need beside their results is not counted.
"""

import contextlib
import dataclasses
import datetime
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies

from vqrae_jax import cli, inference, programs, sharding
from vqrae_jax.errors import UserError
from vqrae_jax.files import write_json
from vqrae_jax.models.tokenizer import variable_shapes
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import setup as setup_lib
from vqrae_jax.train import state as state_lib

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
# name: (its kind, GiB, compute capability, multiprocessors, f32 units and KiB
# of shared memory of each, MiB of cache, GB/s, GHz), of the SXM modules.
GPUS = {
  'a100': ('NVIDIA A100-SXM4-80GB', 79.1, 8, 108, 64, 164, 40, 2039, 1.41),
  'h100': ('NVIDIA H100 80GB HBM3', 79.1, 9, 132, 128, 228, 50, 3352, 1.98),
  'h200': ('NVIDIA H200', 139.8, 9, 132, 128, 228, 50, 4800, 1.98),
}
TOPOLOGIES = 'v5e:8x8, v5p:4x4x4, …, h100:8 or h100:4x8 (a100, h100, h200)'
# Of those recorded, what decides the figures.
VERSIONS = 'vqrae_jax', 'jax', *cli.COMPILERS, 'date'
# The share of a GPU that JAX takes by default, as its own variables say.
SHARES = 'XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'
# An epoch of a recipe whose data is still to be named: ImageNet-1k's. Starts
# and durations are arguments of the step, so that the program is the same.
STAND_IN = 1_281_167


def main(argv: list[str]) -> None:
  """Parses flags, compiles, prints the report."""
  values = cli.parse_config_flag(argv, MODULE, EXAMPLE, ABOUT, define)
  cli.required(values, 'config')
  out = values.json and cli.new_file(values.json, '.json', '--json')
  report = preflight(values.config, devices_of(values), values.search)
  report['command'] = f'python -m {MODULE} {" ".join(argv)}'
  print(text_of(report))
  if out:
    write_json(out, report)
  if not report['fits']:
    raise UserError(verdict(report))


def define(values: flags.FlagValues) -> None:
  """The command's flags but --config."""
  text = (
    'devices: TPUs as v5e:8x8 (needs libtpu, but no TPU), GPUs as h100:8, or '
    'h100:4x8 of 4 hosts (needs the extra cuda12 or cuda13, but no GPU)'
  )
  flags.DEFINE_string('topology', None, text, values)
  text = 'a number of CPU devices; default: the devices of this machine'
  flags.DEFINE_integer('mesh', None, text, lower_bound=1, flag_values=values)
  text = 'if the step does not fit, double `accumulate` until it does'
  flags.DEFINE_bool('search', False, text, values)
  flags.DEFINE_string('json', None, 'a file for the report, F.json', values)


def devices_of(values: flags.FlagValues) -> list[Any]:
  """The devices that the flags ask for.

  Raises:
    UserError: both flags, no compiler for the devices, or no such topology.
  """
  name, count = values.topology, values.mesh
  if name and count:
    raise UserError(f'give either --topology={name} or --mesh={count}')
  if not (name or count):
    return jax.devices()
  jax.config.update('jax_platforms', 'cpu')
  if count:
    with contextlib.suppress(RuntimeError):  # JAX has looked for devices
      jax.config.update('jax_num_cpu_devices', count)
    if len(found := jax.devices('cpu')) < count:
      raise UserError(f'--mesh={count}: this process has {len(found)} devices')
    return found[:count]
  if name.partition(':')[0] in GPUS:
    return gpus(name)
  if not re.match(r'v\d|tpu', name):
    raise UserError(f'--topology={name} must be as {TOPOLOGIES}')
  # Else libtpu asks the network which machine this is.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
  try:
    return topologies.get_topology_desc(name, 'tpu').devices
  except jax.errors.JaxRuntimeError as e:
    raise UserError(f'--topology={name}: {e}; as {TOPOLOGIES}') from None
  except RuntimeError:
    raise UserError(
      f'--topology={name} needs libtpu: pip install libtpu'
    ) from None


def gpus(name: str) -> list[Any]:
  """GPUs of `GPUS`: "h100:8" of one host or "h100:4x8" of four.

  Raises:
    UserError: another shape, or no JAX for CUDA.
  """
  if not (found := re.fullmatch(r'(\w+):(?:([1-9]\d*)x)?([1-9]\d*)', name)):
    raise UserError(f'--topology={name} must be as {TOPOLOGIES}')
  kind, size, capability, cores, units, shared, cache, speed, clock = GPUS[
    found[1]
  ]
  try:
    return topologies.get_topology_desc(
      '', 'cuda', topology=f'1x{found[2] or 1}x{found[3]}',
      target_config=f"""
        platform_name: "CUDA"
        device_description_str: "{kind}"
        dnn_version_info {{ major: 9 minor: 8 }}
        runtime_version {{ major: 12 minor: 9 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {capability} }}
          core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
          memory_bandwidth: {speed}000000000
          device_memory_size: {int(size * GIB)} l2_cache_size: {cache * MIB}
          shared_memory_per_core: {shared << 10}
          shared_memory_per_block_optin: {shared - 1 << 10}
          shared_memory_per_block: 49152
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          threads_per_core_limit: 2048 threads_per_block_limit: 1024
          threads_per_warp: 32 device_address_bits: 64
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
          thread_dim_limit_z: 64 block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}
      """,
    ).devices  # fmt: skip
  except NotImplementedError:
    raise UserError(
      f'--topology={name} needs JAX for CUDA, but no GPU: '
      "pip install 'vqrae_jax[cuda12]'"
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
  run = config_lib.read_config(config)
  mesh = sharding.make_mesh(run.mesh.layout, devices, run.mesh.tensor)
  images, data = _data(run)
  plan = setup_lib.plan(run, images, mesh)
  share = run.batch_size // (mesh.shape['data'] * mesh.shape['fsdp'])
  tried = {}
  while True:
    parts = plan.config.accumulate
    step = _train_step(plan)
    tried[parts] = step['needs']
    if step['fits'] or not search or share % (2 * parts):
      break
    plan = _accumulating(plan, 2 * parts)
  encode = _encode(plan) if step['fits'] else None
  device = mesh.devices.flat[0]
  versions = cli.versions() | {'date': datetime.date.today().isoformat()}
  if device.platform == 'tpu':  # where libtpu may be no package
    theirs = device.client.platform_version.splitlines()[-1]
    versions.setdefault('libtpu', theirs)
  return {
    'versions': versions,
    'devices': _devices(mesh),
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
    'encode': encode,
  }


def _data(run: config_lib.RunConfig) -> tuple[int, str]:
  """(images of an epoch, a line on the source)."""
  source, examples = run.data.source, run.data.examples
  try:
    found = setup_lib.open_images(run, 'data')
  except UserError as e:
    if source == config_lib.PLACEHOLDERS['data.source'][0] and not examples:
      return STAND_IN, f'not named yet; {STAND_IN} images stand in for it'
    if not examples:
      raise UserError(
        f'{e}; without the data, set --config.data.examples to the number of '
        'images in an epoch'
      ) from None
    return examples, f'{examples:.0f} images; not found here: {e}'
  line = f'{len(found)} images at {source}'
  try:
    setup_lib.open_held_out(run, found)
  except UserError as e:
    if not examples:
      raise
    line += f'; not found here: {e}'
  return len(found), line


def _devices(mesh: jax.sharding.Mesh) -> str:
  return f'{mesh.size} × {mesh.devices.flat[0].device_kind}'


def _accumulating(plan: setup_lib.Plan, parts: int) -> setup_lib.Plan:
  config = dataclasses.replace(plan.config, accumulate=parts)
  step = dataclasses.replace(plan.step, accumulate=parts)
  return dataclasses.replace(plan, config=config, step=step)


def _bytes_on_a_device(tree: Any) -> int:
  """Of ShapeDtypeStructs with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _images(plan: setup_lib.Plan, size: int) -> jax.ShapeDtypeStruct:
  shape = (size, *plan.config.data.size, 3)
  rows = sharding.batch_sharding(plan.mesh)
  return jax.ShapeDtypeStruct(shape, np.uint8, sharding=rows)


def _train_step(plan: setup_lib.Plan) -> dict[str, Any]:
  """The report on the step of both networks."""
  state, frozen = state_lib.state_shapes(plan.step, plan.mesh)
  images = _images(plan, plan.config.batch_size)
  skipped = images.update(shape=images.shape[:1], dtype=np.int32)
  arguments = {
    'parameters': state.tokenizer.params,
    'moments': state.tokenizer.opt_state,
    'EMA weights': state.ema,
    'frozen': (frozen.params, frozen.losses, frozen.teacher),
    'codebook': state.codebook,
    'discriminator': (state.discriminator, frozen.discriminator),
    'usage window': state.usage,
    'batch': images,
  }
  batch = {'images': images, 'skipped': skipped}
  args = state, frozen, setup_lib.f32(plan.hparams), batch
  return {
    **_program(plan, 'train_step', plan.train_step(), args, arguments),
    'replicated': _replicated(dict(state=state, frozen=frozen), plan.mesh),
  }


def _encode(plan: setup_lib.Plan) -> dict[str, Any]:
  """The report on a microbatch's indices, by the baked code table; on its
  latents where there are no codes."""
  tokenizer = plan.tokenizer
  name = 'encode_to_indices' if tokenizer.codebook_size else 'encode'
  method = getattr(inference, name)
  parts = ('encoder', 'fusion', 'latents', 'quantizer')
  leaves = {
    n: leaf
    for n, leaf in variable_shapes(tokenizer).items()
    if n.split('/')[1] in parts
  }
  for leaf in [n for n in leaves if n.endswith('/codes')]:
    leaves.pop(f'{leaf.removesuffix("codes")}basis', None)
  variables = trees.unflatten(leaves)
  variables = jax.tree.map(
    lambda leaf, place: leaf.update(sharding=place),
    variables, sharding.shardings_for(variables, plan.mesh),
  )  # fmt: skip
  size = plan.config.batch_size // plan.config.accumulate
  batch = _images(plan, size)
  fn = jax.jit(
    setup_lib.with_rules(lambda v, x: method(tokenizer, v, x)),
    out_shardings=sharding.batch_sharding(plan.mesh),
  )
  arguments = {
    'parameters': variables['params'],
    'codebook': variables.get('codebook'),
    'batch': batch,
  }
  return _program(plan, name, fn, (variables, batch), arguments)


def _program(
  plan: setup_lib.Plan,
  name: str,
  fn: Any,
  args: tuple,
  arguments: Mapping[str, Any],
) -> dict[str, Any]:
  """The report on one jitted function, compiled for `plan.mesh`.

  Args:
    plan: what is compiled for.
    name: the function's.
    fn, args: it, and ShapeDtypeStructs with shardings.
    arguments: {kind: those of `args` that are of this kind}.
  """
  what = (
    f'{name} for {_devices(plan.mesh)}, accumulate={plan.config.accumulate}'
  )
  # Not around more: an operation would run on devices that are not there.
  with _progress(f'tracing {what}') as tracing, jax.set_mesh(plan.mesh):
    traced = fn.trace(*args)
    lowered = traced.lower()
  device, options = plan.mesh.devices.flat[0], {}
  platform = 'cuda' if device.platform == 'gpu' else device.platform
  if platform == 'cuda' and device not in jax.devices():
    # Where none can be timed XLA takes tiles that some products do not fit.
    options['xla_gpu_enable_triton_gemm'] = False
  found = list(programs.products(traced.jaxpr.jaxpr, platform))
  memory = {k: _bytes_on_a_device(tree) for k, tree in arguments.items()}
  limit, text = memory_limit(device), ''
  with _progress(f'compiling {what}') as compiling:
    try:
      compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as e:
      if (failed := programs.exhausted(str(e))) is None:
        raise
      needs, limit, buffers = failed
    else:
      stats, text = compiled.memory_analysis(), compiled.as_text()
      given = sum(memory.values())
      memory |= {
        'padding, scalars': stats.argument_size_in_bytes - given,
        'results': stats.output_size_in_bytes - stats.alias_size_in_bytes,
        'temporaries': stats.temp_size_in_bytes,
        'code': stats.generated_code_size_in_bytes,
      }
      needs = sum(memory.values())
  program = list(programs.executed(text)) if text else []
  return {
    'name': name,
    'images': arguments['batch'].shape[0],
    'seconds': {
      'trace': tracing['wall'],
      'compile': compiling['wall'],
      'compile_cpu': compiling['cpu'],
    },
    'memory': memory,
    'needs': needs,
    'limit': limit,
    'fits': limit is None or needs <= limit,
    'buffers': programs.buffers_of(program)[:10] if text else buffers,
    'flops': sum(p.flops for p in found),
    'collectives': programs.collectives_of(program),
    'f32_products': programs.f32_products(found),
  }


def _replicated(tree: Any, mesh: Any) -> dict[str, Any]:
  """Leaves that lie on every device although the layout shards."""
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
def _progress(what: str) -> Iterator[dict[str, float]]:
  """Says on stderr what takes so long, and every 20 s how long so far; yields
  {"wall", "cpu": its seconds}, which are there when it is done."""
  done, seconds = threading.Event(), {}
  began, cpu = time.monotonic(), time.process_time()

  def say(end):
    print(
      f'{what} … {time.monotonic() - began:.0f} s',
      end=end, file=sys.stderr, flush=True,
    )  # fmt: skip

  def wait():
    while not done.wait(20):
      say('\r' if sys.stderr.isatty() else '\n')

  thread = threading.Thread(target=wait, daemon=True)
  thread.start()
  try:
    yield seconds
  finally:
    done.set()
    thread.join()
    say('\n')
    seconds['wall'] = round(time.monotonic() - began, 1)
    seconds['cpu'] = round(time.process_time() - cpu, 1)


# ----------------------------------------------------------------------------
# Memory, from what the compiler says.


def memory_limit(device: Any) -> int | None:
  """Bytes that a program may use of a device; None where nobody says."""
  stats = None
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # it is not there
    stats = device.memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit']
  known = HBM
  if device.platform == 'gpu':
    name = next(filter(os.environ.get, SHARES), None)
    try:
      share = float(os.environ[name]) if name else 0.75
    except ValueError:
      share = 0.0
    if not 0 < share < math.inf:
      raise UserError(
        f"${name}={os.environ[name]} must be a share of a device's memory, "
        'as 0.75'
      )
    known = {kind: size * share for kind, size, *_ in GPUS.values()}
  size = known.get(device.device_kind)
  return size and int(size * GIB)


# ----------------------------------------------------------------------------
# The report as text.


_NUMBER = r'-?[\d,.]+( ×|%)?$'


def _table(rows: list[tuple[str, ...]], indent: int = 4) -> list[str]:
  """Lines of aligned columns, those of numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [
      f'{cell:{">" if re.match(_NUMBER, cell) else "<"}{width}}'
      for cell, width in zip(row, widths, strict=True)
    ]
    lines.append((' ' * indent + '  '.join(cells)).rstrip())
  return lines


def _section(title: str, rows: list[tuple[str, ...]]) -> list[str]:
  return [f'  {title}', *_table(rows)] if rows else []


def _mib(size: float) -> str:
  return f'{round(size / MIB, 1) + 0.0:,.1f}'  # no -0.0


def verdict(report: Mapping[str, Any]) -> str:
  """One line with the figure."""
  step, batch = report['train_step'], report['batch']
  needs, limit = step['needs'] / GIB, step['limit']
  of = f'of {limit / GIB:.2f} GiB' if limit else 'GiB (no limit is known)'
  return (
    f'the train step {"fits" if report["fits"] else "does not fit"}: it needs '
    f'{needs:.2f} {of} on each of {report["devices"]}, '
    f'accumulate={batch["accumulate"]}, {batch["microbatch"]} images at once'
  )


def text_of(report: Mapping[str, Any]) -> str:
  """The report for a terminal."""
  batch, tried = report['batch'], report['tried']
  versions = {n: v for n, v in report['versions'].items() if n in VERSIONS}

  def words(pairs, between):
    return ', '.join(f'{k}{between}{v}' for k, v in pairs.items())

  rows = [
    ('versions', words(versions, ' ')),
    ('devices', f'{report["devices"]} of {report["hosts"]} host(s)'),
    ('mesh', words(report['mesh'], '=')),
    ('data', report['data']),
    (
      'batch',
      f'{batch["size"]}: {batch["device"]} per device, {batch["microbatch"]} '
      f'at once (accumulate={batch["accumulate"]})',
    ),
  ]
  rows += [
    ('tried', f'accumulate={n} needs {needs / GIB:.2f} GiB')
    for n, needs in tried.items() if len(tried) > 1
  ]  # fmt: skip
  lines = _table(rows, 0)
  for program in (report['train_step'], report['encode']):
    if program is not None:
      lines += ['', *_program_lines(program, report['dtype'])]
  return '\n'.join([*lines, '', verdict(report)])


def _program_lines(program: Mapping[str, Any], dtype: str) -> list[str]:
  seconds, images = program['seconds'], program['images']
  flops = program['flops']
  memory = program['memory'] | {'total': program['needs']}
  memory |= {'limit': program['limit']} if program['limit'] else {}
  held = program.get('replicated', {'largest': []})
  lines = [
    f'{program["name"]} of {images} images: traced in {seconds["trace"]} s, '
    f'compiled in {seconds["compile"]} s ({seconds["compile_cpu"]} '
    'CPU-seconds)',
    f'  FLOPs  {flops:.3e}, {flops / images:.3e} an image',
    *_section(
      'memory of a device, MiB', [(k, _mib(n)) for k, n in memory.items()]
    ),
    *_section(
      'largest temporaries: MiB each, count, shape, operation',
      [
        (_mib(b['bytes']), f'{b["count"]} ×', b['shape'], b['name'][:90])
        for b in program['buffers']
      ],
    ),
    *_section(
      'collectives per device: MiB in total, count, kind',
      [
        (_mib(sums['bytes']), f'{sums["count"]} ×', kind)
        for kind, sums in program['collectives'].items()
      ],
    ),
  ]
  for meant, title in (
    (False, f'f32 products where {dtype} is meant, share of the FLOPs'),
    (True, 'f32 products by design, share of the FLOPs'),
  ):
    rows = [
      (f'{p["share"]:.2%}', p['file'], p['where'])
      for p in program['f32_products']
      if p['meant'] == meant and p['share'] >= 1e-4
    ]  # fmt: skip
    lines += _section(title, rows[:10] if dtype != 'float32' else [])
  rows = [(_mib(leaf['bytes']), leaf['name']) for leaf in held['largest']]
  if rows:
    title = f'{held["leaves"]} replicated leaves, MiB per device: '
    lines += _section(title + _mib(held['bytes']), rows)
  return lines


if __name__ == '__main__':
  cli.run(main)
