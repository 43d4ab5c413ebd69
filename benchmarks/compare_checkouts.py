"""python -m benchmarks.compare_checkouts --a=OLD --b=NEW [--pairs=12]

Train step and encode of two source trees: compiled FLOPs and temporaries, and
CPU time over interleaved pairs of calls, so that other load on the machine
meets both alike. Prints b / a of each: a step costs no more than before while
the first two are at most 1.005 and the third 1.05.

Each tree runs in a process of its own on one CPU device: SimVQ between ViTs of
128 channels, 64 pixels, all losses that need no weights from elsewhere (l2,
gan with the adaptive weight, codebook, commit), the encoder frozen.
"""

import argparse
import json
import statistics
import sys
import time

VIT = dict(
  width=128, depth=2, mlp_dim=512, num_heads=2, patch_size=8, grid=(8, 8)
)
CONFIG = dict(
  model=dict(
    encoder=dict(vit=VIT),
    quantizer=dict(name='simvq', num_codes=1024, code_dim=128),
    decoder=dict(
      vit=VIT
      | dict(
        posemb='sincos2d', num_prefix_tokens=1, norm_eps=1e-12, patch_size=8
      )
    ),
  ),
  data=dict(source='bundled:photos', image_size=64),
  losses=dict(l2=1.0, gan=0.75, codebook=1.0, commit=0.25),
  discriminator=dict(name='patch', fields=dict(hidden=32)),
  schedules=(('encoder/.*', None), ('.*', dict(lr=1e-4))),
  duration=1000,
  batch_size=8,
)


def compiled_step(config):
  """(mesh, compiled step, state, its other arguments), the tree's own."""
  import jax

  from vqrae_jax.train import config as config_lib
  from vqrae_jax.train import initialize, setup

  made = setup.setup(config_lib.read_config(config))
  with jax.set_mesh(made.mesh):
    start = initialize.initialize(made)
    batch = made.place(made.batches.batch(0))
    rest = start.frozen, setup.f32(made.hparams), batch
    step = made.train_step().lower(start.state, *rest).compile()
  return made.mesh, step, start.state, rest


def worker():
  """Prints what was compiled, then CPU seconds a call for each line read."""
  import jax
  import jax.numpy as jnp

  import vqrae_jax

  mesh, step, state, rest = compiled_step(CONFIG)
  tokenizer = vqrae_jax.build_tokenizer(CONFIG['model'])
  images = jnp.zeros((8, 64, 64, 3), jnp.float32)
  variables = jax.jit(tokenizer.init)(jax.random.key(0), images)
  encode = jax.jit(vqrae_jax.encode_to_indices, static_argnums=0)
  encode = encode.lower(tokenizer, variables, images).compile()
  for name, program in (('step', step), ('encode', encode)):
    memory = program.memory_analysis()
    print(json.dumps({
      f'{name} FLOPs': program.cost_analysis()['flops'],
      f'{name} temporaries': memory.temp_size_in_bytes,
    }), flush=True)  # fmt: skip
  for _ in sys.stdin:
    seconds = {}
    began = time.process_time()
    with jax.set_mesh(mesh):
      state, metrics = step(state, *rest)
      jax.block_until_ready((state, metrics))
    seconds['step CPU s'] = time.process_time() - began
    began = time.process_time()
    for _ in range(4):
      jax.block_until_ready(encode(variables, images))
    seconds['encode CPU s'] = (time.process_time() - began) / 4
    print(json.dumps(seconds), flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--a', help='a source tree')
  parser.add_argument('--b', default='.', help='the one compared with it')
  parser.add_argument('--pairs', type=int, default=12)
  parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.worker:
    worker()
    return
  from benchmarks import report  # a worker's tree may have another

  workers = [
    report.Worker(x, __file__, '--worker') for x in (options.a, options.b)
  ]
  a, b = (w.read() | w.read() for w in workers)  # each program's
  rows = [[w.ask() for w in workers] for _ in range(options.pairs + 1)]
  for name in a:
    print(f'{name:20} {a[name]:14.6g} {b[name]:14.6g} {b[name] / a[name]:8.4f}')
  for name in rows[0][0]:  # the first pair warms up
    pairs = [(x[name], y[name]) for x, y in rows[1:]]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(y / x for x, y in pairs)
    print(f'{name:20} {a:14.6g} {b:14.6g} {ratio:8.4f}')
  for w in workers:
    w.close()


if __name__ == '__main__':
  main()
