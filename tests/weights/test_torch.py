"""PyTorch's two formats: read as torch reads them, and nothing in them run.

"zip" is the format since 1.6, "old" the one before. Files are torch.save's, or
made by hand where no torch of today writes them. Parity is bitwise.
"""

import builtins
import collections
import functools
import io
import os
import pickle
import sys
import tarfile
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.weights import files
from tests.weights.files import checkpoint, legacy, program, refused
from vqrae_jax import weights
from vqrae_jax.errors import UserError

torch = pytest.importorskip('torch')

FORMS = ('zip', 'old')
both_forms = pytest.mark.parametrize('form', FORMS)
FOUR = np.arange(4, dtype='<f4')
DATA = {'archive/data/0': FOUR.tobytes()}
RUNS = {'0': (4, FOUR.tobytes())}


def saved(tmp_path, value, form='zip'):
  path = tmp_path / f'{form}.pt'
  torch.save(value, path, _use_new_zipfile_serialization=form == 'zip')
  return path


def storage(form, **parts):
  return files.storage(**{'more': files.NONE if form == 'old' else b''} | parts)


def tensor(form, **parts):
  """The program of one tensor over four elements."""
  return files.tensor(**{'store': storage(form)} | parts)


def written(tmp_path, form, made):
  """A file whose value is the program `made`, over the storage FOUR."""
  if form == 'zip':
    return checkpoint(tmp_path / 'w.pt', made, DATA)
  return legacy(tmp_path / 'w.pt', made, RUNS)


def as_numpy(value: torch.Tensor) -> np.ndarray:
  value = value.detach()
  if value.dtype == torch.bfloat16:
    raw = value.contiguous().view(torch.int16).numpy()
    return raw.view(ml_dtypes.bfloat16)
  return value.numpy()


def as_torch_reads(path):
  """{key: array} of ours, equal to torch's."""
  have, want = files.read_all(path), torch.load(path, map_location='cpu')
  assert have.keys() == want.keys()
  for key, value in want.items():
    assert have[key].dtype == as_numpy(value).dtype
    assert have[key].shape == value.shape
    assert have[key].tobytes() == as_numpy(value).tobytes(), key
  return have


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


@both_forms
@pytest.mark.parametrize('kind', [dict, collections.OrderedDict])
def test_tensors_of_every_form(tmp_path, kind, form):
  path = saved(tmp_path, kind(TENSORS), form)
  want, source = as_torch_reads(path), weights.open_weights(path)
  assert list(source) == list(TENSORS)
  for key, handle in source.items():
    assert handle.shape == want[key].shape and handle.dtype == want[key].dtype
    block = tuple(slice(n // 3, n - n // 4) for n in handle.shape)
    np.testing.assert_array_equal(handle.read(block), want[key][block], key)
    np.testing.assert_array_equal(handle.read(block[:1]), want[key][block[:1]])


@both_forms
def test_a_modules_own_state_dict(tmp_path, form):
  module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
  as_torch_reads(saved(tmp_path, module.state_dict(keep_vars=True), form))


@both_forms
def test_which_section_is_taken(tmp_path, form):
  one, two, three = ({'w': torch.full((2,), v)} for v in (1.0, 2.0, 3.0))
  scalars = dict(step=7, lr=1e-3, name='run', best=None, done=True, dims=[1, 2])

  def taken(**value):
    source = weights.open_weights(saved(tmp_path, value | scalars, form))
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


@both_forms
def test_self_reference_is_harmless(tmp_path, form):
  loop: dict = {'step': 1}
  loop['self'] = loop
  refused(written(tmp_path, form, program(loop)))
  loop['w'] = loop['list'] = [loop]
  refused(written(tmp_path, form, program(loop)))


def test_the_byte_order_is_obeyed(tmp_path):
  for order, dtype in (('little', '<f4'), ('big', '>f4')):
    members = {
      'archive/data/0': FOUR.astype(dtype).tobytes(),
      'archive/byteorder': order.encode(),
    }
    path = checkpoint(tmp_path / 'w.pt', files.tensor(), members)
    np.testing.assert_array_equal(files.read_all(path)['w'], FOUR)
  members['archive/byteorder'] = b'middle'
  refused(checkpoint(path, files.tensor(), members), 'byteorder')
  # The old format is little-endian whoever wrote it.
  machine = program(dict(protocol_version=1001, little_endian=False))
  head = (*files.HEAD[:2], machine)
  path = legacy(tmp_path / 'w.pt', tensor('old'), RUNS, head)
  np.testing.assert_array_equal(as_torch_reads(path)['w'], FOUR)


@both_forms
def test_the_hand_written_file_is_what_torch_reads(tmp_path, form):
  """So that the malicious ones below differ from it by their malice alone."""
  have = as_torch_reads(written(tmp_path, form, tensor(form)))
  np.testing.assert_array_equal(have['w'], FOUR)


def python_2(kind='FloatStorage', count=4) -> bytes:
  """A state dict as Python 2 and PyTorch before 0.4 wrote it: text as bytes, an
  OrderedDict of pairs, the tensor's first form."""
  parts = files.old_text('storage') + files.name('torch', kind)
  parts += files.old_text('0') + files.old_text('cuda:0') + files.number(count)
  store = files.MARK + parts + files.NONE + files.TUPLE + files.PERSID
  call = files.name('torch._utils', '_rebuild_tensor')
  inner = store + files.number(1) + files.numbers(3) + files.numbers(1)
  made = call + files.MARK + inner + files.TUPLE + files.REDUCE
  pair = b']' + files.MARK + files.old_text('w') + made + b'e'
  ordered = files.name('collections', 'OrderedDict')
  return (
    b'\x80\x02' + ordered + b']' + pair + b'a' + b'\x85' + files.REDUCE + b'.'
  )


def test_files_of_python_2(tmp_path):
  """As torchvision's VGG16 and LPIPS's heads are."""
  have = as_torch_reads(written(tmp_path, 'old', python_2()))
  np.testing.assert_array_equal(have['w'], FOUR[1:])


def view(*numbers) -> bytes:
  parts = files.text('1') + files.numbers(*numbers)[1:-1]
  return storage('old', more=files.MARK + parts + files.TUPLE)


def test_parts_of_a_storage(tmp_path):
  """Tensors over [1, 4) of a storage, as storages once could be cut."""
  made = files.tensor(view(1, 3), offset=1, size=(2,))
  have = as_torch_reads(written(tmp_path, 'old', made))
  np.testing.assert_array_equal(have['w'], FOUR[2:])
  for made in (
    files.tensor(view(1, 3), offset=1, size=(3,)),
    files.tensor(view(2, 3)),
    files.tensor(view(1)),
    files.tensor(storage('old', more=files.number(1))),
    files.tensor(storage('old', more=files.numbers(1, 2))),
  ):
    refused(written(tmp_path, 'old', made))


ORDERED = files.name('collections', 'OrderedDict')
TENSOR = files.name('torch._utils', '_rebuild_tensor_v2')
PARAMETER = files.name('torch._utils', '_rebuild_parameter')
FLOAT = files.name('torch', 'FloatStorage')
STATE = files.EMPTY_DICT + files.text('__code__') + files.NONE + files.SETITEM
# Programs that no pickler writes, without their head and end.
ODD = {
  'reduce with odd args': TENSOR + files.numbers(1, 2) + files.REDUCE,
  'reduce of a tensor of text': TENSOR
  + files.MARK + files.text('a') * 6 + files.TUPLE + files.REDUCE,
  'reduce with no tuple': ORDERED + files.EMPTY_DICT + files.REDUCE,
  'OrderedDict of items': ORDERED + files.numbers(1) + files.REDUCE,
  'parameter of a number': PARAMETER + files.numbers(1, 2, 3) + files.REDUCE,
  'call of a storage class': FLOAT + files.numbers(1) + files.REDUCE,
  'call of a number': files.number(1) + files.numbers(1) + files.REDUCE,
  'state of a function': TENSOR + STATE + files.BUILD,
  'state of a class': ORDERED + STATE + files.BUILD,
  'state of a type': FLOAT + files.numbers(3, 1, 1) + files.BUILD,
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
  'a set of nested tuples': b'\x8f(' + b')' + b'\x85' * 200_000 + b'\x90',
  'a key of nested tuples': b'})' + b'\x85' * 200_000 + files.NONE + b's',
  'a dict of nested tuples': b'()' + b'\x85' * 200_000 + files.NONE + b'd',
  'an index of the memo': b']r\xff\xff\xff\x7f',
  'bytes that are not there': b'\x96' + b'\xff' * 4 + bytes(4),
  'text that is not there': b'\x8d' + b'\xff' * 4 + bytes(4),
}  # fmt: skip
GADGETS = {
  'os.system': files.Calls(os.system, 'touch PWNED'),
  'eval': files.Calls(eval, "open('PWNED', 'w')"),
  'exec': files.Calls(exec, "open('PWNED', 'w')"),
  'getattr': files.Calls(getattr, 'text', 'upper'),
  'partial': files.Calls(functools.partial, os.system, 'true'),
  'open': files.Calls(io.open, 'PWNED', 'w'),
  'defaultdict': collections.defaultdict(list),
  'Linear': torch.nn.Linear(2, 2),
  'a class of ours': files.Calls,
  'print': builtins.print,
}
BROKEN = (
  b'', b'.', b'\x80\x02', b'\x80\x02}', b'\x80\x02}h\x05.', b'\x80\x02t.',
  b'\x80\x02}}.', b'\x80\x02X\x01\x00\x00\x00\xff.', b'\xfe\xfe',
  files.tensor()[:-1], files.tensor()[:40],
)  # fmt: skip
MALICE = {name: b'\x80\x02' + made + files.STOP for name, made in ODD.items()}
MALICE |= {f'broken {n}': made for n, made in enumerate(BROKEN)}
MALICE |= {
  f'{name}, protocol {n}': program({'w': value}, n)
  for name, value in GADGETS.items()
  for n in range(6)
}


@both_forms
@pytest.mark.parametrize('case', MALICE)
def test_no_malice_works(tmp_path, monkeypatch, case, form):
  """No code runs, nothing is imported, and memory is bounded by the file."""
  monkeypatch.chdir(tmp_path)
  files.read_all(written(tmp_path, form, tensor(form)))  # imports the reader
  path, modules = written(tmp_path, form, MALICE[case]), set(sys.modules)
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
  pickles = [*files.HEAD, tensor('old'), program(['0'])]
  pickles[at] = program(GADGETS['os.system'])
  *head, value, keys = pickles
  refused(legacy(tmp_path / 'w.pt', value, RUNS, head, keys), 'system')
  assert not (tmp_path / 'PWNED').exists()


@both_forms
@pytest.mark.parametrize(
  'parts',
  [
    dict(size=(5,)),
    dict(offset=1),
    dict(size=(2, 2), stride=(3, 1)),
    dict(size=(4,), stride=(-1,)),
    dict(size=(2, 2), stride=(1,)),
    dict(size=(10**6, 10**6), stride=(0, 0)),
    dict(size=(2**30, 2**30), stride=(0, 0)),
    dict(size=(1,) * 33, stride=(0,) * 33),
    dict(tail=b'\x89N}' + files.text('neg') + b'\x88s'),
    dict(count=8),
    dict(count=2**31 - 1),
    dict(key='1'),
    dict(key='../x'),
    dict(kind=files.name('torch', 'ComplexFloatStorage')),
  ],
)
def test_tensors_that_lie_about_their_storage(tmp_path, parts, form):
  of = {k: v for k, v in parts.items() if k in ('count', 'key', 'kind')}
  others = {k: v for k, v in parts.items() if k not in of}
  made = tensor(form, store=storage(form, **of), **others)
  refused(written(tmp_path, form, made))


@both_forms
def test_no_elements_of_a_huge_shape(tmp_path, form):
  """(0, 2^62) has no bytes, and NumPy no such array."""
  huge = b'\x8a\x08' + (1 << 62).to_bytes(8, 'little')
  size = files.MARK + files.number(0) + huge + files.TUPLE
  made = tensor(form, size=(0, 7), stride=(7, 1))
  made = made.replace(files.numbers(0, 7), size)
  assert huge in made
  refused(written(tmp_path, form, made), '"w"')


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
  refused(checkpoint(tmp_path / 'w.pt', files.tensor(), members), name)


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_a_member_twice(tmp_path):
  path = checkpoint(tmp_path / 'w.pt', files.tensor(), DATA)
  with zipfile.ZipFile(path, 'a') as file:
    file.writestr('archive/data/0', b'x' * 16)
  refused(path)


def test_bombs(tmp_path):
  path, packed = tmp_path / 'w.pt', zipfile.ZIP_DEFLATED
  zeros = {'archive/data/0': bytes(1 << 24)}
  big = files.tensor(files.storage(count=1 << 22), size=(1 << 22,))
  refused(checkpoint(path, big, zeros, packed), '16777216')
  refused(checkpoint(path, b']' * (1 << 26), DATA), 'data.pkl')
  # Stored, the same is a tensor like any other; compressed a little, too.
  assert files.read_all(checkpoint(path, big, zeros))['w'].shape == (1 << 22,)
  noise = np.random.default_rng(0).integers(0, 9, 4, np.int32).tobytes()
  members = {'archive/data/0': noise}
  source = weights.open_weights(
    checkpoint(path, files.tensor(), members, packed)
  )
  assert source['w'].read((slice(1, 3),)).tobytes() == noise[4:12]
  # What cannot be decompressed to a bound is not.
  refused(checkpoint(path, files.tensor(), DATA, zipfile.ZIP_LZMA))


def test_members_that_overlap(tmp_path):
  """Two names for the same bytes: more is claimed than the file holds."""
  members = DATA | {f'archive/data/{i}': bytes(4096) for i in range(1, 3)}
  path = checkpoint(tmp_path / 'w.pt', files.tensor(), members)
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
  refused(path)


def head(at: int, made: bytes) -> dict:
  return dict(head=[*files.HEAD[:at], made, *files.HEAD[at + 1 :]])


@pytest.mark.parametrize(
  'parts',
  [
    head(0, program(7)),
    head(0, program('x' * 99)),
    head(1, program(1002)),
    head(1, b'\x80\x02' + b']' * 9999 + b'.'),
    head(1, b'\x80\x02' + b']' * 9999 + b'a' * 9998 + b'.'),
    head(2, program(1)),
    dict(head=()),
    *(dict(keys=program(k)) for k in ('0', [0], [], ['0', '0'], ['0', '1'])),
    dict(keys=b''),
    dict(tail=b'x'),
    dict(storages={'0': (4, FOUR.tobytes()[1:])}),
    dict(storages={'0': (4, b'')}),
    dict(storages={}, keys=program(['0'])),
    *(dict(storages={'0': (n, FOUR.tobytes())}) for n in (3, -4, 1 << 62)),
    dict(value=python_2('ComplexFloatStorage')),
    dict(value=program(3)),
    dict(value=program([]), storages={}),
    dict(value=files.tensor()),  # of the zip form
  ],
)
def test_old_files_that_are_damaged(tmp_path, parts):
  made = dict(value=tensor('old'), storages=RUNS) | parts
  refused(legacy(tmp_path / 'w.pt', **made))


@both_forms
def test_a_storage_of_two_types(tmp_path, form):
  """Its bytes would be read as one or the other."""
  double = files.name('torch', 'DoubleStorage')
  for other in (storage(form, kind=double), storage(form, count=2)):
    one, two = tensor(form), tensor(form, store=other, size=(2,), key='v')
    made = b'\x80\x02' + one[2:-1] + two[3:-1] + files.STOP
    refused(written(tmp_path, form, made))


def test_lists_are_copied_once(tmp_path):
  """A short pickle cannot ask for one list again and again."""
  pair = b']' + files.MARK + files.text('k') + files.number(3) + b'e'
  made = b'\x80\x02' + ORDERED + b']' + pair + b'aq\x01\x85' + files.REDUCE
  refused(checkpoint(tmp_path / 'w.pt', made + b'.'), 'it has k')
  made += ORDERED + b'h\x01\x85' + files.REDUCE
  refused(checkpoint(tmp_path / 'w.pt', made + b'.'), 'it has nothing')


def test_a_file_larger_than_memory_opens(tmp_path):
  """Eight gigabytes of nothing on the disk, and four values behind them."""
  count = 2**31 - 1
  made = files.tensor(storage('old', count=count), size=(count,))
  path = legacy(tmp_path / 'w.pt', made, {'0': (count, b'')})
  with path.open('r+b') as file:
    file.seek((count - 4) * 4, os.SEEK_END)
    file.write(FOUR.tobytes())
  handle = weights.open_weights(path)['w']
  np.testing.assert_array_equal(handle.read((slice(count - 4, count),)), FOUR)
  assert not handle.read((slice(0, 9),)).any()


def test_a_flipped_bit_of_a_value(tmp_path):
  """It is found when the value is read, in whichever block of it."""
  path = saved(tmp_path, {'w': BASE, 'b': torch.arange(6.0)})
  broken = bytearray(path.read_bytes())
  broken[broken.index(as_numpy(BASE).tobytes()) + 50] ^= 4
  path.write_bytes(broken)
  source = weights.open_weights(path)
  np.testing.assert_array_equal(source['b'].read(), np.arange(6.0))
  for block in (None, (slice(0, 1),)):
    with pytest.raises(UserError, match='CRC'):
      source['w'].read(block)


def test_a_file_that_changes_under_a_handle(tmp_path):
  path = saved(tmp_path, {'w': BASE}, 'old')
  source = weights.open_weights(path)
  path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(UserError, match=path.name):
    source['w'].read()


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
    match n % 4:
      case 0 | 1:
        broken[at] ^= 1 << int(rng.integers(8))
      case 2:
        del broken[at : at + int(rng.integers(1, 9))]
      case 3:
        broken[at:at] = broken[at : at + int(rng.integers(1, 40))]
    path.write_bytes(broken)
    try:
      have = files.read_all(path)
    except UserError as e:
      assert '\n' not in str(e)
      failed += 1
      continue
    if form == 'zip':  # the old format has no checksums
      assert have.keys() == good.keys()
      for key in good:
        assert have[key].tobytes() == good[key].tobytes(), at
  assert failed > 80


def test_names_and_contents(tmp_path):
  old = saved(tmp_path, {'w': BASE}, 'old').read_bytes()
  (tmp_path / 'w.npz').write_bytes(old)
  refused(tmp_path / 'w.npz', 'rename')
  (tmp_path / 'w.bin').write_bytes(old)
  assert list(weights.open_weights(tmp_path / 'w.bin')) == ['w']
  path = tmp_path / 'p.pt'
  path.write_bytes(pickle.dumps({'w': 1}))
  refused(path, 'torch.save')
  with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as file:
    file.add(tmp_path / 'w.bin', 'storages')
  refused(path, 'tar archive')
