"""python benchmarks/loading.py [--megabytes=2000] [--dtype=float32]

What loading a published encoder costs the host: a synthetic checkpoint of 24
blocks under SigLIP's names, in sharded safetensors of `megabytes` f32, goes
onto 8 fake devices with fsdp (`--devices=1`: onto one) in a process of its own.
A thread watches that process's anonymous memory (RssAnon of /proc: what is
mapped from the files does not count, what devices hold here does). The bound
is the target's bytes, one layer of the file's and 256 MB; the exit code is 1
above it.

2 GB in f32: 145 MB beyond the target on 8 devices, 172 MB on one, whose
largest leaf alone has 661 MB; in bf16 71 MB and 146 MB (two CPU cores, jax
0.10.2).
"""

import argparse
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time

DEPTH, SHARD = 24, 4  # blocks in all, and in a file
SLACK = 256e6


def make_spec(megabytes):
  from vqrae_jax.specs import EncoderSpec, ViTSpec

  # 12 width^2 numbers a block, and 8 fake devices share each width.
  width = round(math.sqrt(megabytes * 1e6 / 4 / DEPTH / 12) / 32) * 32
  vit = ViTSpec(
    width=width,
    depth=DEPTH,
    mlp_dim=4 * width,
    num_heads=8,
    patch_size=16,
    grid=(16, 16),
    act='gelu_tanh',
  )
  return EncoderSpec(vit=vit)


def shapes_of(spec):
  import jax

  from vqrae_jax.models.encoder import Encoder

  p = spec.vit.patch_size
  image = jax.ShapeDtypeStruct((1, p, p, 3), 'float32')
  return jax.eval_shape(Encoder(spec).init, jax.random.key(0), image)['params']


def write(folder, spec):
  """The checkpoint: shards under an index; the bytes of one layer."""
  import numpy as np
  from safetensors.numpy import save_file

  from vqrae_jax.encoders import siglip
  from vqrae_jax.ops import trees
  from vqrae_jax.weights.load import expand

  table = siglip.table(spec, {})
  wanted = expand(table, trees.flatten(shapes_of(spec))).shapes
  files, layer = {}, 0
  for key, shape in wanted.items():
    found = re.search(r'layers\.(\d+)\.', key)
    number = int(found[1]) // SHARD + 1 if found else 0
    files.setdefault(f'model-{number:05}.safetensors', []).append(key)
    if 'layers.0.' in key:
      layer += 4 * math.prod(shape)
  rng = np.random.default_rng(0)
  for name, keys in files.items():
    arrays = {k: rng.random(wanted[k], np.float32) for k in keys}
    save_file(arrays, folder / name)
  where = {k: name for name, keys in files.items() for k in keys}
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': where}))
  return layer


def anonymous():
  """Bytes of this process's memory that no file backs."""
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(r'RssAnon:\s+(\d+) kB', status)[1]) * 1024


class Peak(threading.Thread):
  def __init__(self):
    super().__init__(daemon=True)
    self.peak, self.going = 0, True

  def run(self):
    while self.going:
      self.peak = max(self.peak, anonymous())
      time.sleep(0.002)


def load(folder, megabytes, dtype, devices):
  """In a fresh process: prints what it found as a line of JSON."""
  import jax

  from vqrae_jax import sharding, weights
  from vqrae_jax.encoders import siglip
  from vqrae_jax.ops import trees

  spec = make_spec(megabytes)
  shapes = shapes_of(spec)
  mesh = sharding.make_mesh('fsdp', jax.devices()[:devices])
  places = sharding.shardings_for(shapes, mesh)
  target = jax.tree.map(
    lambda s, p: jax.ShapeDtypeStruct(s.shape, dtype, sharding=p),
    shapes,
    places,
  )
  size = sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target)
  )
  # The runtime and its allocator are there before the baseline.
  jax.block_until_ready(
    jax.device_put(jax.numpy.ones((64, 64)), places['norm']['scale'])
  )
  source = weights.open_weights(folder)
  base = anonymous()
  watch = Peak()
  watch.start()
  begin = time.perf_counter()
  table = siglip.table(spec, {k: h.shape for k, h in source.items()})
  leaves = weights.Pretrained(source, table, target).load()
  jax.block_until_ready(leaves)
  seconds = time.perf_counter() - begin
  watch.going = False
  watch.join()
  biggest = max(trees.flatten(target).values(), key=lambda leaf: leaf.size)
  told = dict(
    target=size,
    baseline=base,
    above=watch.peak - base,
    left=anonymous() - base,
    leaf=biggest.size * biggest.dtype.itemsize,
    seconds=seconds,
  )
  print(json.dumps(told))


def measure(megabytes, dtype, folder=None, devices=8):
  """Writes, loads in a subprocess, and returns its figures in bytes."""
  with tempfile.TemporaryDirectory(dir=folder) as name:
    layer = write(pathlib.Path(name), make_spec(megabytes))
    fresh = {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
      'PYTHONPATH': str(pathlib.Path(__file__).resolve().parents[1]),
    }
    words = [f'--megabytes={megabytes}', f'--dtype={dtype}', f'--load={name}']
    words.append(f'--devices={devices}')
    done = subprocess.run(
      [sys.executable, __file__, *words],
      env=os.environ | fresh,
      capture_output=True,
      text=True,
    )
  if done.returncode:
    raise RuntimeError(done.stderr[-2000:])
  told = json.loads(done.stdout.splitlines()[-1])
  told['layer'] = layer
  told['bound'] = told['target'] + layer + SLACK
  return told


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--megabytes', type=int, default=2000)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--devices', type=int, default=8)
  parser.add_argument('--folder', default=None, help='where the files are made')
  parser.add_argument('--load', default=None, help='(for its own subprocess)')
  flags = parser.parse_args()
  if flags.load:
    load(flags.load, flags.megabytes, flags.dtype, flags.devices)
    return 0
  told = measure(flags.megabytes, flags.dtype, flags.folder, flags.devices)
  for name in ('target', 'layer', 'leaf', 'baseline', 'above', 'left', 'bound'):
    print(f'{name:10} {told[name] / 1e6:9.0f} MB')
  over = told['above'] - told['target']
  print(
    f'peak above the baseline: {told["above"] / told["target"]:.3f} targets'
  )
  print(f'beyond the target: {over / 1e6:.0f} MB, {told["seconds"]:.1f} s')
  return int(told['above'] > told['bound'])


if __name__ == '__main__':
  sys.exit(main())
