"""Sharding of arrays: one mesh, one table of rules by leaf name.

The mesh has the axes ("data", "fsdp", "model"). A batch is sharded over data
and fsdp; parameters over fsdp and model as `PARAM_RULES` say, by the end of
their names, so that optimizer state and averages inherit their parameter's
sharding. The layouts "dp", "fsdp" and "fsdp+tp" only choose the mesh's shape:
an axis of one device shards nothing.

Modules name activations ("batch", "tokens", "embed") and never a mesh axis.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vqrae_jax.errors import UserError, choose
from vqrae_jax.ops import trees
from vqrae_jax.ops.codes import BATCH_AXES

AXES = ('data', 'fsdp', 'model')
LAYOUTS = ('dp', 'fsdp', 'fsdp+tp')

# End of a leaf's name -> the axes of its trailing dimensions; leading ones,
# as of stacked blocks, are replicated.
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r'(lpips|convnext)/.*', ()),  # small, and every device wants all of it
  (r'attention/(query|key|value)/kernel', ('fsdp', 'model')),
  (r'attention/(query|key|value)/bias', ('model',)),
  (r'attention/out/kernel', ('model', 'fsdp')),
  (r'mlp/(fc1|gate)/kernel', ('fsdp', 'model')),
  (r'mlp/(fc1|gate)/bias', ('model',)),
  (r'mlp/fc2/kernel', ('model', 'fsdp')),
  (r'embed/(linear/kernel|prefix\w*|registers)', (None, 'fsdp')),
  (r'embed/positions', (None, None, 'fsdp')),
  (r'(\w+_)?head/kernel', ('fsdp', None)),
  (
    r'quantizer/(parts/)*(codes|basis|sums|kernel|project_\w+/kernel)',
    ('fsdp', None),
  ),
  (r'quantizer/(project_\w+/dense\d|map_tokens)/kernel', ('fsdp', None)),
  (r'quantizer/(frequencies|project_in/gain|(parts/)*token_(mean|var))', ()),
  (r'latents/(mean|std)', ()),
  (r'quantizer/(post_conv|phi_\d+)/kernel', (None, None, 'fsdp', None)),
  (r'head\d+/\w+/kernel', (None, 'fsdp', None)),
  (r'(head\d+/\w+/[uv]|lecam/(real|fake))', ()),
  (r'conv(\d+|_in|_mix|_out)/kernel', (None, None, 'fsdp', None)),
  (r'(\w*norm\w*/(scale|bias)|scale[12]|bias|counts)', ()),
  (r'usage', (None, None, 'fsdp')),
  (r'(step|count|rng|schedule_count)', ()),
  # Leaves of other packages, with names of their own; none of ours match here.
  (r'(encoder|quantizer)/.*', ('fsdp', None)),
)

ACTIVATION_RULES = (
  ('batch', BATCH_AXES),
  ('tokens', None),
  ('embed', None),
)


def make_mesh(
  layout: str = 'dp', devices: Sequence[Any] | None = None, tensor: int = 1
) -> Mesh:
  """A mesh over all devices.

  Args:
    layout: "dp" (batch over all), "fsdp" (parameters too) or "fsdp+tp"
      (`tensor` devices share each block's width as well).
    devices: defaults to `jax.devices()`.
    tensor: the model axis of "fsdp+tp".
  """
  devices = list(jax.devices() if devices is None else devices)
  n = len(devices)
  if tensor < 1 or n % tensor:
    raise UserError(f'mesh.tensor={tensor} must divide the {n} devices')
  if tensor > 1 and layout != 'fsdp+tp':
    raise UserError(
      f'mesh.tensor={tensor} needs mesh.layout="fsdp+tp", not "{layout}"'
    )
  shapes = (n, 1, 1), (1, n, 1), (1, n // tensor, tensor)
  shape = choose(dict(zip(LAYOUTS, shapes, strict=True)), layout, 'mesh layout')
  # `jax.make_mesh` splits an axis of the TPU's physical torus on v5e only; on
  # others 2 devices could not be neighbours.
  devices = mesh_utils.create_device_mesh(
    shape, devices, allow_split_physical_axes=True
  )
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def compile_afresh_on_cpu() -> None:
  """Leaves JAX's compilation cache alone where it would abort the process.

  A CPU program for many devices that is read back from the cache has lost the
  order of its collectives: two devices can wait in different ones, and XLA
  ends the process after 40 s (jaxlib 0.10.2; TPU and GPU are not affected).
  Call at the start of a process, before it compiles anything.
  """
  if jax.default_backend() == 'cpu' and jax.device_count() > 1:
    jax.config.update('jax_enable_compilation_cache', False)


def spec_for(name: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """The placement of one leaf: a pure function of name, shape and mesh.

  An axis that does not divide its dimension is dropped.

  Raises:
    UserError: no rule claims the name.
  """
  rules = (a for p, a in PARAM_RULES if re.search(f'(^|/){p}$', name))
  axes = next(rules, None)
  if axes is None:
    raise UserError(f'no sharding rule claims the leaf "{name}"')
  lead = len(shape) - len(axes)
  if lead < 0:
    return PartitionSpec()
  spec = [None] * lead
  for size, axis in zip(shape[lead:], axes, strict=True):
    fits = axis is not None and size % mesh.shape[axis] == 0
    spec.append(axis if fits else None)
  return PartitionSpec(*spec)


def shardings_for(tree: Any, mesh: Mesh) -> Any:
  """A NamedSharding for every leaf of a tree of arrays or shapes."""
  return trees.map_named(
    lambda name, leaf: NamedSharding(mesh, spec_for(name, leaf.shape, mesh)),
    tree,
  )


def check_batch(batch_size: int, mesh: Mesh, parts: int = 1) -> None:
  """The batch divides over its devices, and a host holds its share of it.

  Args:
    batch_size: of all hosts.
    mesh: whose data and fsdp axes share it.
    parts: that it is computed in, one after another.

  Raises:
    UserError: it does not, or devices of several hosts share the same rows.
  """
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  if batch_size % (shards * parts):
    times = f', times accumulate={parts}' if parts > 1 else ''
    raise UserError(
      f'batch_size={batch_size} must be a multiple of the {shards} devices '
      f'that share it{times}'
    )
  # Of the mesh, not of this process: it may be of devices that are not there.
  hosts = np.array([d.process_index for d in mesh.devices.flat])
  count = len(np.unique(hosts))
  if (np.diff(hosts.reshape(shards, -1)) != 0).any() or shards % count:
    raise UserError(
      f'mesh.tensor={mesh.shape["model"]} spreads one image over several '
      f'hosts of {len(hosts) // count} devices; lower it to a divisor of that'
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its first axis over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict:
  """This host's rows as the global arrays of the step."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows)
    for name, rows in batch.items()
  }


def host_leaves(
  tree: Any, mesh: Mesh, everywhere: bool = True
) -> Iterator[np.ndarray | None]:
  """The leaves as numpy, in the tree's order; every process must iterate.

  Leaves that are sharded over several processes are gathered one at a time, so
  no device ever holds more than one of them in full.

  Args:
    tree: arrays on any devices.
    mesh: the run's.
    everywhere: whether every process keeps them; else only process 0 does, and
      the others get None.
  """
  gather = jax.jit(
    lambda leaf: leaf, out_shardings=NamedSharding(mesh, PartitionSpec())
  )
  keeps = everywhere or not jax.process_index()
  for leaf in jax.tree.leaves(tree):
    if jax.process_count() > 1:
      leaf = gather(leaf)
    # Must be a copy: on CPU `asarray` would keep the gathered leaf alive.
    leaf = np.array(leaf) if keeps else None
    yield leaf


def host_copy(tree: Any, mesh: Mesh, everywhere: bool = True) -> Any:
  """`host_leaves` in the tree's own form."""
  leaves = list(host_leaves(tree, mesh, everywhere))
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)
