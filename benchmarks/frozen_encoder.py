"""python benchmarks/frozen_encoder.py [--batch=8] [--blocks=24]
TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost python \\
  benchmarks/frozen_encoder.py --topology=v5e:2x4 --batch=64

What a frozen encoder saves: the train step of `configs/simvq_siglip_l.py`
(SigLIP-L/16 of 24 blocks, SimVQ, ViT-L decoder, 224 pixels) compiled with the
encoder frozen and trainable, and never run. Nothing needs an accelerator.

FLOPs are the compiler's count of the unrolled program, since it counts the
body of a loop once, beside what the shapes say: with E and D the forwards of
encoder and decoder and Q the quantizer's step, a frozen encoder costs
E + 3D + Q and a trainable one 3E + 3D + Q. Memory is the buffers of one
device: arguments (state and batch), temporaries, and what is returned, most
of which lies in the donated arguments ("aliased").

Without --topology it is compiled for this CPU in f32, whose compiler keeps no
account of scarce memory. With --topology it is compiled for TPU chips that
are not here (pip install "libtpu==0.0.42.*"), in bf16 with fsdp as in the
recipe, `batch` images over all chips; a program that does not fit says so.
"""

import argparse
import functools
import math
import time

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import topologies

from configs import simvq_siglip_l
from vqrae_jax import sharding
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.ops import codes
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib

# What is compiled: (row, scan, remat).
PROGRAMS = (
  ('unrolled', False, False),
  ('scan', True, False),
  ('scan, remat', True, True),
)


def make_plan(frozen, flags, **options):
  """The recipe's plan; `options` are scan and remat."""
  config = simvq_siglip_l.get_config(f'frozen={frozen}')
  dtype = 'bfloat16' if flags.topology else 'float32'
  config.model.update(dtype=dtype, **options)
  for part in ('encoder', 'decoder'):
    vit = config.model[part].get('vit', {})
    config.model[part].vit = {**vit, 'depth': flags.blocks}
  spec = config_lib.read_config(config)
  return state_lib.make_plan(spec, build_tokenizer(spec.model), 1000)


def make_mesh(topology):
  if not topology:
    return sharding.make_mesh(devices=jax.devices()[:1])
  chips = topologies.get_topology_desc(platform='tpu', topology_name=topology)
  return sharding.make_mesh('fsdp', devices=chips.devices)


def compiled(plan, mesh, batch):
  """The train step for this mesh, as `train.run` places it."""
  state, frozen = state_lib.abstract_state(plan, mesh)
  images = jax.ShapeDtypeStruct(
    (batch, 224, 224, 3), jnp.uint8, sharding=sharding.batch_sharding(mesh)
  )
  places = sharding.shardings_for(state, mesh)
  step = jax.jit(
    functools.partial(step_lib.train_step, plan),
    out_shardings=(places, None),
    donate_argnums=0,
  )
  rules = nn.logical_axis_rules(sharding.ACTIVATION_RULES)
  with jax.set_mesh(mesh), rules:
    return step.lower(state, frozen, images).compile()


def vit_flops(vit, tokens, inputs):
  """Products of one image's forward: embedding, then blocks."""
  w, n = vit.width, tokens + vit.num_prefix_tokens
  block = 2 * n * (4 * w * w + 2 * w * vit.mlp_dim) + 4 * n * n * w
  return 2 * tokens * inputs * w + vit.depth * block


def expected(plan, batch):
  """{"frozen": FLOPs, "trainable": FLOPs} by the shapes alone."""
  t = plan.tokenizer
  tokens = math.prod(t.grid(224, 224))
  encoder, decoder = t.encoder_spec.vit, t.decoder_spec.vit
  pixels = 3 * t.patch_size**2
  e = batch * vit_flops(encoder, tokens, pixels)
  d = batch * vit_flops(decoder, tokens, encoder.width)
  d += 2 * batch * tokens * decoder.width * pixels
  k, c = t.codebook_size, t.quantizer.code_width
  # The table with the gradient of its map, the search, two projections. The
  # search is a loop over chunks of tokens, whose body is counted once.
  searched = min(batch * tokens, codes.SCORES_PER_CHUNK // k)
  q = 2 * (2 * k * c * c) + 2 * searched * k * c
  q += 3 * 2 * (2 * batch * tokens * encoder.width * c)
  print(
    f'forward, TFLOP: E {e / 1e12:.3f}, D {d / 1e12:.3f}; Q {q / 1e12:.3f} '
    '(with its backward)'
  )
  # Projecting in needs no gradient of the latents if the encoder is frozen.
  unneeded = 2 * batch * tokens * encoder.width * c
  # Embedding the image needs no gradient of the image.
  embedding = 2 * batch * tokens * pixels * encoder.width
  return {
    'frozen': e + 3 * d + q - unneeded,
    'trainable': 3 * e + 3 * d + q - embedding,
  }


def measure(row, frozen, flags, mesh):
  """Compiles one program; prints and returns its figures."""
  name, scan, remat = row
  plan = make_plan(frozen, flags, scan=scan, remat=remat)
  began = time.perf_counter()
  which = 'frozen' if frozen else 'trainable'
  try:
    program = compiled(plan, mesh, flags.batch)
  except jax.errors.JaxRuntimeError as e:
    print(f'{name:12} {which:10} does not compile: {str(e).splitlines()[0]}')
    return None
  memory = program.memory_analysis()
  found = {
    'arguments': memory.argument_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'outputs': memory.output_size_in_bytes,
    'aliased': memory.alias_size_in_bytes,
  }
  # A donated byte is in arguments, in outputs and in aliased: it counts once.
  found['total'] = sum(found.values()) - 2 * found['aliased']
  shown = ''.join(f'{n / 2**20:12,.0f}' for n in found.values())
  flops = program.cost_analysis()['flops']
  count = f'{flops / 1e12:10.3f}' if not scan else f'{"":10}'
  seconds = time.perf_counter() - began
  print(f'{name:12} {which:10}{shown}{count}{seconds:8.0f} s', flush=True)
  return found | ({} if scan else {'flops': flops})


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--batch', type=int, default=8, help='of all devices')
  parser.add_argument('--blocks', type=int, default=24)
  parser.add_argument('--topology', help='of TPU chips, as v5e:2x4')
  flags = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')

  mesh = make_mesh(flags.topology)
  print(
    f'{time.strftime("%Y-%m-%d")}, jax {jax.__version__}, '
    f'{mesh.size} x {mesh.devices.flat[0].device_kind}, batch {flags.batch}, '
    f'{flags.blocks} blocks; MiB of one device'
  )
  want = expected(make_plan(True, flags), flags.batch)
  columns = ('arguments', 'temporaries', 'outputs', 'aliased', 'total')
  heads = ''.join(f'{c:>12}' for c in columns)
  print(f'{"program":12} {"encoder":10}{heads}{"TFLOP":>10}{"compiled":>10}')
  for row in PROGRAMS[1:] if flags.topology else PROGRAMS:
    pair = [measure(row, frozen, flags, mesh) for frozen in (True, False)]
    if None in pair:
      continue
    frozen, free = pair
    ratios = ', '.join(f'{k} {frozen[k] / free[k]:.2f}' for k in frozen)
    print(f'{row[0]:12} frozen / trainable: {ratios}')
    if 'flops' in frozen and not flags.topology:
      for which, found in (('frozen', frozen), ('trainable', free)):
        share = found['flops'] / want[which]
        print(f'{"":12} {which}: compiler {share:.3f} of what shapes say')


if __name__ == '__main__':
  main()
