"""python -m benchmarks.quantizers [--batch=8] [--rounds=5]

What a quantizer costs beside the encoder and decoder it stands between:
DINOv2-B with registers at 224 pixels, a ViT-B decoder, 16 x 16 tokens of 768,
f32, random weights. For each: the compiler's FLOPs of its call, as a share of
the whole continuous forward; the seconds of its call on this machine, as a
share of that forward's, in rounds that take turns, so that other load meets all
alike; its parameters, and those of `post_quant`.

Inference, so SimVQ reads its baked table; "train" is the call with the table's
product, without any gradient.
"""

import argparse
import functools
import math
import statistics
import time

import jax
import jax.numpy as jnp

from vqrae_jax import quantizers
from vqrae_jax.models.tokenizer import build_tokenizer

KINDS = {
  'fsq, 512 codes': dict(name='fsq', levels=(8, 8, 8)),
  'fsq, 64,000 codes': dict(name='fsq', levels=(8, 8, 8, 5, 5, 5)),
  'fsq, 64,000, post_quant': dict(
    name='fsq', levels=(8, 8, 8, 5, 5, 5), post_quant=dict(kernel=1)
  ),
  'vq, 8192 x 768': dict(name='vq', num_codes=8192),
  'vq, 16,384 x 768': dict(name='vq', num_codes=16384),
  'simvq, 16,384 x 1536': dict(name='simvq', num_codes=16384, code_dim=1536),
  'residual vq, 8 of 1024 x 64': dict(
    name='residual',
    stages=8,
    quantizer=dict(name='vq', num_codes=1024, code_dim=64),
  ),
  'multiscale vq, 4096 x 32': dict(
    name='multiscale', quantizer=dict(name='vq', num_codes=4096, code_dim=32)
  ),
}


def continuous():
  """The encoder and decoder, with nothing between."""
  encoder = dict(name='dinov2-with-registers-base', output_norm='plain')
  ends = dict(encoder=encoder, decoder=dict(name='B'), scan=False)
  return build_tokenizer(ends | dict(quantizer=dict(name='none')))


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--rounds', type=int, default=5)
  options = parser.parse_args()
  key, images = jax.random.key(0), jnp.zeros((options.batch, 256, 256, 3))
  latents = jax.random.normal(key, (options.batch, 16, 16, 768))
  calls, rows = {}, {}

  def add(name, fn, args, parameters):
    program = jax.jit(fn).lower(*args).compile()
    flops = program.cost_analysis().get('flops', 0.0)
    calls[name], rows[name] = functools.partial(program, *args), []
    return flops, parameters

  tokenizer = continuous()
  variables = jax.jit(tokenizer.init)(key, images[:1, :16, :16])
  forward = lambda v, x: tokenizer.apply(v, x).images  # noqa: E731
  size = count(variables['params'])
  said = {'forward': add('forward', forward, (variables, images), size)}
  del variables
  for name, section in KINDS.items():
    quantizer = quantizers.build(section, latents.shape[-1], 'float32')
    own = jax.jit(quantizer.init)(key, latents)
    parameters = count(own.get('params', {}))

    def call(v, z, train, module=quantizer):
      return module.apply(v, z, train=train).z_q

    if name.startswith('simvq'):
      train = functools.partial(call, train=True)
      said[f'{name}, train'] = add(
        f'{name}, train', train, (own, latents), parameters
      )
      baked = quantizer.apply(own, method='baked_codebook')
      own = own | {'codebook': own['codebook'] | baked}
    inference = functools.partial(call, train=False)
    said[name] = add(name, inference, (own, latents), parameters)
  for _ in range(options.rounds + 1):
    for name, call in calls.items():
      began = time.perf_counter()
      jax.block_until_ready(call())
      rows[name].append(time.perf_counter() - began)
  seconds = {n: statistics.median(x[1:]) for n, x in rows.items()}
  print(
    f'{"":28} {"GFLOP":>9} {"share":>8} {"ms":>8} {"share":>8} {"leaves":>12}'
  )
  for name, (flops, parameters) in said.items():
    print(
      f'{name:28} {flops / 1e9:9.2f} {flops / said["forward"][0]:8.2%} '
      f'{seconds[name] * 1e3:8.1f} {seconds[name] / seconds["forward"]:8.2%} '
      f'{parameters:12,}'
    )


if __name__ == '__main__':
  main()
