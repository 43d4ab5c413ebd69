"""PyTorch's two formats: read as torch reads them, and nothing in them run.

"zip" is the format since 1.6, "old" the one before. Files are torch.save's, or
made by hand where no torch of today writes them. Parity is bitwise.
"""

import builtins
import collections
import functools
import io
import os
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from tests.weights import files
from tests.weights.files import Calls, Reference, checkpoint, legacy, refused
from vqrae_jax.errors import UserError
from vqrae_jax.weights.files import open_weights

torch = pytest.importorskip('torch')

both_forms = pytest.mark.parametrize('form', ('zip', 'old'))
FOUR = np.arange(4, dtype='<f4')
DATA = {'archive/data/0': FOUR.tobytes()}
RUNS = {'0': (4, FOUR.tobytes())}
REBUILD = torch._utils._rebuild_tensor_v2


def saved(tmp_path, value, form='zip'):
  path = tmp_path / f'{form}.pt'
  torch.save(value, path, _use_new_zipfile_serialization=form == 'zip')
  return path


def storage(form, kind=torch.FloatStorage, key='0', count=4, view=None):
  """`view` is the sixth part, which the format before 1.6 alone has."""
  parts = 'storage', kind, key, 'cpu', count
  return Reference(parts if form == 'zip' and view is None else (*parts, view))


def tensor(form, store=None, offset=0, size=(4,), stride=(1,), more=()):
  parts = store or storage(form), offset, size, stride, False, None, *more
  return Calls(REBUILD, *parts)


def written(tmp_path, form, value):
  """A file of a value, or of its program, over the storage FOUR."""
  if form == 'zip':
    return checkpoint(tmp_path / 'w.pt', value, DATA)
  return legacy(tmp_path / 'w.pt', value, RUNS)


def as_torch_reads(path):
  """The arrays of a file; ours are torch's."""
  want = {}
  for key, value in torch.load(path, map_location='cpu').items():
    raw = value.detach().contiguous().flatten().view(torch.uint8).numpy()
    dtype = str(value.dtype).removeprefix('torch.')
    want[key] = raw.view(dtype).reshape(value.shape)
  files.same(path, want)
  return want


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
}


@both_forms
def test_tensors_of_every_form(tmp_path, form):
  module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
  as_torch_reads(saved(tmp_path, TENSORS, form))
  as_torch_reads(saved(tmp_path, module.state_dict(keep_vars=True), form))


@both_forms
def test_which_section_is_taken(tmp_path, form):
  one, two, three = ({'w': torch.full((2,), v)} for v in (1.0, 2.0, 3.0))
  scalars = dict(step=7, lr=1e-3, name='run', best=None, done=True, dims=[1, 2])

  def taken(**value):
    source = open_weights(saved(tmp_path, value | scalars, form))
    return source['w'].read()[0], source.note

  assert taken(ema=one, model=two, state_dict=three)[0] == 1
  value, note = taken(model=two, optimizer=three)
  assert value == 2 and 'model' in note and 'optimizer' in note
  assert taken(ema=None, model=two)[0] == 2
  assert taken(ema={}, state_dict=three)[0] == 3
  value, note = taken(**three)
  assert value == 3 and 'step' in note


@both_forms
@pytest.mark.parametrize(
  ('value', 'words'),
  [
    (dict(step=3), 'step'),
    ([torch.ones(2)], 'list'),
    (torch.ones(2), 'Tensor'),
    ({'w': torch.ones(2), 'deep': {'v': torch.ones(2)}}, '"deep"'),
    ({'model': {'w': torch.ones(2), 'l': [torch.ones(1)]}}, '"l"'),
    ({1: torch.ones(2)}, '1'),
  ],
)
def test_files_without_a_dict_of_tensors(tmp_path, value, words, form):
  refused(saved(tmp_path, value, form), words)


def test_the_byte_order_is_obeyed(tmp_path):
  for order, dtype in (('little', '<f4'), ('big', '>f4')):
    members = {
      'archive/data/0': FOUR.astype(dtype).tobytes(),
      'archive/byteorder': order.encode(),
    }
    path = checkpoint(tmp_path / 'w.pt', {'w': tensor('zip')}, members)
    np.testing.assert_array_equal(files.read_all(path)['w'], FOUR)
  members['archive/byteorder'] = b'middle'
  refused(checkpoint(path, {'w': tensor('zip')}, members), 'byteorder')
  # The old format is little-endian whoever wrote it.
  head = (*files.HEAD[:2], dict(protocol_version=1001, little_endian=False))
  path = legacy(tmp_path / 'w.pt', {'w': tensor('old')}, RUNS, head)
  np.testing.assert_array_equal(as_torch_reads(path)['w'], FOUR)


def python_2(kind=b'FloatStorage') -> bytes:
  """A state dict as Python 2 and PyTorch before 0.4 wrote it: text as bytes, an
  OrderedDict of pairs, the tensor's first form. So are torchvision's VGG16 and
  LPIPS's heads."""
  store = b'(U\x07storagectorch\n' + kind + b'\nU\x010U\x06cuda:0K\x04NtQ'
  made = b'ctorch._utils\n_rebuild_tensor\n(' + store + b'K\x01(K\x03t(K\x01ttR'
  return b'\x80\x02' + ORDERED + b']](U\x01w' + made + b'ea\x85R.'


# As bytes: for programs that no pickler writes.
ORDERED = b'ccollections\nOrderedDict\n'
TENSOR = b'ctorch._utils\n_rebuild_tensor_v2\n'
FLOAT = b'ctorch\nFloatStorage\n'
PART = storage('old', view=('1', 1, 3))  # as storages once could be cut


@pytest.mark.parametrize(
  ('form', 'value', 'want'),
  [
    ('zip', {'w': tensor('zip')}, FOUR),
    ('old', {'w': tensor('old')}, FOUR),
    ('old', python_2(), FOUR[1:]),
    ('old', {'w': tensor('old', PART, 1, (2,))}, FOUR[2:]),
  ],
)
def test_hand_written_files_are_what_torch_reads(tmp_path, form, value, want):
  """So that the malicious ones below differ from it by their malice alone."""
  have = as_torch_reads(written(tmp_path, form, value))
  np.testing.assert_array_equal(have['w'], want)


STATE = b'}X\x08\0\0\0__code__Nsb'
ODD = {
  'nothing': b'',
  'two values': b'}}',
  'an empty memo': b'}h\x05',
  'a tuple from nowhere': b't',
  'text that is none': b'X\x01\x00\x00\x00\xff',
  'reduce with no tuple': ORDERED + b'}R',
  'call of a number': b'K\x01K\x01\x85R',
  'state of a function': TENSOR + STATE,
  'state of a class': ORDERED + STATE,
  'state of a type': FLOAT + b'(K\x03K\x01K\x01tb',
  'state of a plain dict': b'}}b',
  'an object by its class': ORDERED + b')\x81',
  'a registered extension': b'\x82\x01',
  'a text persistent id': b'Pstorage\n',
  'items of a tuple': b'K\x01\x85K\x00K\x01s',
  'an old instance': b'(ios\nsystem\n',
  'a set of nested tuples': b'\x8f(' + b')' + b'\x85' * 200_000 + b'\x90',
  'a key of nested tuples': b'})' + b'\x85' * 200_000 + b'Ns',
  'a dict of nested tuples': b'()' + b'\x85' * 200_000 + b'Nd',
  'an index of the memo': b']r\xff\xff\xff\x7f',
  'bytes that are not there': b'\x96' + b'\xff' * 4 + bytes(4),
  'text that is not there': b'\x8d' + b'\xff' * 4 + bytes(4),
}
GADGETS = {
  'os.system': Calls(os.system, 'touch PWNED'),
  'eval': Calls(eval, "open('PWNED', 'w')"),
  'exec': Calls(exec, "open('PWNED', 'w')"),
  'partial': Calls(functools.partial, os.system, 'true'),
  'open': Calls(io.open, 'PWNED', 'w'),
  'getattr': Calls(getattr, 'text', 'upper'),
  'defaultdict': collections.defaultdict(list),
  'Linear': torch.nn.Linear(2, 2),
  'a class of ours': Calls,
  'print': builtins.print,
}


def malice(form):
  """{case: value or program}"""
  loop: dict = {'step': 1}
  loop |= {'self': loop, 'w': [loop]}
  made = {
    'a loop': loop,
    'reduce with odd args': Calls(REBUILD, 1, 2),
    'reduce of a tensor of text': Calls(REBUILD, *'aaaaaa'),
    'OrderedDict of items': Calls(collections.OrderedDict, 1),
    'parameter of a number': Calls(torch._utils._rebuild_parameter, 1, 2, 3),
    'call of a storage class': Calls(torch.FloatStorage, 1),
    'persistent id of a number': Reference(7),
    'persistent id of another kind': Reference(('module', *[None] * 4)),
    'storage of a function': storage(form, REBUILD),
    'storage without a class': storage(form, 'FloatStorage'),
    'storage of negative size': storage(form, count=-4),
  }
  made |= {name: b'\x80\x02' + code + b'.' for name, code in ODD.items()}
  return made | {
    f'{name}, protocol {n}': files.program({'w': value}, n)
    for name, value in GADGETS.items()
    for n in range(6)
  }


@both_forms
@pytest.mark.parametrize('case', malice('zip'))
def test_no_malice_works(tmp_path, monkeypatch, case, form):
  """No code runs, nothing is imported, and memory is bounded by the file."""
  monkeypatch.chdir(tmp_path)
  files.read_all(written(tmp_path, form, {'w': tensor(form)}))  # imports it
  path, modules = written(tmp_path, form, malice(form)[case]), set(sys.modules)
  tracemalloc.start()
  try:
    refused(path)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < (64 << 20 if 'nested' in case else 16 << 20)
  assert not (tmp_path / 'PWNED').exists()
  assert set(sys.modules) == modules


@pytest.mark.parametrize('at', range(5))
def test_no_pickle_of_the_old_format_runs(tmp_path, monkeypatch, at):
  monkeypatch.chdir(tmp_path)
  pickles = [*files.HEAD, {'w': tensor('old')}, ['0']]
  pickles[at] = GADGETS['os.system']
  *head, value, keys = pickles
  refused(legacy(tmp_path / 'w.pt', value, RUNS, head, keys), 'system')
  assert not (tmp_path / 'PWNED').exists()


@both_forms
@pytest.mark.parametrize(
  ('parts', 'stored'),
  [
    (dict(size=(5,)), {}),
    (dict(offset=1), {}),
    (dict(size=(2, 2), stride=(3, 1)), {}),
    (dict(stride=(-1,)), {}),
    (dict(size=(2, 2)), {}),
    (dict(size=(10**6, 10**6), stride=(0, 0)), {}),
    (dict(size=(2**30, 2**30), stride=(0, 0)), {}),
    # No bytes, and NumPy has no such array.
    (dict(size=(0, 1 << 62), stride=(7, 1)), {}),
    (dict(size=(1,) * 33, stride=(0,) * 33), {}),
    (dict(more=({'neg': True},)), {}),
    ({}, dict(count=8)),
    ({}, dict(count=2**31 - 1)),
    ({}, dict(key='1')),
    ({}, dict(key='../x')),
    ({}, dict(kind=torch.ComplexFloatStorage)),
    (dict(offset=1, size=(3,)), dict(view=('1', 1, 3))),
    ({}, dict(view=('1', 2, 3))),
    ({}, dict(view=('1', 1))),
    ({}, dict(view=(1, 2))),
    ({}, dict(view=1)),
  ],
)
def test_tensors_that_lie_about_their_storage(tmp_path, parts, stored, form):
  lie = tensor(form, storage(form, **stored), **parts)
  refused(written(tmp_path, form, {'w': lie}))


@pytest.mark.parametrize(
  'name',
  [
    'archive/code/evil.py',
    'archive/data/0.py',
    '../data/1',
    '/etc/data/1',
    'archive/data/../../1',
    'other/data/1',
    'archive/data/',
  ],
)
def test_foreign_members(tmp_path, name):
  members = DATA | {name: b'x'}
  refused(checkpoint(tmp_path / 'w.pt', {'w': tensor('zip')}, members), name)


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_a_member_twice(tmp_path):
  path = written(tmp_path, 'zip', {'w': tensor('zip')})
  with zipfile.ZipFile(path, 'a') as file:
    file.writestr('archive/data/0', b'x' * 16)
  refused(path, 'overlap')


def test_members_that_overlap(tmp_path):
  """Two names for the same bytes: more is claimed than the file holds."""
  members = DATA | {f'archive/data/{i}': bytes(4096) for i in range(1, 3)}
  path = checkpoint(tmp_path / 'w.pt', {'w': tensor('zip')}, members)
  with zipfile.ZipFile(path, 'a') as file:
    one, two = file.infolist()[-2:]
    file.start_dir, two.header_offset = two.header_offset, one.header_offset
    file.comment = b''  # so that the directory is written over the last member
  refused(path, 'overlap')


def test_bombs(tmp_path):
  path, packed = tmp_path / 'w.pt', zipfile.ZIP_DEFLATED
  zeros = {'archive/data/0': bytes(1 << 24)}
  many = 1 << 22
  big = {'w': tensor('zip', storage('zip', count=many), size=(many,))}
  refused(checkpoint(path, big, zeros, packed), '16777216')
  refused(checkpoint(path, b']' * (1 << 26), DATA), 'data.pkl')
  # Stored, the same is a tensor like any other; compressed a little, too.
  assert files.read_all(checkpoint(path, big, zeros))['w'].shape == (many,)
  noise = np.random.default_rng(0).integers(0, 9, 4, np.int32).tobytes()
  small = {'w': tensor('zip')}
  checkpoint(path, small, {'archive/data/0': noise}, packed)
  assert files.read_all(path)['w'].tobytes() == noise
  # What cannot be decompressed to a bound is not.
  refused(checkpoint(path, small, DATA, zipfile.ZIP_LZMA))


def head(at: int, made) -> dict:
  return dict(head=[*files.HEAD[:at], made, *files.HEAD[at + 1 :]])


@pytest.mark.parametrize(
  'parts',
  [
    head(0, 7),
    head(0, 'x' * 99),
    head(1, 1002),
    head(1, b'\x80\x02' + b']' * 9999 + b'.'),
    head(1, b'\x80\x02' + b']' * 9999 + b'a' * 9998 + b'.'),
    head(2, 1),
    dict(head=()),
    *(dict(keys=k) for k in ('0', [0], [], ['0', '0'], ['0', '1'])),
    dict(keys=b''),
    dict(tail=b'x'),
    dict(storages={'0': (4, FOUR.tobytes()[1:])}),
    dict(storages={'0': (4, b'')}),
    dict(storages={}, keys=['0']),
    *(dict(storages={'0': (n, FOUR.tobytes())}) for n in (3, -4, 1 << 62)),
    dict(value=python_2(b'ComplexFloatStorage')),
    dict(value=3),
    dict(value=[], storages={}),
    dict(value={'w': tensor('zip')}),
  ],
)
def test_old_files_that_are_damaged(tmp_path, parts):
  made = dict(value={'w': tensor('old')}, storages=RUNS) | parts
  refused(legacy(tmp_path / 'w.pt', **made))


@both_forms
def test_a_storage_of_two_types(tmp_path, form):
  """Its bytes would be read as one or the other."""
  for other in (dict(kind=torch.DoubleStorage), dict(count=2)):
    two = tensor(form, storage(form, **other), 0, (2,))
    refused(written(tmp_path, form, {'w': tensor(form), 'v': two}))


def test_lists_are_copied_once(tmp_path):
  """A short pickle cannot ask for one list again and again."""
  pair = b'](X\x01\0\0\0kK\x03e'
  made = b'\x80\x02' + ORDERED + b']' + pair + b'aq\x01\x85R'
  refused(written(tmp_path, 'zip', made + b'.'), 'it has k')
  made += ORDERED + b'h\x01\x85R.'
  refused(written(tmp_path, 'zip', made), 'it has nothing')


def test_a_file_larger_than_memory_opens(tmp_path):
  """Eight gigabytes of nothing on the disk, and four values behind them."""
  count = 2**31 - 1
  value = {'w': tensor('old', storage('old', count=count), count - 4)}
  path = legacy(tmp_path / 'w.pt', value, {'0': (count, b'')})
  with path.open('r+b') as file:
    file.seek((count - 4) * 4, os.SEEK_END)
    file.write(FOUR.tobytes())
  np.testing.assert_array_equal(files.read_all(path)['w'], FOUR)


def test_a_file_that_changes_under_a_handle(tmp_path):
  path = saved(tmp_path, {'w': BASE}, 'old')
  source = open_weights(path)
  path.write_bytes(path.read_bytes()[:-8])
  assert path.name in files.error_of(source['w'].read)


@both_forms
def test_damage_of_any_kind_is_one_line(tmp_path, form):
  """Cut, flipped, gone or doubled bytes: an error, or the arrays."""
  path = saved(tmp_path, {'model': {'w': BASE, 'v': BASE.T}, 'step': 3}, form)
  data, good = path.read_bytes(), files.read_all(path)
  for stop in (*range(0, len(data), 97), len(data) - 1, len(data) - 30):
    path.write_bytes(data[:stop])
    refused(path)
  rng, failed = np.random.default_rng(0), 0
  for n in range(200):
    broken, at = bytearray(data), int(rng.integers(len(data)))
    size, times = int(rng.integers(1, 40)), n % 3  # times 0 or 2: gone, doubled
    broken[at : at + size] = broken[at : at + size] * times
    broken[at - 1] ^= (times == 1) << int(rng.integers(8))
    path.write_bytes(broken)
    try:
      have = files.read_all(path)
    except UserError as e:
      assert '\n' not in str(e)
      failed += 1
      continue
    if form == 'zip':  # the old format has no checksums
      files.equal(have, good)
  assert failed > 80
