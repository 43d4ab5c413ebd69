"""The tar index against the standard library's, and reads at random."""

import ast
import concurrent.futures
import io
import os
import pathlib
import pickle
import tarfile

import numpy as np
import pytest

import vqrae_jax.data
from tests.data import makers
from vqrae_jax.data import sources, tar
from vqrae_jax.data.decode import ImageDecodeError
from vqrae_jax.errors import UserError

FORMS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


@pytest.fixture
def few(monkeypatch):
  """Indices of small tars are kept too."""
  monkeypatch.setattr(tar, '_MIN_KEPT', 2)


def shard(path, numbers=range(3), form=tarfile.GNU_FORMAT):
  members = []
  for i in numbers:
    members += [
      (f'{i:06}.cls', b'7'),
      (f'{i:06}.png', makers.png(i)),
      (f'{i:06}.pkl', pickle.dumps([])),
    ]
  return makers.tar(path, members, form)


def walked(data):
  return list(tar.walk(io.BytesIO(data), len(data)))


def as_tarfile_has_it(data):
  with tarfile.open(fileobj=io.BytesIO(data)) as file:
    return [
      (os.fsencode(m.name), m.offset_data, m.size)
      for m in file.getmembers()
      if m.isreg() and not m.issparse()
    ]


@pytest.mark.parametrize('form', FORMS)
def test_members_are_those_of_tarfile(form):
  out = io.BytesIO()
  long = 'folder' * 12 + '/' + 'name' * 15 + '.jpg'
  with tarfile.open(fileobj=out, mode='w', format=form) as file:

    def add(name, size=0, kind=tarfile.REGTYPE, **keys):
      info = tarfile.TarInfo(name)
      info.size, info.type = size, kind
      for key, value in keys.items():
        setattr(info, key, value)
      file.addfile(info, io.BytesIO(b'x' * size) if size else None)

    add('a', kind=tarfile.DIRTYPE)
    add('a/x.jpg', 5)
    add(long, 512)
    add('a/link.jpg', kind=tarfile.SYMTYPE, linkname='x.jpg')
    add('a/hard.jpg', kind=tarfile.LNKTYPE, linkname='a/x.jpg')
    add('a/long-link', kind=tarfile.SYMTYPE, linkname='l' * 99)
    add('pipe', kind=tarfile.FIFOTYPE)
    add('dev', kind=tarfile.CHRTYPE, devmajor=1, devminor=3)
    add('empty.jpg')
    add('café.jpg', 513, uname='jürgen')
    if form != tarfile.USTAR_FORMAT:
      add('much ' * 70 + '.png', 1025, linkname='', mtime=1.5)
      add('b', kind=tarfile.SYMTYPE, linkname='far/' * 60)
    add('last.png', 3)
  found = walked(out.getvalue())
  assert found == as_tarfile_has_it(out.getvalue())
  assert len(found) == (6 if form != tarfile.USTAR_FORMAT else 5)
  assert walked(out.getvalue() + b'\0' * 5000) == found


def test_sizes_beyond_octal(tmp_path):
  """A member of 9 GB that takes no disk; GNU's base 256 and pax's size."""
  size = 9 << 30
  for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
    big = tarfile.TarInfo('big.bin')
    big.size = size
    after = tarfile.TarInfo('x.png')
    after.size = 1
    path = tmp_path / f'{form}.tar'
    with open(path, 'wb') as file:
      file.write(big.tobuf(format=form))
      data = file.tell()
      file.seek(data + size)
      file.write(after.tobuf(format=form) + b'x'.ljust(1536, b'\0'))
    with open(path, 'rb') as file:
      found = list(tar.walk(file, path.stat().st_size))
    assert found == [
      (b'big.bin', data, size),
      (b'x.png', data + size + 512, 1),
    ]
    path.unlink()


def test_damaged_headers_end_the_walk_and_nothing_else():
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w', format=tarfile.PAX_FORMAT) as file:
    for i in range(4):
      info = tarfile.TarInfo(f'{"é" * 60}{i}.jpg')
      info.size = 700
      file.addfile(info, io.BytesIO(b'x' * 700))
  whole = out.getvalue()
  names = [name for name, _, _ in walked(whole)]
  rng = np.random.default_rng(0)
  for _ in range(400):
    data = bytearray(whole)
    for at in rng.integers(0, len(data), 2):
      data[at] = rng.integers(256)
    data = bytes(data[: rng.integers(1, len(data) + 1)])
    found = []
    try:
      for name, offset, size in tar.walk(io.BytesIO(data), len(data)):
        found.append(name)
        assert offset + size <= len(data)
    except tar.Damaged as e:
      assert str(e)
    assert len(found) <= len(names)


def index_of(tmp_path, *names):
  path = makers.tar(tmp_path / 'x.tar', [(n, n.encode()) for n in names])
  index = tar.index_tar(str(path))
  data = path.read_bytes()
  for name, at, size in zip(
    index.names, index.offsets, index.sizes, strict=True
  ):
    assert data[at : at + size] == name.encode()
  return list(index.names)


@pytest.mark.parametrize(
  'members, images',
  [
    ('1.jpg 1.cls 2.jpg', '1.jpg 2.jpg'),
    ('1.json 1.JPG 1.txt 2.webp', '1.JPG 2.webp'),
    ('1.jpg 1.mask.png 2.mask.png 2.jpg', '1.jpg 2.jpg'),
    ('1.jpg 1.png', '1.jpg'),
    ('a/1.jpg b/1.jpg b.c/1.png', 'a/1.jpg b/1.jpg b.c/1.png'),
    ('photo.1.jpg photo.2.jpg', 'photo.1.jpg photo.2.jpg'),
    ('1.jpg ._1.jpg .hidden.jpg 2.pyd 2.pkl', '1.jpg'),
    ('1.pkl 1.jpg.pkl 1.pickle', ''),
  ],
)
def test_a_sample_has_one_image(tmp_path, members, images):
  assert index_of(tmp_path, *members.split()) == images.split()


def test_shards_are_one_source(tmp_path):
  (tmp_path / 'deep').mkdir()
  shard(tmp_path / 'b-01.tar', range(3))
  shard(tmp_path / 'b-02.tar', range(3, 7), tarfile.PAX_FORMAT)
  makers.tar(tmp_path / 'deep' / 'c.tar', [('d/7.png', makers.png(7))])
  words = '', '/**/*.tar', '/{b-{01..02},deep/c}.tar'
  for source in (sources.open_source(f'{tmp_path}{w}') for w in words):
    assert len(source) == 8
    for i in np.random.default_rng(0).permutation(8).tolist():
      np.testing.assert_array_equal(source[i], makers.photo(i))
    assert source.name(4) == 'b-02.tar:000004.png'
    assert source.name(7) == 'deep/c.tar:d/7.png' and source.names[7] == '7'
    assert source.size(7) == (20, 24)
    assert [p.name for p in source.paths] == ['b-01.tar', 'b-02.tar', 'c.tar']
  source = sources.open_source(str(tmp_path / 'b*'), exclude=('00000[123]',))
  assert source.names == ['000000', '000004', '000005', '000006']
  np.testing.assert_array_equal(source[1], makers.photo(4))
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(again[1], makers.photo(4))


def test_bytes_of_other_members_are_never_read(tmp_path, monkeypatch):
  path = shard(tmp_path / 'x.tar')
  read, real = [], os.pread
  monkeypatch.setattr(
    os, 'pread', lambda fd, n, at: read.append((at, n)) or real(fd, n, at)
  )
  source = sources.open_source(str(path))
  for i in range(3):
    source[i]
  with tarfile.open(path) as file:
    images = [(m.offset_data, m.size) for m in file if m.name.endswith('.png')]
  assert read == images


def test_nothing_here_unpickles():
  for path in pathlib.Path(vqrae_jax.data.__file__).parent.glob('*.py'):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.Import | ast.ImportFrom):
        assert 'pickle' not in ast.unparse(node), path
    assert 'allow_pickle=True' not in text
    assert text.count('np.load(') == text.count('allow_pickle=False'), path


@pytest.fixture
def warned(monkeypatch):
  lines = []
  monkeypatch.setattr(
    'vqrae_jax.data.tar.logging.warning',
    lambda text, *values: lines.append(text % values),
  )
  return lines


def test_of_a_truncated_tar_the_images_before_are_kept(tmp_path, few, warned):
  data = shard(tmp_path / 'x.tar', range(5)).read_bytes()
  with tarfile.open(tmp_path / 'x.tar') as file:
    last = file.getmember('000003.png').offset_data
  (tmp_path / 'x.tar').write_bytes(data[: last + 20])
  makers.settle(tmp_path)
  for _ in range(2):  # At every start, so from no cache.
    source = sources.open_source(str(tmp_path))
    assert source.names == ['000000', '000001', '000002']
    np.testing.assert_array_equal(source[2], makers.photo(2))
    assert 'x.tar is damaged: it ends inside a member' in warned.pop()
  (tmp_path / 'x.tar').write_bytes(data[:600] + b'?' * 900 + data[1500:])
  with pytest.raises(UserError, match='holds no image: no header of a tar'):
    sources.open_source(str(tmp_path))


@pytest.mark.parametrize(
  'data, words',
  [
    (b'', 'no image inside; wanted are members such as .* holds nothing'),
    (b'\0' * 10240, 'it holds nothing'),
    (b'\x1f\x8b' + b'z' * 2000, 'holds no image: no header of a tar at byte 0'),
    (b'<html>', 'holds no image: it ends inside a header'),
  ],
)
def test_what_is_no_tar_of_images(tmp_path, data, words):
  (tmp_path / 'x.tar').write_bytes(data)
  with pytest.raises(UserError, match=words):
    sources.open_source(str(tmp_path))


def test_a_tar_without_images_says_what_it_holds(tmp_path):
  makers.tar(tmp_path / 'x.tar', [('1.cls', b'1'), ('1.pkl', b'2')])
  makers.tar(tmp_path / 'y.tar', [('1.json', b'1')])
  words = r'x\.tar and 1 others: no image inside.* holds \.cls, \.json, \.pkl'
  with pytest.raises(UserError, match=words):
    sources.open_source(str(tmp_path))


def test_a_broken_member_is_named(tmp_path):
  members = [('1.jpg', b''), ('2.png', makers.png(2)[:99]), ('3.png', b'x')]
  source = sources.open_source(str(makers.tar(tmp_path / 'x.tar', members)))
  for i, reason in enumerate(('empty file', '.', 'content is none')):
    with pytest.raises(
      ImageDecodeError, match=rf'x\.tar:{i + 1}\.\w+: .*{reason}'
    ):
      source[i]


def test_a_shard_that_changed_or_went_stops_the_run(tmp_path):
  first, second = shard(tmp_path / '1.tar'), shard(tmp_path / '2.tar')
  source = sources.open_source(str(tmp_path))
  first.write_bytes(second.read_bytes() + b'\0' * 512)
  second.unlink()
  with pytest.raises(UserError, match=r'1\.tar has changed since') as caught:
    source[0]
  assert not isinstance(caught.value, ImageDecodeError)
  with pytest.raises(UserError, match=r'2\.tar is gone since'):
    source[3]


def opens(tmp_path, monkeypatch):
  """Names of a source, and whether headers were read for them."""
  reads, real = [], tar._read
  monkeypatch.setattr(
    tar, '_read', lambda *args: reads.append(1) or real(*args)
  )
  source = sources.open_source(str(tmp_path))
  monkeypatch.setattr(tar, '_read', real)
  return source.names, len(reads)


def test_an_index_is_read_once_a_shard(tmp_path, monkeypatch, few):
  data = tmp_path / 'data'
  data.mkdir()
  shard(data / '1.tar', range(3))
  shard(data / '2.tar', range(3, 6))
  makers.settle(data)
  names, read = opens(data, monkeypatch)
  assert read == 2
  assert opens(data, monkeypatch) == (names, 0)
  # Of the same size and time, as a copy with kept times would have.
  status = os.stat(data / '2.tar')
  shard(data / '2.tar', range(6, 9))
  os.utime(data / '2.tar', ns=(status.st_atime_ns, status.st_mtime_ns))
  assert os.stat(data / '2.tar').st_size == status.st_size
  names = [f'{i:06}' for i in (0, 1, 2, 6, 7, 8)]
  assert opens(data, monkeypatch) == (names, 1)
  shard(data / '2.tar', range(9, 11))
  names = [f'{i:06}' for i in (0, 1, 2, 9, 10)]
  assert opens(data, monkeypatch) == (names, 1)


def test_a_damaged_index_is_read_anew(tmp_path, monkeypatch, few, cache_folder):
  shard(tmp_path / '1.tar')
  makers.settle(tmp_path)
  names, _ = opens(tmp_path, monkeypatch)
  (entry,) = cache_folder.iterdir()
  good = entry.read_bytes()
  for data in (b'', good[:100], good.replace(b'000001', b'000009')):
    entry.write_bytes(data)
    assert opens(tmp_path, monkeypatch) == (names, 1)
  assert opens(tmp_path, monkeypatch) == (names, 0)


def test_many_threads_and_few_open_files(tmp_path, monkeypatch):
  monkeypatch.setattr('vqrae_jax.data.tar._MAX_OPEN', 2)
  for i in range(5):
    shard(tmp_path / f'{i}.tar', range(4 * i, 4 * i + 4))
  source = sources.open_source(str(tmp_path))

  def read(seed):
    for i in np.random.default_rng(seed).integers(0, 20, 60).tolist():
      np.testing.assert_array_equal(source[i], makers.photo(i))

  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    list(pool.map(read, range(6)))
  assert len(source._opened) == 2


def test_real_shards(shared_data):
  path = shared_data / 'cifar10_wds' / 'test-00000.tar'
  source = sources.open_source(str(path))
  with tarfile.open(path) as file:
    members = [m for m in file if m.name.endswith('.jpg')]
    assert len(source) == len(members) == 1500
    for i in (0, 700, 1499):
      assert source.name(i) == f'test-00000.tar:{members[i].name}'
      with source._open(i) as found:
        assert found.read() == file.extractfile(members[i]).read()
  assert source[700].shape == (32, 32, 3)
