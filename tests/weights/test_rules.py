"""Tables are total both ways, whatever is done to a right file."""

import functools
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.weights.files import equal, error_of
from vqrae_jax.errors import UserError
from vqrae_jax.weights import files
from vqrae_jax.weights.load import Pretrained, export
from vqrae_jax.weights.rules import Computed, Ignore, Rule, Table

POSITIONS = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
D, LAYERS, P = 6, 3, 2

QKV = tuple(f'blocks/{n}/kernel' for n in 'qkv')
TABLE = Table(
  (
    Rule('embed.weight', 'embed/kernel', 'conv_patch'),
    Rule('embed.bias', 'embed/bias'),
    Rule('pos', ('prefix', 'positions'), ('batched', 'batched grid')),
    Rule('layer.{i}.qkv.weight', QKV, 'linear'),
    Rule('layer.{i}.fc.weight', 'blocks/fc/kernel', 'linear'),
    Rule('layer.{i}.gain', 'blocks/gain'),
    Rule('scale', 'scale'),
    Computed('fixed', lambda: POSITIONS, 'computed here', hint='set x=y'),
    Ignore(r'head\..*', 'not needed'),
  )
)

SHAPES = {
  'embed/kernel': (P * P * 3, D),
  'embed/bias': (D,),
  'positions': (2, 3, D),
  'prefix': (1, D),
  **dict.fromkeys(QKV, (LAYERS, D, D)),
  'blocks/fc/kernel': (LAYERS, D, 9),
  'blocks/gain': (LAYERS,),
  'scale': (),
}


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, np.dtype('float32'))


TARGET = {name: shape(*sizes) for name, sizes in SHAPES.items()}


def leaves():
  rng = np.random.default_rng(0)
  return {
    k: np.asarray(rng.normal(size=v), np.float32) for k, v in SHAPES.items()
  }


def file():
  """A right file, made by hand from the leaves."""
  w = leaves()
  out = {
    'embed.weight': w['embed/kernel'].reshape(P, P, 3, D).transpose(3, 2, 0, 1),
    'embed.bias': w['embed/bias'],
    'pos': np.concatenate([w['prefix'], w['positions'].reshape(6, D)])[None],
    'scale': w['scale'],
    'fixed': POSITIONS + np.float32(3e-6),
    'head.weight': np.ones(2),
  }
  for i in range(LAYERS):
    out[f'layer.{i}.qkv.weight'] = np.concatenate([w[n][i].T for n in QKV])
    out[f'layer.{i}.fc.weight'] = w['blocks/fc/kernel'][i].T
    out[f'layer.{i}.gain'] = w['blocks/gain'][i]
  return out


def fitted(arrays, target=TARGET, table=TABLE, **options):
  return Pretrained(files.arrays('F.pt', arrays), table, target, **options)


def misfit(arrays, *words, **options):
  message = error_of(lambda: fitted(arrays, **options).load())
  for word in ('F.pt', *words):
    assert word in message, message
  return message


def test_a_right_file_fills_every_leaf_and_is_written_back_bitwise():
  fit, right = fitted(file()), file()
  equal(fit.load(), leaves())
  # What is left out has a reason.
  why = {'head.weight': 'not needed', 'fixed': 'computed here'}
  assert fit.ignored == why
  del right['head.weight']
  equal(export(TABLE, leaves()), right | {'fixed': POSITIONS})
  # A key at a time, without what is computed.
  names = {id(handle): key for key, handle in fit.source.items()}
  del right['fixed']
  equal({names[id(handle)]: ours for handle, ours in fit.backwards()}, right)


def test_one_leaf_at_a_time_is_read_once():
  """A file is read in order of leaves, each key once for all devices."""
  auto = jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(auto, auto))
  # Cut over four devices, the same on two.
  placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('b'))
  leaf = jax.ShapeDtypeStruct((16, 6), 'f4', sharding=placed)
  values = np.arange(96, dtype='f4').reshape(16, 6)
  read = mock.Mock(return_value=values)
  source = {
    key: files.LazyArray((16, 6), values.dtype, functools.partial(read, key))
    for key in 'abc'
  }
  table = Table(tuple(Rule(key, key) for key in 'abc'))
  target = dict.fromkeys('abc', leaf)
  fit = Pretrained(files.WeightFile('made', source), table, target)
  for leaf in fit.load().values():
    np.testing.assert_array_equal(leaf, values)
    assert leaf.sharding == placed
  assert read.call_args_list == [mock.call(key) for key in 'abc']
  np.testing.assert_array_equal(np.asarray(fit.lazy()['a']), values)


@pytest.mark.parametrize('key', sorted(set(file()) - {'head.weight', 'fixed'}))
def test_mutations_of_a_right_file(key):
  right = file()
  dropped = {k: v for k, v in right.items() if k != key}
  misfit(dropped, f'missing in it: {key}')
  renamed = dropped | {key + 'x': right[key]}
  line = misfit(renamed, key, f'to the model: {key}x', hint='take another')
  assert line.endswith('; take another')
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


def test_leaves_without_a_row_and_rows_without_a_leaf():
  misfit(file(), "fills the model's new", target=TARGET | {'new': shape()})
  fewer = {k: v for k, v in TARGET.items() if k != 'scale'}
  misfit(file(), 'unknown to the model: scale', target=fewer)
  with pytest.raises(UserError, match='no place for new'):
    export(TABLE, leaves() | {'new': np.ones(2)})


def test_known_arrays_are_compared():
  arrays = file()
  arrays['fixed'] = POSITIONS + np.float32(0.5)
  misfit(arrays, 'fixed differs by up to 0.5', 'computed here', 'set x=y')
  arrays['fixed'] = POSITIONS[:1]
  misfit(arrays, 'fixed is (1, 3), the model wants (2, 3)')
  arrays['fixed'] = POSITIONS * np.nan
  misfit(arrays, 'fixed', 'NaN')
  del arrays['fixed']
  fitted(arrays)


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
  want = {k: v.astype(dtype).astype('f4') for k, v in leaves().items()}
  equal(fitted(arrays).load(), want)


@pytest.mark.parametrize(
  'rows',
  [
    (Rule('a', 'x'), Rule('b', 'x')),
    (Rule('a', 'x'), Rule('a', 'y')),
    (Rule('a', 'x'), Ignore('a|b', 'why'), Rule('b', 'y')),
  ],
)
def test_faults_of_a_table(rows):
  arrays = {k: np.ones(3, np.float32) for k in 'abc'}
  with pytest.raises(ValueError):
    fitted(arrays, {k: shape(3) for k in 'xy'}, Table(rows))
