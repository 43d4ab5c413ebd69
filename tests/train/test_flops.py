"""What a step costs: each part as many passes as it must make, and no more.

The products of the step with a part and without it, or with one block more,
against those that shapes say: 2 m n k each, a convolution's over the positions
that are not padding.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from tests.train import pieces
from vqrae_jax import programs, quantizers
from vqrae_jax.nn import vgg
from vqrae_jax.pretrained import networks
from vqrae_jax.train import step as step_lib

BATCH, SIDE, PATCH, WIDTH, MLP = 16, 32, 8, 128, 512
# Wide enough that products outweigh what is done element by element.
VIT = dict(
  width=WIDTH, depth=1, mlp_dim=MLP, num_heads=2, patch_size=PATCH, grid=(4, 4)
)
HIDDEN, VGG = 16, (16,) * 5
HEAD = 2 * BATCH * ((SIDE // PATCH) ** 2 + 1) * WIDTH * 3 * PATCH**2
PATCHGAN = dict(
  name='patch', fields=dict(hidden=HIDDEN, halvings=1, groups=4, pool=4)
)


def dino(depth):
  vit = VIT | dict(num_prefix_tokens=1, prefix_has_posemb=True, scan=False)
  taps = (depth - 1,) * 2
  fields = dict(vit=vit | dict(depth=depth), taps=taps, kernel=5)
  return dict(name='dino', fields=fields)


@functools.cache
def traced(encoder=1, decoder=1, trunk=0, frozen=True, lpips=False, gan=False):
  """The step with these depths and losses; nothing is run."""
  losses, discriminator = dict(tiny.LOSSES['simvq-cosine']), None
  if lpips:
    losses['lpips'] = 1.0
  if gan:
    losses['gan'] = 0.75
    discriminator = dino(trunk) if trunk else PATCHGAN
  plan = pieces.planned(
    'simvq-cosine',
    model=dict(
      encoder=dict(vit=VIT | dict(depth=encoder)),
      quantizer=tiny.quantizer('simvq-cosine', num_codes=512, code_dim=96),
      decoder=dict(
        vit=VIT | tiny.DECODER | dict(patch_size=PATCH, depth=decoder)
      ),
      scan=False,
    ),
    data=dict(source='none', image_size=SIDE),
    losses=losses,
    schedules=((r'encoder/.*', None),) * frozen + ((r'.*', dict(lr=1e-3)),),
    discriminator=discriminator,
  )
  state, held, hparams = plan.abstract()
  if lpips:
    draw = functools.partial(networks.random, 'lpips', widths=VGG)
    shapes = jax.eval_shape(draw, jax.random.key(0))
    held = held.replace(losses={'lpips': shapes})
  images = tiny.images(BATCH, SIDE, SIDE)
  step = jax.jit(functools.partial(step_lib.train_step, plan.spec))
  return step.trace(state, held, hparams, images)


def flops(step):
  """Of a traced step's products."""
  return sum(p.flops for p in programs.products(step.jaxpr.jaxpr))


@pytest.mark.parametrize('frozen, most', [(True, 1.2), (False, 1.4)])
def test_the_sweep_before_accumulation_repeats_little(frozen, most):
  """Of four microbatches against one: the decoder's forward, no loss."""
  discriminator = dino(3) if frozen else PATCHGAN  # the quicker to trace

  def count(accumulate):
    plan = pieces.planned(
      'simvq-cosine',
      model=dict(
        encoder=dict(vit=VIT | dict(depth=3)),
        quantizer=tiny.quantizer('simvq-cosine', num_codes=64, code_dim=32),
        decoder=dict(vit=VIT | tiny.DECODER | dict(patch_size=PATCH, depth=3)),
      ),
      losses=tiny.LOSSES['simvq-cosine'] | dict(lpips=1.0, gan=0.75),
      discriminator=discriminator,
      data=dict(source='none', image_size=SIDE),
      init=dict(networks='random'),
      schedules=(('encoder/.*', None),) * frozen + (('.*', dict(lr=1e-3)),),
      accumulate=accumulate,
    )
    step = functools.partial(step_lib.train_step, plan.spec)
    images = tiny.images(BATCH, SIDE, SIDE)
    return flops(jax.jit(step).trace(*plan.abstract(), images))

  assert 1 < count(4) / count(1) <= most


def block(prefix):
  """(a block's forward, of it the products of two activations)."""
  n = (SIDE // PATCH) ** 2 + prefix
  attention = BATCH * 4 * n * n * WIDTH
  return BATCH * 2 * n * (4 * WIDTH**2 + 2 * WIDTH * MLP) + attention, attention


def conv(side, kernel, inputs, outputs):
  """A convolution that keeps its grid; padding does not count."""
  reach = kernel // 2
  met = kernel * side - reach * (reach + 1)
  return 2 * BATCH * inputs * outputs * met**2


def lpips():
  total, inputs, side = 0, 3, SIDE
  for width, count in zip(VGG, vgg.CONVOLUTIONS, strict=True):
    for _ in range(count):
      total, inputs = total + conv(side, 3, inputs, width), width
    side //= 2
  return total


def patchgan():
  """(forward, its first layer) of one halving, pooled to 4."""
  first = conv(SIDE, 5, 3, HIDDEN)
  deep = conv(SIDE, 3, HIDDEN, HIDDEN) + conv(4, 1, HIDDEN, HIDDEN)
  return first + deep + conv(4, 5, HIDDEN, 1), first


@pytest.mark.parametrize(
  'more, less, products',
  [
    # One forward of a frozen encoder, three passes of what is trained.
    (dict(encoder=2), {}, block(0)[0]),
    (dict(encoder=2, frozen=False), dict(frozen=False), 3 * block(0)[0]),
    (dict(decoder=2, gan=True), dict(gan=True), 3 * block(1)[0]),
    # Both images forward, one back; its leaves do not learn.
    (dict(lpips=True), {}, 3 * lpips()),
    # To the image and back, and the gradients' two products at the head; then
    # its own step on real and fake, neither of which wants a gradient.
    (
      dict(gan=True),
      {},
      2 * HEAD + 2 * patchgan()[0] + 2 * (3 * patchgan()[0] - patchgan()[1]),
    ),
  ],
  ids=('frozen', 'trained', 'decoder', 'lpips', 'patch'),
)
def test_each_part_makes_its_passes_once(more, less, products):
  found = flops(traced(**more)) - flops(traced(**less))
  assert found == pytest.approx(products, rel=0.01)


def test_a_trunk_that_does_not_learn_makes_its_passes_once():
  """To the image and back, real and fake. What the trace has more, the
  compiler drops; the rest is done element by element."""
  more, less = (
    traced(gan=True, trunk=depth).lower().compile().cost_analysis()['flops']
    for depth in (2, 1)
  )
  products = 4 * block(1)[0] + block(1)[1]
  assert 1 <= (more - less) / products < 1.12


@pytest.mark.parametrize('tokens, maps', [(128, 1), (1024, 2)])
def test_the_map_of_many_codes(tokens, maps):
  """SimVQ's table is computed once, for the search and for what is read. Its
  gradient costs as much again, but that of few tokens does not touch it."""
  c = 256

  def count(codes):
    section = tiny.quantizer('simvq-cosine', num_codes=codes, code_dim=c)
    quantizer = quantizers.build(section, c, 'float32')

    def loss(params, codebook, z):
      given = dict(params=params, codebook=codebook)
      return quantizer.apply(given, z, train=True).losses['codebook']

    z = jnp.zeros((tokens, c))
    given = jax.eval_shape(quantizer.init, jax.random.key(0), z)
    step = jax.jit(jax.grad(loss)).lower(given['params'], given['codebook'], z)
    return step.compile().cost_analysis()['flops']

  products = 2 * 512 * c * (maps * c + tokens)
  assert 1 <= (count(1024) - count(512)) / products < 1.1
