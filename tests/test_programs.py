"""What programs cost, against the compiler's count and its texts."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from tests.train import pieces
from vqrae_jax import programs
from vqrae_jax.train import step as step_lib

GIB = 2**30


def flops(fn, *args):
  found = programs.products(jax.make_jaxpr(fn)(*args).jaxpr)
  return sum(product.flops for product in found)


@pytest.mark.parametrize(
  'stride, padding, dilation, groups',
  [
    (1, 'SAME', 1, 1),
    (2, 'SAME', 1, 1),
    (2, 'VALID', 1, 3),
    (1, ((2, 3),) * 2, 2, 1),
  ],
)
def test_convolutions_and_their_gradients(stride, padding, dilation, groups):
  """As the compiler counts them: padding and holes are no products."""
  x, w = jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3 // groups, 6))

  def conv(x, w):
    return jax.lax.conv_general_dilated(
      x,
      w,
      (stride,) * 2,
      padding,
      rhs_dilation=(dilation,) * 2,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )

  out = jnp.ones(jax.eval_shape(conv, x, w).shape)
  back = lambda x, w, out: jax.vjp(conv, x, w)[1](out)  # noqa: E731
  assert flops(conv, x, w) == _compiled(conv, x, w)
  # The compiler may choose other convolutions for the gradient of groups.
  if groups == 1:
    assert flops(back, x, w, out) == pytest.approx(
      flops(conv, x, w) + _compiled(back, x, w, out)
    )


def test_a_branch_of_the_platform():
  """A kernel of a library has no products to count: those of the others."""
  x = jnp.ones((4, 4))

  def fn(x):
    return jax.lax.platform_dependent(
      x,
      cuda=lambda x: x,
      tpu=lambda x: (x.astype('bfloat16') @ x.astype('bfloat16')).astype('f4'),
      default=lambda x: x @ x @ x,
    )

  jaxpr = jax.make_jaxpr(fn)(x).jaxpr
  for platform, count, f32 in (('cpu', 2, 2), ('tpu', 1, 0), ('cuda', 2, 0)):
    found = [*programs.products(jaxpr, platform)]
    assert (len(found), sum(p.f32 for p in found)) == (count, f32)


def _compiled(fn, *args):
  return jax.jit(fn).lower(*args).compile().cost_analysis()['flops']


def test_control_flow():
  x = jnp.ones((4, 4))
  once = 2 * 4**3

  def scanned(x):
    return jax.lax.scan(lambda c, _: (c @ x, None), x, None, 5)[0]

  def chosen(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

  assert flops(scanned, x) == 5 * once
  assert flops(chosen, x) == 2 * once
  assert flops(jax.jit(jax.checkpoint(chosen)), x) == 2 * once
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows = jax.sharding.PartitionSpec('data')
  each = jax.shard_map(
    lambda x: x @ x.T, mesh=mesh, in_specs=rows, out_specs=rows
  )
  assert flops(each, jnp.ones((8, 4))) == 8 * 2 * 4


@functools.cache
def step_products(scan):
  """Of a small step with a discriminator, as traced."""
  model = tiny.model('simvq-cosine', scan=scan)
  losses = tiny.LOSSES['simvq-cosine'] | dict(gan=dict(weight=0.5))
  plan = pieces.planned(
    'simvq-cosine', model=model, losses=losses, discriminator=pieces.DINO
  )
  step = functools.partial(step_lib.train_step, plan.spec)
  traced = jax.jit(step).trace(*plan.abstract(), tiny.images(4))
  return traced, [*programs.products(traced.jaxpr.jaxpr)]


def test_a_step_counts_as_the_compiler_counts_it():
  """Its blocks one after another, the compiler's count; as a scan, the same."""
  traced, unrolled = step_products(scan=False)
  total = sum(p.flops for p in unrolled)
  counted = traced.lower().compile().cost_analysis()['flops']
  assert 0.7 < total / counted <= 1  # the rest is element by element
  scanned = sum(p.flops for p in step_products(scan=True)[1])
  assert scanned == pytest.approx(total)


def test_products_know_their_modules():
  found = step_products(scan=True)[1]
  assert {p.file.split('/')[0] for p in found} <= {
    'losses', 'models', 'nn', 'ops', 'optim.py', 'quantizers',
  }  # fmt: skip
  places = {p.where for p in found}
  assert 'Tokenizer/decoder/transformer/blocks/mlp/fc1' in places
  # All in f32 here: by design where codes or losses are computed.
  rows = programs.f32_products(found)
  meant = {row['file'] for row in rows if row['meant']}
  assert {'ops/nearest.py', 'quantizers/simvq.py', 'nn/spectral.py'} <= meant
  assert not meant & {'nn/vit.py', 'ops/attention.py'}
  assert sum(row['share'] for row in rows) == pytest.approx(1)


TPU = """HloModule jit_step, is_scheduled=true

%inside (p: f32[8,100]) -> f32[8,100] {
  %p = f32[8,100]{1,0:T(8,128)} parameter(0)
  ROOT %big = f32[800,100]{1,0:T(8,128)} add(%p, %p)
}

%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  ROOT %sum = f32[] add(%l, %l)
}

%gathers.1 (p.3: f32[8,100]) -> f32[64,100] {
  %p.3 = f32[8,100]{1,0:T(8,128)} parameter(0)
  ROOT %g.1 = f32[64,100]{1,0:T(8,128)} all-gather(%p.3), channel_id=7
}

%condition (c: (s32[], f32[8,100])) -> pred[] {
  %bound = s32[]{:T(128)} constant(24)
  %c = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (b: (s32[], f32[8,100])) -> (s32[], f32[8,100]) {
  %b = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,100]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %f.2 = f32[64,100]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%gathers.1
  %r = (f32[8,100]{1,0:T(8,128)S(1)}, bf16[4]{0:T(256)}) all-reduce(%x, %x), \
channel_id=3, to_apply=%add, metadata={op_name="jit(step)/while/body/mlp/dot"}
  ROOT %t = (s32[], f32[8,100]) tuple(%i, %x)
}

ENTRY %main (a: f32[8,100]) -> (f32[8,100], f32[8,100]) {
  %a = f32[8,100]{1,0:T(8,128)} parameter(0)
  %f.1 = f32[8,100]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%inside
  %f.3 = f32[64,100]{1,0:T(8,128)} fusion(%a), kind=kCustom, calls=%gathers.1
  %s = (f32[8,100]{1,0}, f32[32,100]{1,0}) all-gather-start(%a), channel_id=4
  %d = f32[32,100]{1,0} all-gather-done(%s)
  %w = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}) while(%t.0), \
condition=%condition, body=%body
  %y = f32[8,100]{1,0:T(8,128)} get-tuple-element(%w), index=1
  ROOT %out = (f32[8,100], f32[8,100]) tuple(%f.1, %y)
}
"""


def test_a_compiled_program_is_read():
  """A loop's bound from its condition; a collective that is written in several
  fusions runs once; tiles; what fusions hold and what is returned owns none."""
  program = [*programs.executed(TPU)]
  found = programs.collectives_of(program)
  # The all-reduce takes two of f32[8,100], what it gives is less.
  assert found == {
    'all-gather': {'count': 2, 'bytes': (64 + 32) * 100 * 4},
    'all-reduce': {'count': 24, 'bytes': 24 * 2 * 3200},
  }
  buffers = programs.buffers_of(program)
  assert [(b['bytes'], b['count'], b['shape']) for b in buffers[:3]] == [
    (64 * 128 * 4, 2, 'f32[64,100]'),
    (32 * 100 * 4, 1, 'f32[32,100]'),
    (512, 1, 'bf16[4]'),
  ]
  assert buffers[2]['name'] == 'mlp/dot'
  known = TPU.replace('body=%body', 'body=%body, known_trip_count={"n":"5"}')
  found = programs.collectives_of([*programs.executed(known)])
  assert found['all-reduce']['count'] == 5


def test_what_does_not_fit_is_read_from_the_error():
  """Both forms of the TPU compiler's message."""
  needs, limit, largest = programs.exhausted(
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
    'for HLO temporaries (45.90G) exceeds available HBM (15.75G).'
  )
  assert (needs, limit) == (int(45.9 * GIB), int(15.75 * GIB))
  assert not largest
  needs, limit, largest = programs.exhausted(
    'Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm.\n'
    '  Largest program allocations in hbm:\n\n  1. Size: 1.50G\n'
    '     Operator: op_name="jit(step)/blocks/dot" source_file="vit.py"\n'
    '     Shape: f32[12,8,6,785,785]{4,3,2,1,0:T(8,128)}\n'
    '     Unpadded size: 1.32G\n  2. Size: 512.0M\n'
    '     Shape: bf16[8,224,224,64]{3,2,1,0}\n'
  )
  assert (needs, limit) == (int(17.5 * GIB), int(15.75 * GIB))
  assert [b['bytes'] for b in largest] == [int(1.5 * GIB), GIB // 2]
  assert largest[0]['name'] == 'jit(step)/blocks/dot'
  assert largest[1]['shape'] == 'bf16[8,224,224,64]'
  assert programs.exhausted('INVALID_ARGUMENT: something else') is None
