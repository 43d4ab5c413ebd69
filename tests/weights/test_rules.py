"""Tables are total both ways, whatever is done to a right file."""

import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqrae_jax import weights
from vqrae_jax.errors import UserError
from vqrae_jax.ops import images as image_ops
from vqrae_jax.weights import Rule, Table, computed, constant, ignore

POSITIONS = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
D, LAYERS, P = 6, 3, 2

TABLE = Table(
  (
    Rule('embed.weight', 'embed/kernel', 'conv_patch'),
    Rule('embed.bias', 'embed/bias'),
    Rule('cls', 'prefix[0:1]', 'batched'),
    Rule('registers', 'prefix[1:4]', 'batched'),
    Rule(
      'pos',
      ('prefix_positions[0:1]', 'positions'),
      ('batched', 'batched grid'),
    ),
    constant('prefix_positions[1:4]', 0.0, 'registers have none'),
    Rule(
      'layer.{i}.qkv.weight',
      tuple(f'blocks/{n}/kernel[{{i}}]' for n in 'qkv'),
      'linear',
    ),
    Rule('layer.{i}.qkv.bias', tuple(f'blocks/{n}/bias[{{i}}]' for n in 'qkv')),
    Rule('layer.{i}.fc.weight', 'blocks/fc/kernel[{i}]', 'linear'),
    Rule('layer.{i}.gain', 'blocks/gain[{i}]'),
    Rule('scale', 'scale'),
    computed('fixed', lambda: POSITIONS, 'computed here', hint='set x=y'),
    ignore(r'head\..*', 'not needed'),
  )
)

SHAPES = {
  'embed/kernel': (P * P * 3, D),
  'embed/bias': (D,),
  'prefix': (4, D),
  'positions': (2, 3, D),
  'prefix_positions': (4, D),
  **{f'blocks/{n}/kernel': (LAYERS, D, D) for n in 'qkv'},
  **{f'blocks/{n}/bias': (LAYERS, D) for n in 'qkv'},
  'blocks/fc/kernel': (LAYERS, D, 9),
  'blocks/gain': (LAYERS,),
  'scale': (),
}
TARGET = {
  k: jax.ShapeDtypeStruct(v, np.dtype('float32')) for k, v in SHAPES.items()
}


def leaves(seed=0):
  rng = np.random.default_rng(seed)
  made = {
    k: np.asarray(rng.normal(size=v), np.float32) for k, v in SHAPES.items()
  }
  made['prefix_positions'][1:] = 0
  return made


def file():
  """A right file, made by hand from the leaves."""
  w = leaves()
  out = {
    'embed.weight': w['embed/kernel'].reshape(P, P, 3, D).transpose(3, 2, 0, 1),
    'embed.bias': w['embed/bias'],
    'cls': w['prefix'][None, :1],
    'registers': w['prefix'][None, 1:],
    'pos': np.concatenate(
      [w['prefix_positions'][:1], w['positions'].reshape(6, D)]
    )[None],
    'scale': w['scale'],
    'fixed': POSITIONS + np.float32(3e-6),
    'head.weight': np.ones(2),
  }
  for i in range(LAYERS):
    out[f'layer.{i}.qkv.weight'] = np.concatenate(
      [w[f'blocks/{n}/kernel'][i].T for n in 'qkv']
    )
    out[f'layer.{i}.qkv.bias'] = np.concatenate(
      [w[f'blocks/{n}/bias'][i] for n in 'qkv']
    )
    out[f'layer.{i}.fc.weight'] = w['blocks/fc/kernel'][i].T
    out[f'layer.{i}.gain'] = w['blocks/gain'][i]
  return out


def fitted(arrays, target=TARGET, table=TABLE, **options):
  source = weights.arrays('F.pt', arrays)
  return weights.Pretrained(source, table, target, **options)


RIGHT = functools.cache(lambda: fitted(file()))


def misfit(arrays, *words, **options):
  with pytest.raises(UserError) as caught:
    fitted(arrays, **options).load()
  message = str(caught.value)
  assert 'F.pt' in message and '\n' not in message and len(message) < 700
  for word in words:
    assert word in message, message
  return message


def test_a_right_file_fills_every_leaf():
  have, want = fitted(file()).load(), leaves()
  assert have.keys() == want.keys()
  for name, leaf in want.items():
    assert have[name].dtype == leaf.dtype and have[name].shape == leaf.shape
    assert have[name].tobytes() == leaf.tobytes(), name


def test_what_is_left_out_has_a_reason():
  assert fitted(file()).ignored == {
    'head.weight': 'not needed',
    'fixed': 'computed here',
  }


def test_export_is_the_inverse_bitwise():
  want = file()
  have = weights.export(TABLE, leaves())
  assert have.keys() == want.keys() - {'head.weight'}
  for key, value in have.items():
    if key == 'fixed':
      np.testing.assert_array_equal(value, POSITIONS)
    else:
      assert value.shape == want[key].shape, key
      assert value.tobytes() == want[key].tobytes(), key


def test_backwards_is_the_file_a_key_at_a_time():
  """Arrays that are computed or ignored are not among them."""
  source = weights.arrays('made', file())
  fit = weights.Pretrained(source, TABLE, TARGET)
  names = {id(handle): key for key, handle in source.items()}
  found = {names[id(handle)]: ours for handle, ours in fit.backwards()}
  assert found.keys() == source.keys() - fit.ignored.keys()
  for key, ours in found.items():
    assert ours.tobytes() == source[key].read().tobytes(), key
    assert ours.shape == source[key].shape


def test_conv_patch_is_a_convolution_of_patches():
  kernel = file()['embed.weight']
  photo = np.random.default_rng(1).normal(size=(1, 4, 6, 3)).astype('f4')
  with jax.default_matmul_precision('highest'):
    want = jax.lax.conv_general_dilated(
      photo, kernel, (P, P), 'VALID', dimension_numbers=('NHWC', 'OIHW', 'NHWC')
    )
    have = (
      image_ops.patchify(jax.numpy.asarray(photo), P) @ leaves()['embed/kernel']
    )
  np.testing.assert_allclose(have, want, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_block_of_any_leaf(data):
  name = data.draw(st.sampled_from(sorted(SHAPES)))
  block = []
  for n in SHAPES[name]:
    low = data.draw(st.integers(0, n))
    block.append(slice(low, data.draw(st.integers(low, n))))
  have = RIGHT().read(name, tuple(block))
  np.testing.assert_array_equal(have, leaves()[name][tuple(block)])


def test_a_block_reads_its_layers_alone():
  arrays, seen = file(), []
  source = weights.arrays('F.pt', arrays)

  def watched(key, handle):
    def fetch(block):
      seen.append((key, block))
      return handle.fetch(block)

    return dataclasses.replace(handle, fetch=fetch)

  spied = weights.WeightFile(
    'F.pt', {k: watched(k, h) for k, h in source.items()}
  )
  opened = weights.Pretrained(spied, TABLE, TARGET)
  assert [key for key, _ in seen] == ['fixed']
  seen.clear()
  opened.read('blocks/k/kernel', (slice(1, 2), slice(0, 2), slice(3, 5)))
  # Columns 3:5 of ours are rows of theirs, behind the D rows of q.
  assert seen == [('layer.1.qkv.weight', ((D + 3, D + 5), (0, 2)))]


def test_one_leaf_at_a_time_is_read_once():
  """A file is read in order of leaves, each key once for all devices."""
  auto = jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(auto, auto))
  values, asked = np.arange(96, dtype=np.float32).reshape(16, 6), []

  def fetch(key, block):
    asked.append(key)
    return values[tuple(slice(*pair) for pair in block)]

  handles = {
    key: weights.LazyArray(
      values.shape, values.dtype, functools.partial(fetch, key)
    )
    for key in 'abc'
  }
  source = weights.WeightFile('made', handles)
  target = {}
  for key, axes in (('a', ('b', 'a')), ('b', ()), ('c', (None, 'a'))):
    spec = jax.sharding.PartitionSpec(*axes)
    target[key] = jax.ShapeDtypeStruct(
      values.shape,
      values.dtype,
      sharding=jax.sharding.NamedSharding(mesh, spec),
    )
  table = Table(tuple(Rule(key, key) for key in 'abc'))
  fit = weights.Pretrained(source, table, target)
  for name, leaf in fit.load().items():
    np.testing.assert_array_equal(leaf, values)
    assert leaf.sharding == target[name].sharding
  assert asked == list('abc')
  for leaf in fit.load_on_device().values():
    np.testing.assert_array_equal(leaf, values)
    assert not leaf.committed
  # Lazily, a block at a time.
  np.testing.assert_array_equal(fit.lazy()['a'][2:4, :], values[2:4])
  np.testing.assert_array_equal(np.asarray(fit.lazy()['a']), values)


@pytest.mark.parametrize('key', sorted(set(file()) - {'head.weight', 'fixed'}))
def test_mutations_of_a_right_file(key):
  right = file()
  dropped = {k: v for k, v in right.items() if k != key}
  misfit(dropped, f'missing in it: {key}')
  misfit(dropped | {key + 'x': right[key]}, key, f'to the model: {key}x')
  misfit(right | {key + 'x': right[key]}, f'unknown to the model: {key}x')
  odd = np.zeros((*right[key].shape, 2), np.float32)
  want = f'{key} is {odd.shape}, the model wants {right[key].shape}'
  misfit(right | {key: odd}, want)
  misfit(right | {key: right[key].astype(np.int32)}, 'int32')
  nan = np.array(right[key])
  nan.flat[-1] = np.nan
  misfit(right | {key: nan}, key, '1 values')
  # Too large for the type asked for.
  misfit(right | {key: np.full(nan.shape, 1e300)}, key, 'float32')


def test_one_line_shows_both_sides_and_the_way_out():
  arrays = file()
  arrays['old.weight'] = arrays.pop('embed.weight')
  arrays['scale'] = np.ones(3, np.float32)
  message = misfit(
    arrays,
    'missing in it: embed.weight',
    'unknown to the model: old.weight',
    'scale is (3,), the model wants ()',
    hint='take another file',
  )
  assert message.endswith('; take another file')


def test_other_numbers_of_layers():
  arrays = file()
  more = arrays | {
    k.replace('.2.', '.3.'): v for k, v in arrays.items() if '.2.' in k
  }
  misfit(more, 'unknown to the model: layer.3.')
  fewer = {k: v for k, v in arrays.items() if '.2.' not in k}
  misfit(fewer, 'missing in it: layer.2.')
  swapped = {k.replace('.2.', '.7.'): v for k, v in arrays.items()}
  misfit(swapped, 'missing in it: layer.2.', 'unknown to the model: layer.7.')
  padded = {k.replace('.2.', '.02.'): v for k, v in arrays.items()}
  misfit(padded, 'layer.02.')


def test_leaves_without_a_row_and_rows_without_a_leaf():
  extra = TARGET | {'new': TARGET['scale']}
  misfit(file(), "no row fills the model's new", target=extra)
  fewer = {k: v for k, v in TARGET.items() if k != 'scale'}
  misfit(file(), 'unknown to the model: scale', target=fewer)
  longer = TARGET | {'prefix': jax.ShapeDtypeStruct((6, D), np.float32)}
  misfit(file(), 'prefix[4:6]', target=longer)
  with pytest.raises(UserError, match='no place for new'):
    weights.export(TABLE, leaves() | {'new': np.ones(2)})


def test_known_arrays_are_compared():
  arrays = file()
  arrays['fixed'] = POSITIONS + np.float32(0.5)
  misfit(arrays, 'fixed differs by up to 0.5', 'computed here', 'set x=y')
  arrays['fixed'] = POSITIONS[:1]
  misfit(arrays, 'fixed is (1, 3), the model computes (2, 3)')
  arrays['fixed'] = POSITIONS * np.nan
  misfit(arrays, 'fixed', 'NaN')
  del arrays['fixed']
  fitted(arrays)


def test_constants_that_training_moved_cannot_be_written():
  moved = leaves()
  moved['prefix_positions'][2] = 1
  with pytest.raises(UserError, match=r'prefix_positions\[1:4\]'):
    weights.export(TABLE, moved)


def test_prefixes_are_stripped_from_all_alike():
  arrays = file()
  for prefix in ('module.', 'vision_model.', 'module._orig_mod.vit.'):
    have = fitted({prefix + k: v for k, v in arrays.items()}).load()
    np.testing.assert_array_equal(have['scale'], leaves()['scale'])
  mixed = {('vit.' if 'layer' in k else '') + k: v for k, v in arrays.items()}
  misfit(mixed, 'mixes prefixes')
  misfit(arrays | {'vit.scale': arrays['scale']}, 'vit.scale', 'one leaf')
  missing = {'vit.' + k: v for k, v in arrays.items() if k != 'scale'}
  misfit(missing, 'missing in it: vit.scale')
  # Skipped keys may bear any.
  fitted(arrays | {'vit.head.x': np.ones(1)})


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float64])
def test_types_of_the_file_are_cast_to_the_models(dtype):
  arrays = {k: v.astype(dtype) for k, v in file().items() if k != 'fixed'}
  for name, leaf in fitted(arrays).load().items():
    assert leaf.dtype == np.float32
    want = leaves()[name].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(leaf, want)


@pytest.mark.parametrize(
  'rows',
  [
    (Rule('a', 'x'), Rule('b', 'x')),
    (Rule('a', 'x'), Rule('a', 'y')),
    (Rule('a', 'x'), ignore('a|b', 'why'), Rule('b', 'y')),
    (Rule('a', 'x[0:2]'), Rule('b', 'x[1:3]'), Rule('c', 'y')),
    (Rule('a', 'x[0:9]'), Rule('c', 'y')),
  ],
)
def test_faults_of_a_table_are_no_fault_of_the_user(rows):
  target = {k: jax.ShapeDtypeStruct((3,), np.float32) for k in 'xy'}
  arrays = {k: np.ones(3, np.float32) for k in 'abc'}
  with pytest.raises(ValueError) as caught:
    fitted(arrays, target, Table(rows))
  assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize(
  'make',
  [
    lambda: Rule('a.{i}', 'x'),
    lambda: Rule('a', 'x[{i}]'),
    lambda: Rule('a', 'x[1]'),
    lambda: Rule('a', ('x', 'y'), ('same',)),
    lambda: constant('x[{i}]', 0.0, 'why'),
    lambda: Rule('a', 'x', 'transposed'),
  ],
)
def test_rows_that_are_none(make):
  with pytest.raises(ValueError):
    make()
