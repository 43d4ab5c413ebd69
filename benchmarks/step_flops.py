"""python -m benchmarks.step_flops [--batch=8] [--discriminator=patch|dino]
python -m benchmarks.step_flops --memory [--encoder=siglip-large-patch16-384]

Where the FLOPs of one train step go: frozen encoder, SimVQ, losses l2 + lpips
+ gan with the adaptive weight + codebook + commit. Compiled for this CPU in
f32, unrolled, without remat, and never run.

The step and each of its parts alone are compiled, and the compiler's counts
(`cost_analysis`) compared: if the step did anything twice, or kept a pass that
the parts do not have, it would count more than their sum. Beside each part
stands what its shapes say: 2 m n k of every product, a convolution's over the
positions that are not padding. With E and D the forwards of encoder and
decoder the step should be

  E + 3D + two products at the decoder's head (the adaptive weight)
  + the code table and its map's gradient + the search + two projections
  + LPIPS: a forward of both images, a backward to one
  + the decoder's adversarial loss: a forward and a backward to the image
  + the discriminator's: forwards of real and fake, a backward to its leaves

How the compiler counts: a `cond` as its dearest branch, so a loss before its
start counts as if it had begun; the body of a loop once, so blocks are
unrolled and the codes are searched in one piece.

--memory compiles the step with the encoder frozen and trainable (blocks in a
scan) and prints the bytes of arguments and temporaries: what `memory_analysis`
says of this CPU's program.

At the defaults the step costs 4053 GFLOP, 1.006 of what the shapes say and
.9999 of the sum of its parts (dino: 4402, 1.013, 1.0000). With 24 blocks of
SigLIP-L a frozen encoder takes .43 of the memory of a trainable one, 8.4 GiB
for 19.3 (jax 0.10.2, 2026-11).
"""

import argparse
import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import optax

from benchmarks.frozen_encoder import vit_flops
from vqrae_jax import optim
from vqrae_jax.losses import FROZEN_TERMS
from vqrae_jax.models.decoder import Decoder
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.nn import vgg
from vqrae_jax.nn.patchgan import PatchGAN
from vqrae_jax.ops import codes
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train import step as step_lib
from vqrae_jax.train.step import skip_if_nonfinite
from vqrae_jax.types import LossInputs

ALL = (r'.*', dict(lr=1e-3))
SCHEDULES = {'frozen': ((r'encoder/.*', None), ALL), 'trainable': (ALL,)}


def make_plan(model, pixels, batch, discriminator, encoder='frozen'):
  """The plan of a run with an image loss, LPIPS and a second player."""
  spec = config_lib.read_config(
    dict(
      model=model,
      data=dict(source='none', image_size=pixels),
      losses=dict(l2=1.0, lpips=1.0, gan=0.75, codebook=1.0, commit=0.25),
      discriminator=discriminator,
      schedules=SCHEDULES[encoder],
      duration=1000,
      batch_size=batch,
    )
  )
  return state_lib.make_plan(spec, build_tokenizer(spec.model), 1000)


def shapes_of(plan):
  """(state, frozen) of a plan, as shapes."""
  return jax.eval_shape(functools.partial(state_lib.fresh_state, plan, 0))


def flops(fn, *args) -> float:
  """The compiler's count of one program; `args` are shapes."""
  return jax.jit(fn).lower(*args).compile().cost_analysis()['flops']


def step_flops(plan, *args) -> float:
  """The compiler's count of the whole step; `args` are its own."""
  return flops(functools.partial(step_lib.train_step, plan), *args)


def f32(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def both_ways(fn, *args):
  """What training makes of `fn`: its value, and cotangents sent back."""
  value, pullback = jax.vjp(fn, *args)
  return value, pullback(jax.tree.map(jnp.ones_like, value))


@dataclasses.dataclass(frozen=True)
class Part:
  """One row: FLOPs by the shapes (None: elementwise only) and measured."""

  name: str
  predicted: float | None
  measured: float


def conv(b, side, kernel, inputs, outputs):
  """A convolution that keeps its grid, [b side side inputs]: no padding
  counts."""
  reach = kernel // 2
  met = kernel * side - reach * (reach + 1)
  return 2 * b * inputs * outputs * met**2


def vgg_flops(b, side, widths):
  total, inputs = 0, 3
  for width, count in zip(widths, vgg.CONVOLUTIONS, strict=True):
    for _ in range(count):
      total += conv(b, side, 3, inputs, width)
      inputs = width
    side //= 2
  return total


def patch_flops(module, b, side):
  """(forward, its first layer) of `nn.patchgan`."""
  first = conv(b, side, 5, 3, module.hidden)
  total, inputs = first, module.hidden
  for i in range(module.halvings):
    outputs = module.hidden * 2**i
    total += conv(b, side, 3, inputs, outputs)
    inputs, side = outputs, -(-side // 2)
  side = module.pool or side
  total += conv(b, side, 1, inputs, inputs) + conv(b, side, 5, inputs, 1)
  return total, first


def dino_flops(module, b):
  """{"trunk", "attention" (within it), "heads", "enter" (within them)}."""
  s = module.vit
  tokens, rows = math.prod(s.grid), len(module.taps) * math.prod(s.grid)
  n = tokens + s.num_prefix_tokens
  enter = 2 * b * rows * s.width**2
  return {
    'trunk': b * vit_flops(s, tokens, 3 * s.patch_size**2),
    'attention': b * s.depth * 4 * n * n * s.width,
    'enter': enter,
    'heads': enter * (1 + module.kernel) + 2 * b * rows * s.width,
  }


def adversarial_flops(module, b, side):
  """(the decoder's loss, the discriminator's step) by the shapes."""
  if isinstance(module, PatchGAN):
    forward, first = patch_flops(module, b, side)
    # Neither real nor fake images want a gradient.
    return 2 * forward, 2 * (3 * forward - first)
  d = dino_flops(module, b)
  # To the image through a trunk that does not learn: a product of an
  # activation with a weight once, one of two activations twice.
  image = 2 * (d['trunk'] + d['heads']) + d['attention']
  return image, 2 * (d['trunk'] + 3 * d['heads'] - d['enter'])


def tokenizer_parts(plan, state, images):
  """(name, FLOPs by the shapes, function, its arguments) of the one forward
  and the one pullback."""
  t = plan.tokenizer
  b, side = images.shape[:2]
  encoder, decoder = t.encoder_spec.vit, t.decoder_spec.vit
  grid, pixels = t.grid(side, side), 3 * t.patch_size**2
  n = math.prod(grid)
  k, c, d = t.codebook_size, t.quantizer.code_width, t.latent_dim
  params = plan.shapes['params']
  learned, tables = params['quantizer'], state.codebook['quantizer']
  latents, tokens = f32(b, *grid, d), f32(b, *grid, c)
  painter = Decoder(t.decoder_spec)

  def quantizer(method, p, tables, *x):
    variables = {'params': p, 'codebook': tables}
    return t.quantizer.apply(variables, *x, method=method)

  def table(p, tables):
    return both_ways(lambda p: quantizer('_table', p, tables), p)

  def project_in(p, tables, z):  # frozen latents want no gradient
    return both_ways(lambda p: quantizer('to_code_space', p, tables, z), p)

  def project_out(p, tables, z):
    return both_ways(lambda p, z: quantizer('tail', p, tables, z), p, z)

  def encode(p, images):
    return t.apply({'params': {'encoder': p}}, images, method='encode')

  def decode(p, z):
    return both_ways(lambda p, z: painter.apply({'params': p}, z)[0], p, z)

  e = vit_flops(encoder, n, 3 * encoder.patch_size**2)
  prefixed = n + decoder.num_prefix_tokens
  head = 2 * prefixed * decoder.width * pixels
  projection = 2 * b * n * d * c
  of_quantizer, search = (learned, tables), (tokens, f32(k, c))
  return [
    ('encoder: E', b * e, encode, (params['encoder'], images)),
    ('code table: 2', 2 * (2 * k * c * c), table, of_quantizer),
    ('nearest code', 2 * b * n * k * c, codes.nearest_code, search),
    ('projection in: 2', 2 * projection, project_in, (*of_quantizer, latents)),
    ('projection out: 3', 3 * projection, project_out, (*of_quantizer, tokens)),
    (
      'decoder: 3 D',
      3 * b * (vit_flops(decoder, n, d) + head),
      decode,
      (params['decoder'], latents),
    ),
  ]


def loss_parts(plan, state, frozen, images):
  """The same of the losses and of what moves."""
  adversary, decoder = plan.adversary, plan.tokenizer.decoder_spec.vit
  b, side = images.shape[:2]
  n, pixels = (side // decoder.patch_size) ** 2, 3 * decoder.patch_size**2
  image = f32(*images.shape)
  features = f32(b, n + decoder.num_prefix_tokens, decoder.width)
  weights = {'lpips': frozen.losses['lpips']}
  widths = [len(x) for x in weights['lpips']['heads'].values()]
  seen, learnt = adversarial_flops(adversary.module, b, side)
  rows = jax.ShapeDtypeStruct((b,), jnp.int32)
  one = jax.ShapeDtypeStruct((1, *images.shape), jnp.uint8)
  row = jax.ShapeDtypeStruct((1, b), jnp.int32)

  def weight(g, h, x):
    return adversary.balance(
      adversary.head_grad(g, x), adversary.head_grad(h, x)
    )

  def perceived(x, y, weights):
    def loss(x):
      return FROZEN_TERMS['lpips'](LossInputs(x, y, weights))

    return jax.value_and_grad(loss)(x)

  def kept(before, after, norm):
    # Its selects fuse with what they choose from, which is then counted twice.
    return skip_if_nonfinite(before, after, {'grad_norm': norm})

  def played(state, frozen, *lot):
    player, said = adversary.step(state, frozen, *lot)
    norm = said['discriminator/grad_norm']
    return kept(state.discriminator, player, norm), said

  def moved(gradients, player, ema):
    updates, opt_state = plan.optimizer.update(
      gradients, player.opt_state, player.params
    )
    params = optim.apply_updates(player.params, updates)
    average = jax.tree.map(
      lambda e, p: jnp.where(e == p, e, e + 0.1 * (p - e)), ema, params
    )
    norm = optax.global_norm(gradients)
    before = player.params, player.opt_state, ema
    after = params, opt_state, average
    return kept(before, after, norm), norm, optax.global_norm(updates)

  player = state.tokenizer
  return [
    (
      'adaptive weight: 2 at the head',
      2 * (2 * b * n * decoder.width * pixels),
      weight,
      (image, image, features),
    ),
    (
      'LPIPS: 3',
      3 * vgg_flops(b, side, widths),
      perceived,
      (image, image, weights),
    ),
    (
      'gan: 2, to the image',
      seen,
      adversary.generator,
      (state, frozen, image, rows),
    ),
    (
      'discriminator: 2 x 3',
      learnt,
      played,
      (state, frozen, one, one, row),
    ),
    ('AdamW, average, norms', None, moved, (player.params, player, state.ema)),
  ]


def measured(rows) -> dict[str, Part]:
  """{name: Part}, each compiled alone."""
  return {
    name: Part(name, want, flops(fn, *args)) for name, want, fn, args in rows
  }


def table(parts, whole) -> str:
  """Rows of GFLOP, their sum, and the step beside it."""

  def line(name, said, found):
    if said is None:
      return f'{name:32}{"":12}{found / 1e9:12.2f}'
    return f'{name:32}{said / 1e9:12.2f}{found / 1e9:12.2f}{found / said:9.4f}'

  lines = [f'{"GFLOP":32}{"predicted":>12}{"measured":>12}{"ratio":>9}']
  lines += [line(x.name, x.predicted, x.measured) for x in parts]
  total = sum(x.measured for x in parts)
  said = predicted(parts)
  lines += [line('sum of the parts', said, total), line('step', said, whole)]
  lines.append(f'the step over the sum of its parts: {whole / total:.4f}')
  return '\n'.join(lines)


def megabytes(tree) -> float:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**20


def memory(flags) -> dict[str, dict[str, float]]:
  """{"frozen" or "trainable": {buffer: MiB}} of the step."""
  rows = {}
  for name in SCHEDULES:
    plan = plan_of(flags, name, scan=True)
    state, frozen = shapes_of(plan)
    step = jax.jit(
      functools.partial(step_lib.train_step, plan), donate_argnums=0
    )
    program = step.lower(state, frozen, images_of(flags)).compile()
    found = program.memory_analysis()
    player = state.tokenizer
    arguments = found.argument_size_in_bytes / 2**20
    temporaries = found.temp_size_in_bytes / 2**20
    rows[name] = {
      'trainable leaves': megabytes(player.params),
      'moments': megabytes(player.opt_state),
      'average': megabytes(state.ema),
      'frozen': megabytes(frozen),
      'arguments': arguments,
      'temporaries': temporaries,
      'arguments + temporaries': arguments + temporaries,
    }
  return rows


def memory_table(rows) -> str:
  lines = [f'{"MiB":26}{"frozen":>12}{"trainable":>12}{"ratio":>9}']
  for key, held in rows['frozen'].items():
    free = rows['trainable'][key]
    lines.append(f'{key:26}{held:12,.0f}{free:12,.0f}{held / free:9.2f}')
  return '\n'.join(lines)


def account(flags) -> tuple[dict[str, Part], float]:
  """({name: Part}, FLOPs of the step)."""
  plan, images = plan_of(flags), images_of(flags)
  # In one piece: of a loop over pieces only one would be counted.
  tokens = flags.batch * math.prod(plan.tokenizer.grid(*images.shape[1:3]))
  codes.SCORES_PER_CHUNK = tokens * plan.tokenizer.codebook_size
  state, frozen = shapes_of(plan)
  whole = step_flops(plan, state, frozen, images)
  parts = tokenizer_parts(plan, state, images)
  parts += loss_parts(plan, state, frozen, images)
  return measured(parts), whole


def predicted(parts) -> float:
  """The sum of the parts by their shapes; what has no product, as measured."""
  return sum(x.measured if x.predicted is None else x.predicted for x in parts)


def plan_of(flags, encoder='frozen', scan=False):
  """A real-size plan."""
  fields = {'vit': {'scan': scan}} if flags.discriminator == 'dino' else {}
  model = dict(
    encoder=dict(name=flags.encoder, output_norm='plain'),
    quantizer=dict(
      name='simvq', num_codes=16384, code_dim=1536, distance='cosine'
    ),
    decoder=dict(name=flags.decoder),
    scan=scan,
  )
  second = dict(name=flags.discriminator, fields=fields)
  return make_plan(model, flags.pixels, flags.batch, second, encoder)


def images_of(flags):
  shape = (flags.batch, flags.pixels, flags.pixels, 3)
  return jax.ShapeDtypeStruct(shape, jnp.uint8)


def parsed(argv=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--pixels', type=int, default=224)
  parser.add_argument('--encoder', default='siglip-base-patch16-224')
  parser.add_argument('--decoder', default='B')
  parser.add_argument('--discriminator', default='patch')
  parser.add_argument('--memory', action='store_true')
  return parser.parse_args(argv)


def main():
  flags = parsed()
  jax.config.update('jax_platforms', 'cpu')
  print(
    f'{time.strftime("%Y-%m-%d")}, jax {jax.__version__}: {flags.encoder}, '
    f'SimVQ 16384 x 1536, decoder {flags.decoder}, {flags.discriminator}, '
    f'batch {flags.batch} of {flags.pixels} pixels'
  )
  if flags.memory:
    print(memory_table(memory(flags)))
    return
  began = time.perf_counter()
  parts, whole = account(flags)
  print(table(parts.values(), whole))
  print(f'{time.perf_counter() - began:.0f} s')


if __name__ == '__main__':
  main()
