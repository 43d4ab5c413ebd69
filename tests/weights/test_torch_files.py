"""What torch.save writes is read as torch reads it; nothing else is run."""

import collections
import functools
import io
import os
import re
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.weights import files
from tests.weights.files import checkpoint, program, refused, tensor
from vqrae_jax import weights
from vqrae_jax.errors import UserError

FOUR = np.arange(4, dtype='<f4')
DATA = {'archive/data/0': FOUR.tobytes()}


def saved(tmp_path, value, name='w.pt'):
  torch.save(value, tmp_path / name)
  return tmp_path / name


def as_numpy(value: torch.Tensor) -> np.ndarray:
  value = value.detach()
  if value.dtype == torch.bfloat16:
    raw = value.contiguous().view(torch.int16).numpy()
    return raw.view(ml_dtypes.bfloat16)
  return value.numpy()


BASE = torch.arange(24.0).reshape(4, 6)
TENSORS = {
  'f32': BASE,
  'f16': BASE.half(),
  'bf16': BASE.bfloat16() / 3,
  'f64': BASE.double() / 3,
  'i64': torch.arange(5),
  'bool': torch.tensor([True, False]),
  'transposed': BASE.T,
  'view of a storage': BASE[1:3, 2:5],
  'columns': BASE[:, ::2],
  'expanded': torch.ones(1, 3).expand(4, 3),
  'scalar': torch.tensor(3.5),
  'empty': torch.zeros(0, 3),
  'parameter': torch.nn.Parameter(BASE + 1),
  'cube': torch.randn(3, 4, 5).permute(2, 0, 1),
}


@pytest.mark.parametrize(
  'kind', [dict, collections.OrderedDict], ids=lambda k: k.__name__
)
def test_tensors_of_every_form(tmp_path, kind):
  source = weights.open_weights(saved(tmp_path, kind(TENSORS)))
  assert list(source) == list(TENSORS)
  for key, value in TENSORS.items():
    want, handle = as_numpy(value), source[key]
    assert handle.shape == want.shape and handle.dtype == want.dtype, key
    assert handle.read().tobytes() == np.ascontiguousarray(want).tobytes(), key
    block = tuple(slice(n // 3, n - n // 4) for n in want.shape)
    np.testing.assert_array_equal(handle.read(block), want[block], key)
    np.testing.assert_array_equal(handle.read(block[:1]), want[block[:1]], key)


def test_opening_reads_no_values(tmp_path, monkeypatch):
  path = saved(tmp_path, TENSORS)
  from vqrae_jax.weights.files import Archive

  read, seen = Archive.read, []
  monkeypatch.setattr(
    Archive, 'read', lambda s, n, *a: (seen.append(n), read(s, n, *a))[1]
  )
  weights.open_weights(path)
  assert not [n for n in seen if '/data/' in n]


def test_a_modules_own_state_dict(tmp_path):
  module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
  have = files.read_all(saved(tmp_path, module.state_dict()))
  for key, value in module.state_dict().items():
    np.testing.assert_array_equal(have[key], as_numpy(value))


@pytest.mark.parametrize('extra', [{}, dict(epoch=3), dict(args=None)])
def test_which_section_is_taken(tmp_path, extra):
  one, two, three = ({'w': torch.full((2,), v)} for v in (1.0, 2.0, 3.0))
  scalars = dict(step=7, lr=1e-3, name='run', best=None, done=True, dims=[1, 2])

  def taken(value):
    source = weights.open_weights(saved(tmp_path, value | scalars | extra))
    return source['w'].read()[0], source.note

  assert taken(dict(ema=one, model=two, state_dict=three))[0] == 1
  value, note = taken(dict(model=two, state_dict=three))
  assert value == 2 and 'took "model"' in note and 'state_dict' in note
  assert taken(dict(ema=None, model=two))[0] == 2
  assert taken(dict(ema={}, state_dict=three))[0] == 3
  value, note = taken(three)
  assert value == 3 and 'step' in note


@pytest.mark.parametrize(
  ('value', 'words'),
  [
    (dict(step=3), 'no named tensors'),
    ([torch.ones(2)], 'holds a list'),
    (torch.ones(2), 'one tensor without a name'),
    ({'w': torch.ones(2), 'deep': {'v': torch.ones(2)}}, '"deep"'),
    ({'model': {'w': torch.ones(2), 'l': [torch.ones(1)]}}, '"l"'),
    ({1: torch.ones(2)}, 'no named tensors'),
  ],
)
def test_files_without_a_dict_of_tensors(tmp_path, value, words):
  refused(saved(tmp_path, value), words)


def test_the_byte_order_is_obeyed(tmp_path):
  for order, dtype in (('little', '<f4'), ('big', '>f4')):
    members = {
      'archive/data/0': FOUR.astype(dtype).tobytes(),
      'archive/byteorder': order.encode(),
    }
    path = checkpoint(tmp_path / 'w.pt', tensor(), members)
    np.testing.assert_array_equal(files.read_all(path)['w'], FOUR)
  members['archive/byteorder'] = b'middle'
  refused(checkpoint(tmp_path / 'w.pt', tensor(), members), 'byte order')


def test_the_hand_written_program_is_what_torch_reads(tmp_path):
  """So that the malicious ones below differ from it by their malice alone."""
  path = checkpoint(tmp_path / 'w.pt', tensor(), DATA)
  np.testing.assert_array_equal(files.read_all(path)['w'], FOUR)
  np.testing.assert_array_equal(torch.load(path)['w'].numpy(), FOUR)


GADGETS = {
  'posix.system': files.Calls(os.system, 'touch PWNED'),
  'builtins.eval': files.Calls(eval, "open('PWNED', 'w')"),
  'builtins.exec': files.Calls(exec, "open('PWNED', 'w')"),
  'builtins.getattr': files.Calls(getattr, os, 'system'),
  'functools.partial': files.Calls(functools.partial, os.system, 'true'),
  'io.open': files.Calls(io.open, 'PWNED', 'w'),
  'collections.defaultdict': collections.defaultdict(list),
  'torch.nn.modules.linear.Linear': torch.nn.Linear(2, 2),
  'tests.weights.files.Calls': files.Calls,
}


@pytest.mark.parametrize('path', GADGETS)
@pytest.mark.parametrize('protocol', [2, 4])
def test_a_name_from_outside_is_refused(tmp_path, monkeypatch, path, protocol):
  monkeypatch.chdir(tmp_path)
  value = GADGETS[path]
  if path == 'builtins.getattr':
    value = files.Calls(getattr, 'text', 'upper')
  words = path.replace('builtins', '__builtin__') if protocol == 2 else path
  words = words.replace('io.open', 'open')
  before = set(sys.modules)
  made = checkpoint(tmp_path / 'w.pt', program({'w': value}, protocol), DATA)
  message = refused(made, 'could run code', 'state_dict')
  assert words.split('.')[-1] in message
  assert not (tmp_path / 'PWNED').exists()
  assert set(sys.modules) == before


ORDERED = files.name('collections', 'OrderedDict')
TENSOR = files.name('torch._utils', '_rebuild_tensor_v2')
PARAMETER = files.name('torch._utils', '_rebuild_parameter')
ODD = {
  'reduce with odd args': TENSOR + files.numbers(1, 2) + files.REDUCE,
  'reduce of a tensor of text': TENSOR
  + files.MARK + files.text('a') * 6 + files.TUPLE + files.REDUCE,
  'reduce with no tuple': ORDERED + files.EMPTY_DICT + files.REDUCE,
  'OrderedDict of items': ORDERED + files.numbers(1) + files.REDUCE,
  'parameter of a number': PARAMETER + files.numbers(1, 2, 3) + files.REDUCE,
  'call of a storage class': files.name('torch', 'FloatStorage')
  + files.numbers(1) + files.REDUCE,
  'call of a number': files.number(1) + files.numbers(1) + files.REDUCE,
  'state of a function': TENSOR
  + files.EMPTY_DICT + files.text('__code__') + files.NONE + files.SETITEM
  + files.BUILD,
  'state of a class': ORDERED
  + files.EMPTY_DICT + files.text('__setitem__') + files.NONE
  + files.SETITEM + files.BUILD,
  'state of a plain dict': files.EMPTY_DICT + files.EMPTY_DICT + files.BUILD,
  'an object by its class': ORDERED + files.EMPTY_TUPLE + files.NEWOBJ,
  'a registered extension': b'\x82\x01',
  'a text persistent id': b'Pstorage\n',
  'persistent id of a number': files.number(7) + files.PERSID,
  'persistent id of another kind': files.MARK
  + files.text('module') + files.NONE * 4 + files.TUPLE + files.PERSID,
  'storage of a function': files.storage(TENSOR),
  'storage without a class': files.storage(files.text('FloatStorage')),
  'storage of negative size': files.storage(count=-4),
  'key that is a tuple': files.EMPTY_DICT
  + files.numbers(1) + files.NONE + files.SETITEM,
  'items of a tuple': files.numbers(1)
  + files.number(0) + files.number(1) + files.SETITEM,
  'an old instance': files.MARK + b'ios\nsystem\n',
}  # fmt: skip


@pytest.mark.parametrize('case', ODD)
def test_odd_programs_are_refused(tmp_path, case):
  whole = b'\x80\x02' + ODD[case] + files.STOP
  refused(checkpoint(tmp_path / 'w.pt', whole, DATA), 'is not read: its pickle')


@pytest.mark.parametrize(
  'whole',
  [
    b'',
    b'.',
    b'\x80\x02',
    b'\x80\x02}',
    b'\x80\x02}h\x05.',
    b'\x80\x02r\xff\xff\xff\xff.',
    b'\x80\x02t.',
    b'\x80\x02}}.',
    b'\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0f.',
    b'\x80\x02X\x01\x00\x00\x00\xff.',
    b'\xfe\xfe',
    tensor()[:-1],
    tensor()[:40],
  ],
)
def test_broken_programs_are_errors(tmp_path, whole):
  refused(checkpoint(tmp_path / 'w.pt', whole, DATA))


@pytest.mark.parametrize(
  ('made', 'words'),
  [
    (tensor(size=(5,)), 'reaches past its storage'),
    (tensor(offset=1), 'reaches past its storage'),
    (tensor(size=(2, 2), stride=(3, 1)), 'reaches past its storage'),
    (tensor(size=(4,), stride=(-1,)), 'no storage and numbers'),
    (tensor(size=(2, 2), stride=(1,)), 'no storage and numbers'),
    (tensor(size=(2**30, 2**30), stride=(0, 0)), 'reaches past'),
    (
      tensor(tail=b'\x89N}' + files.text('neg') + b'\x88s'),
      'to be negated',
    ),
    (tensor(files.storage(count=8)), 'wants 8 elements'),
    (tensor(files.storage(key='1')), 'archive/data/1, which is missing'),
    (tensor(files.storage(key='../x')), 'which is missing'),
    (
      tensor(files.storage(files.name('torch', 'ComplexFloatStorage'))),
      'names',
    ),
  ],
)
def test_tensors_that_lie_about_their_storage(tmp_path, made, words):
  refused(checkpoint(tmp_path / 'w.pt', made, DATA), words)


def test_self_reference_is_harmless(tmp_path):
  loop: dict = {'step': 1}
  loop['self'] = loop
  refused(checkpoint(tmp_path / 'w.pt', program(loop), DATA), 'no named tensor')
  loop['w'] = loop['list'] = [loop]
  refused(checkpoint(tmp_path / 'w.pt', program(loop), DATA))


@pytest.mark.parametrize(
  ('members', 'words'),
  [
    ({'archive/code/evil.py': b'x'}, 'archive/code/evil.py'),
    ({'archive/data/0.py': b'x'}, 'archive/data/0.py'),
    ({'../data/1': b'x'}, 'a path out of the archive'),
    ({'/etc/data/1': b'x'}, 'a path out of the archive'),
    ({'archive/data/../../1': b'x'}, 'a path out of the archive'),
    ({'other/data/1': b'x'}, '2 top folders'),
    ({'archive/data/': b''}, 'archive/data/'),
  ],
)
def test_foreign_members(tmp_path, members, words):
  made = checkpoint(tmp_path / 'w.pt', tensor(), DATA | members)
  refused(made, words)


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_a_member_twice(tmp_path):
  path = checkpoint(tmp_path / 'w.pt', tensor(), DATA)
  with zipfile.ZipFile(path, 'a') as file:
    file.writestr('archive/data/0', b'x' * 16)
  refused(path, 'twice')


def test_bombs(tmp_path):
  zeros = {'archive/data/0': bytes(1 << 24)}
  big = tensor(files.storage(count=1 << 22), size=(1 << 22,))
  refused(
    checkpoint(tmp_path / 'w.pt', big, zeros, zipfile.ZIP_DEFLATED),
    'would grow',
  )
  # Stored, the same is a tensor like any other.
  stored = checkpoint(tmp_path / 'w.pt', big, zeros)
  assert files.read_all(stored)['w'].shape == (1 << 22,)
  # Compressed a little, too.
  noise = np.random.default_rng(0).integers(0, 9, 4, np.int32).tobytes()
  made = checkpoint(
    tmp_path / 'w.pt', tensor(), {'archive/data/0': noise}, zipfile.ZIP_DEFLATED
  )
  source = weights.open_weights(made)
  assert source['w'].read((slice(1, 3),)).tobytes() == noise[4:12]
  lzma = checkpoint(tmp_path / 'w.pt', tensor(), DATA, zipfile.ZIP_LZMA)
  refused(lzma, 'unknown way')


def test_members_that_overlap(tmp_path):
  """Two names for the same bytes: more is claimed than the file holds."""
  path = checkpoint(
    tmp_path / 'w.pt',
    tensor(),
    DATA | {f'archive/data/{i}': bytes(4096) for i in range(1, 3)},
  )
  with zipfile.ZipFile(path) as file:
    infos = file.infolist()
  first, second = (i.header_offset for i in infos[-2:])
  data = path.read_bytes()
  # The last member's bytes go, and its entry points at the one before.
  directory = data.index(b'PK\x01\x02')
  entries = bytearray(data[directory:])
  at = entries.rindex(b'PK\x01\x02')
  entries[at + 42 : at + 46] = first.to_bytes(4, 'little')
  end = entries.rindex(b'PK\x05\x06')
  entries[end + 16 : end + 20] = second.to_bytes(4, 'little')
  path.write_bytes(data[:second] + bytes(entries))
  refused(path, 'damaged')


def test_truncated_anywhere(tmp_path):
  path = saved(tmp_path, TENSORS)
  data = path.read_bytes()
  for stop in (*range(0, len(data), 997), len(data) - 1, len(data) - 30):
    path.write_bytes(data[:stop])
    refused(path, 'empty' if stop == 0 else 'damaged')


def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path):
  path = saved(tmp_path, {'w': BASE, 'b': torch.arange(6.0)})
  data, good = path.read_bytes(), files.read_all(path)
  rng = np.random.default_rng(0)
  failed = 0
  for at in rng.choice(len(data) * 8, 400, replace=False):
    broken = bytearray(data)
    broken[at // 8] ^= 1 << (at % 8)
    path.write_bytes(broken)
    try:
      have = files.read_all(path)
    except UserError as e:
      assert '\n' not in str(e)
      failed += 1
      continue
    assert have.keys() == good.keys()
    for key in good:
      assert have[key].tobytes() == good[key].tobytes(), at
  assert failed > 100
  values = data.index(as_numpy(BASE).tobytes())
  broken = bytearray(data)
  broken[values + 50] ^= 4
  path.write_bytes(broken)
  assert re.search('CRC', refused(path, 'damaged'))
  # A block that does not hold the flipped bit is refused as well.
  with pytest.raises(UserError, match='CRC'):
    weights.open_weights(path)['w'].read((slice(0, 1),))
