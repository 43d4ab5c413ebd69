"""Checkpoints of the format before PyTorch 1.6: read as torch reads them, and
refused where they are not whole or more than weights.

Files by `torch.save` in that format, and by hand where no torch of today
writes them. Parity is to the last bit.
"""

import collections
import os
import pickle
import tarfile
import warnings

import numpy as np
import pytest
import torch

from tests.weights import files
from tests.weights.files import legacy, program, refused, tensor
from tests.weights.test_torch_files import BASE, ODD, TENSORS, as_numpy
from vqrae_jax import weights
from vqrae_jax.errors import UserError
from vqrae_jax.weights import torch as torch_legacy
from vqrae_jax.weights import torch as torch_pickle

FOUR = np.arange(4, dtype='<f4')
DATA = {'0': (4, FOUR.tobytes())}
# What a tensor's storage is written as there.
OLD = files.storage(more=files.NONE)


def saved(tmp_path, value, name='w.pth'):
  torch.save(value, tmp_path / name, _use_new_zipfile_serialization=False)
  return tmp_path / name


@pytest.mark.parametrize(
  'kind', [dict, collections.OrderedDict], ids=lambda k: k.__name__
)
def test_tensors_of_every_form(tmp_path, kind):
  path = saved(tmp_path, kind(TENSORS))
  source, torchs = weights.open_weights(path), torch.load(path)
  assert list(source) == list(TENSORS)
  for key, value in torchs.items():
    want, handle = as_numpy(value), source[key]
    assert handle.shape == want.shape and handle.dtype == want.dtype, key
    assert handle.read().tobytes() == np.ascontiguousarray(want).tobytes(), key
    block = tuple(slice(n // 3, n - n // 4) for n in want.shape)
    np.testing.assert_array_equal(handle.read(block), want[block], key)


def test_only_the_block_asked_for_is_read(tmp_path, monkeypatch):
  large = torch.arange(1 << 20, dtype=torch.int32).reshape(1024, 1024)
  path = saved(tmp_path, {'small': BASE, 'large': large})
  read, seen = torch_legacy._read, []
  monkeypatch.setattr(
    torch_legacy,
    '_read',
    lambda p, at, n, where: (seen.append(n), read(p, at, n, where))[1],
  )
  source = weights.open_weights(path)
  assert not seen
  rows = source['large'].read((slice(7, 9),))
  np.testing.assert_array_equal(rows, large[7:9].numpy())
  assert seen == [2 * 1024 * 4]


def test_a_file_larger_than_memory_opens(tmp_path):
  """Eight gigabytes of nothing on the disk, and four values behind them."""
  count = 2**31 - 1
  made = tensor(files.storage(count=count, more=files.NONE), size=(count,))
  path = legacy(tmp_path / 'w.pt', made, {'0': (count, b'')})
  with path.open('r+b') as file:
    file.seek((count - 4) * 4, os.SEEK_END)
    file.write(FOUR.tobytes())
  handle = weights.open_weights(path)['w']
  np.testing.assert_array_equal(handle.read((slice(count - 4, count),)), FOUR)
  assert not handle.read((slice(0, 9),)).any()


def test_a_modules_own_state_dict(tmp_path):
  module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
  have = files.read_all(saved(tmp_path, module.state_dict(keep_vars=True)))
  for key, value in module.state_dict().items():
    np.testing.assert_array_equal(have[key], as_numpy(value))


def test_which_section_is_taken(tmp_path):
  one, two, three = ({'w': torch.full((2,), v)} for v in (1.0, 2.0, 3.0))
  scalars = dict(step=7, lr=1e-3, name='run', best=None, done=True, dims=[1, 2])

  def taken(value):
    source = weights.open_weights(saved(tmp_path, value | scalars))
    return source['w'].read()[0], source.note

  assert taken(dict(ema=one, model=two, state_dict=three))[0] == 1
  value, note = taken(dict(model=two, optimizer=three))
  assert value == 2 and 'took "model"' in note and 'optimizer' in note
  assert taken(three)[0] == 3
  refused(saved(tmp_path, {'w': BASE, 'deep': one}), '"deep"')


def python_2(value: bytes, kind='FloatStorage', count=4) -> bytes:
  """A state dict as Python 2 and PyTorch before 0.4 wrote it."""
  parts = files.old_text('storage') + files.name('torch', kind)
  parts += files.old_text('0') + files.old_text('cuda:0') + files.number(count)
  store = files.MARK + parts + files.NONE + files.TUPLE + files.PERSID
  call = files.name('torch._utils', value.decode())
  inner = store + files.number(1) + files.numbers(3) + files.numbers(1)
  made = call + files.MARK + inner + files.TUPLE + files.REDUCE
  pair = b']' + files.MARK + files.old_text('w') + made + b'e'
  ordered = files.name('collections', 'OrderedDict')
  return (
    b'\x80\x02' + ordered + b']' + pair + b'a' + b'\x85' + files.REDUCE + b'.'
  )


def both(path):
  """{key: array} of ours, equal to torch's."""
  have = files.read_all(path)
  want = torch.load(path, map_location='cpu')
  assert have.keys() == want.keys()
  for key, value in want.items():
    assert have[key].tobytes() == as_numpy(value).tobytes()
  return have


def test_the_hand_written_file_is_what_torch_reads(tmp_path):
  """So that the broken ones below differ from it by one thing alone."""
  have = both(legacy(tmp_path / 'w.pt', tensor(OLD), DATA))
  np.testing.assert_array_equal(have['w'], FOUR)


def test_files_of_python_2(tmp_path):
  """Text as bytes, an OrderedDict of pairs, the tensor's first form: as in
  torchvision's VGG16 and LPIPS's heads."""
  path = legacy(tmp_path / 'w.pt', python_2(b'_rebuild_tensor'), DATA)
  np.testing.assert_array_equal(both(path)['w'], FOUR[1:])


def test_parts_of_a_storage(tmp_path):
  """Tensors over [1, 4) of a storage, as storages once could be cut."""
  part = files.MARK + files.text('1') + files.numbers(1, 3)[1:-1] + files.TUPLE
  made = tensor(files.storage(more=part), offset=1, size=(2,))
  have = both(legacy(tmp_path / 'w.pt', made, DATA))
  np.testing.assert_array_equal(have['w'], FOUR[2:])
  made = tensor(files.storage(more=part), offset=1, size=(3,))
  refused(
    legacy(tmp_path / 'w.pt', made, DATA), 'reaches past its storage of 3'
  )


@pytest.mark.parametrize(
  'part',
  [
    files.number(1),
    files.numbers(1, 2),
    files.MARK + files.text('1') * 3 + files.TUPLE,
    files.MARK + files.text('1') + files.numbers(2, 3)[1:-1] + files.TUPLE,
  ],
)
def test_parts_that_are_none(tmp_path, part):
  made = tensor(files.storage(more=part))
  refused(legacy(tmp_path / 'w.pt', made, DATA), 'part of a storage')


def test_values_are_little_endian_whoever_wrote_them(tmp_path):
  machine = program(dict(protocol_version=1001, little_endian=False))
  head = (*files.HEAD[:2], machine)
  have = both(legacy(tmp_path / 'w.pt', tensor(OLD), DATA, head))
  np.testing.assert_array_equal(have['w'], FOUR)


def swapped(at: int, made: bytes) -> tuple:
  head = list(files.HEAD)
  head[at] = made
  return tuple(head)


@pytest.mark.parametrize(
  ('more', 'words'),
  [
    (dict(head=swapped(0, program(7))), 'no PyTorch checkpoint'),
    (dict(head=swapped(0, program('x' * 99))), 'no PyTorch checkpoint'),
    (dict(head=swapped(1, program(1002))), 'unknown version'),
    (dict(head=swapped(1, b'\x80\x02' + b']' * 9999 + b'.')), 'damaged'),
    (
      dict(head=swapped(1, b'\x80\x02' + b']' * 9999 + b'a' * 9998 + b'.')),
      'unknown version',
    ),
    (dict(head=swapped(2, program(1))), 'damaged'),
    (dict(head=()), 'no PyTorch checkpoint'),
    (dict(keys=b''), 'damaged'),
    (dict(keys=program('0')), 'no list of storages'),
    (dict(keys=program([0])), 'no list of storages'),
    (dict(keys=program([])), 'disagree on storage 0'),
    (dict(keys=program(['0', '0'])), 'twice'),
    (dict(keys=program(['0', '1'])), 'disagree on storage 1'),
    (dict(keys=program(['1'])), 'disagree on storage'),
    (dict(tail=b'x'), '1 bytes follow its last storage'),
    (dict(storages={'0': (4, FOUR.tobytes()[1:])}), 'ends inside storage 0'),
    (dict(storages={'0': (4, b'')}), 'ends inside storage 0'),
    (dict(storages={}, keys=program(['0'])), 'ends before storage 0'),
    (dict(storages={'0': (3, FOUR.tobytes())}), 'has 3 elements'),
    (dict(storages={'0': (-4, FOUR.tobytes())}), 'has -4 elements'),
    (dict(storages={'0': (1 << 62, FOUR.tobytes())}), 'elements'),
    (dict(value=tensor(OLD, offset=1)), 'reaches past its storage'),
    (dict(value=tensor(OLD, size=(2, 2), stride=(3, 1))), 'reaches past'),
    (dict(value=tensor(OLD, size=(2**30,) * 2, stride=(0, 0))), 'reaches'),
    (
      dict(value=tensor(files.storage(count=2**31 - 1, more=files.NONE))),
      'has 4 elements',
    ),
    (dict(value=tensor(files.storage())), 'no storage of numbers'),
    (dict(value=tensor(OLD)[:-1]), 'damaged'),
    (dict(value=python_2(b'_rebuild_tensor_v2')), 'a tensor of 4 parts'),
    (
      dict(value=python_2(b'_rebuild_tensor', 'ComplexFloatStorage')),
      'ComplexFloatStorage',
    ),
    (dict(value=program(3)), 'disagree on storage 0'),
    (dict(value=program([]), storages={}), 'holds a list'),
  ],
)
def test_files_that_are_not_whole(tmp_path, more, words):
  made = dict(value=tensor(OLD), storages=DATA) | more
  refused(legacy(tmp_path / 'w.pt', **made), words)


def test_a_storage_of_two_types(tmp_path):
  """Its bytes would be read as one or the other."""
  double = files.storage(files.name('torch', 'DoubleStorage'), more=files.NONE)
  for other in (double, files.storage(count=2, more=files.NONE)):
    one, two = tensor(OLD)[2:-1], tensor(other, size=(2,), key='v')[3:-1]
    made = b'\x80\x02' + one + two + files.STOP
    refused(legacy(tmp_path / 'w.pt', made, DATA), 'two types or sizes')


def test_the_zip_form_has_no_sixth_part(tmp_path):
  members = {'archive/data/0': FOUR.tobytes()}
  made = files.checkpoint(tmp_path / 'w.pt', tensor(OLD), members)
  refused(made, 'no storage of numbers')


GADGETS = {
  'system': files.Calls(os.system, 'touch PWNED'),
  'eval': files.Calls(eval, "open('PWNED', 'w')"),
  'getattr': files.Calls(getattr, 'text', 'upper'),
  'Linear': torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('word', GADGETS)
@pytest.mark.parametrize('at', range(5))
def test_no_pickle_runs(tmp_path, monkeypatch, at, word, protocol):
  monkeypatch.chdir(tmp_path)
  pickles = [*files.HEAD, tensor(OLD), program(['0'])]
  pickles[at] = program(GADGETS[word], protocol)
  *head, value, keys = pickles
  made = legacy(tmp_path / 'w.pt', value, DATA, head, keys)
  assert word in refused(made, 'could run code', 'state_dict')
  assert not (tmp_path / 'PWNED').exists()


@pytest.mark.parametrize('case', ODD)
def test_odd_programs_are_refused(tmp_path, case):
  whole = b'\x80\x02' + ODD[case] + files.STOP
  path = legacy(tmp_path / 'w.pt', whole, DATA)
  refused(path, 'is not read: its pickle')


def test_a_whole_module_is_refused(tmp_path):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    path = saved(tmp_path, torch.nn.Linear(2, 2))
  refused(path, 'is not read: its pickle', 'state_dict')


def test_pickles_are_bounded(tmp_path, monkeypatch):
  """By what they ask for and by their sum, without reading it."""
  path = legacy(tmp_path / 'w.pt', b'\x80\x02X\xff\xff\xff\x0f')
  with path.open('r+b') as file:
    file.truncate(1 << 30)
  refused(path, 'more than 134217728 bytes')
  monkeypatch.setattr(torch_pickle, 'MAX_PICKLE', 200)
  refused(legacy(path, tensor(OLD), DATA), 'more than 200 bytes')
  monkeypatch.setattr(torch_pickle, 'MAX_PICKLE', 600)
  files.read_all(legacy(path, tensor(OLD), DATA))


def test_pairs_are_copied_once():
  """A short pickle cannot ask for one list again and again."""
  ordered = files.name('collections', 'OrderedDict')
  pair = b']' + files.MARK + files.text('k') + files.NONE + b'e'
  made = b'\x80\x02' + ordered + b']' + pair + b'aq\x01\x85' + files.REDUCE
  again = ordered + b'h\x01\x85' + files.REDUCE
  value, _ = torch_pickle.parse(made + again + b'\x86.', 'here')
  assert value == ({'k': None}, {})


def test_truncated_anywhere(tmp_path):
  path = saved(tmp_path, TENSORS)
  data = path.read_bytes()
  points = (*range(1, len(data), 61), len(data) - 1, len(data) - 9)
  for stop in points:
    path.write_bytes(data[:stop])
    refused(path, 'damaged')


def test_random_bytes_never_crash(tmp_path):
  """One line or the arrays, whatever bytes are changed, gone or doubled."""
  path = saved(tmp_path, {'model': {'w': BASE, 'v': BASE.T}, 'step': 3})
  data = path.read_bytes()
  rng = np.random.default_rng(0)
  failed = 0
  for _ in range(400):
    broken = bytearray(data)
    at = int(rng.integers(len(data)))
    match rng.integers(4):
      case 0:
        broken[at] ^= 1 << int(rng.integers(8))
      case 1:
        broken[at] = int(rng.integers(256))
      case 2:
        del broken[at : at + int(rng.integers(1, 9))]
      case 3:
        broken[at:at] = broken[at : at + int(rng.integers(1, 40))]
    path.write_bytes(broken)
    try:
      files.read_all(path)
    except UserError as e:
      assert '\n' not in str(e)
      failed += 1
  assert failed > 200


def test_a_file_that_changes_under_a_handle(tmp_path):
  path = saved(tmp_path, {'w': BASE})
  source = weights.open_weights(path)
  path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(UserError, match='has changed'):
    source['w'].read()


def test_names_and_contents(tmp_path):
  old = saved(tmp_path, {'w': BASE}).read_bytes()
  for ending, word in (
    ('npz', 'a zip archive'),
    ('safetensors', 'safetensors'),
  ):
    (tmp_path / f'w.{ending}').write_bytes(old)
    refused(tmp_path / f'w.{ending}', f'file is {word}: rename', 'before 1.6')
  (tmp_path / 'w.bin').write_bytes(old)
  assert list(weights.open_weights(tmp_path / 'w.bin')) == ['w']
  path = tmp_path / 'p.pt'
  path.write_bytes(pickle.dumps({'w': 1}))
  refused(path, 'a Python pickle and no PyTorch checkpoint')
  with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as file:
    file.add(tmp_path / 'w.bin', 'storages')
  refused(path, 'tar archive', 'save it again')
