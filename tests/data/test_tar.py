"""Tar shards: which members are images, damage, the kept index, reads."""

import concurrent.futures
import gzip
import json
import os
import tarfile
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from tests.data import makers
from vqrae_jax.data import sources, tar
from vqrae_jax.data.decode import ImageDecodeError
from vqrae_jax.errors import UserError

FORMS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
  """No test here reads or leaves a cache of the user."""
  folder = tmp_path_factory.mktemp('cache')
  monkeypatch.setenv('VQRAE_JAX_CACHE', str(folder))
  return folder


def shard(path, numbers=range(3), form=tarfile.GNU_FORMAT):
  members = [
    (f'{i:06}.{end}', data)
    for i in numbers
    for end, data in (('cls', b'7'), ('png', makers.png(i)), ('pkl', b'\x80.'))
  ]
  return makers.tar(path, members, form)


def settle(folder):
  """Sets the times of its tars back, as if nothing had just changed."""
  for path in folder.glob('*.tar'):
    os.utime(path, (0, 0))


@pytest.mark.parametrize('form', FORMS)
def test_regular_members_alone_are_walked(tmp_path, form):
  folder, path = tmp_path / 'a', tmp_path / 'x.tar'
  folder.mkdir()
  (folder / 'x.jpg').write_bytes(b'x' * 513)
  long = 'name' * (20 if form == tarfile.USTAR_FORMAT else 50)
  (folder / f'{long}é.jpg').write_bytes(b'long')
  (folder / 'empty.jpg').touch()
  (folder / 'link.jpg').symlink_to('x.jpg')
  (folder / 'hard.jpg').hardlink_to(folder / 'x.jpg')
  os.mkfifo(folder / 'pipe.jpg')
  with tarfile.open(path, 'w', format=form) as file:
    file.add(folder, 'a')
  data = path.read_bytes()
  found = [data[at : at + size] for _, at, size in tar.walk(str(path))]
  assert sorted(found) == [b'', b'long', b'x' * 513]


def test_damaged_bytes_end_the_walk_and_nothing_else(tmp_path):
  path, rng = tmp_path / 'x.tar', np.random.default_rng(0)
  members = [(f'{"é" * 60}{i}.jpg', b'x' * 700) for i in range(4)]
  for form in FORMS[1:]:
    good = makers.tar(path, members, form).read_bytes()
    for _ in range(200):
      data = bytearray(good[: rng.integers(1, len(good) + 1)])
      for at in rng.integers(0, len(data), 2):
        data[at] = rng.integers(256)
      path.write_bytes(data)
      images, _ = tar.images_in(str(path))
      assert len(images) <= 4
      assert all(at + size <= len(data) for _, at, size, _ in images)


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
  names = members.split()
  path = makers.tar(tmp_path / 'x.tar', [(n, n.encode()) for n in names])
  data, (found, damage) = path.read_bytes(), tar.images_in(str(path))
  assert [name for name, *_ in found] == images.split() and not damage
  for name, at, size, _ in found:
    assert data[at : at + size] == name.encode()


def test_a_label_is_the_integer_beside_an_image(tmp_path, cache_folder):
  members = [
    ('1.cls', b'7'), ('1.jpg', b''), ('2.jpg', b''), ('2.CLS', b' 12\n'),
    ('3.jpg', b''), ('4.jpg', b''), ('4.cls', b'cat'), ('5.cls', b'9' * 99),
    ('5.jpg', b''), ('6.cls', b'3'), ('b.0.jpg', b''), ('b.1.jpg', b''),
    ('b.cls', b'-1'),
  ]  # fmt: skip
  labels = [7, 12, None, None, None, -1, -1]
  makers.tar(tmp_path / 'x.tar', members)
  settle(tmp_path)
  for _ in range(2):  # the second from the kept index
    source = sources.open_source(str(tmp_path))
    assert [source.label(i) for i in range(7)] == labels
    assert source.classes is None
  # An index that was kept before there were labels.
  (entry,) = cache_folder.iterdir()
  path, stamp, rows = json.loads(gzip.decompress(entry.read_bytes()))
  old = json.dumps([path, stamp, [row[:3] for row in rows]])
  entry.write_bytes(gzip.compress(old.encode()))
  source = sources.open_source(str(tmp_path), exclude=('1',))
  assert [source.label(i) for i in range(6)] == labels[1:]


def test_shards_are_one_source(tmp_path):
  (tmp_path / 'deep').mkdir()
  shard(tmp_path / 'b-01.tar', range(3))
  shard(tmp_path / 'b-02.tar', range(3, 7), tarfile.PAX_FORMAT)
  makers.tar(tmp_path / 'deep' / 'c.tar', [('d/7.png', makers.png(7))])
  ends = '', '/**/*.tar', '/{b-{01..02},deep/c}.tar'
  for source in (sources.open_source(f'{tmp_path}{end}') for end in ends):
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


def test_bytes_of_other_members_are_never_read(tmp_path):
  path = shard(tmp_path / 'x.tar')
  source = sources.open_source(str(path))
  with mock.patch('os.pread', wraps=os.pread) as pread:
    for i in range(3):
      source[i]
  with tarfile.open(path) as file:
    images = [(m.size, m.offset_data) for m in file if m.name.endswith('.png')]
  assert [call.args[1:] for call in pread.call_args_list] == images


def test_of_a_damaged_tar_the_images_before_are_kept(tmp_path, caplog):
  path = shard(tmp_path / 'x.tar', range(5))
  data = path.read_bytes()
  with tarfile.open(path) as file:
    at = file.getmember('000003.png').offset_data
  for cut in (data[: at + 20], data[: at - 412], data[: at - 512] + b'?' * 999):
    path.write_bytes(cut)
    settle(tmp_path)
    for _ in range(2):  # At every start, so from no cache.
      source = sources.open_source(str(tmp_path))
      assert source.names == ['000000', '000001', '000002']
      np.testing.assert_array_equal(source[2], makers.photo(2))
      assert 'x.tar' in caplog.text
      caplog.clear()


def test_what_is_no_tar_of_images(tmp_path):
  path = makers.tar(tmp_path / 'x.tar', [('1.cls', b'1'), ('1.pkl', b'2')])
  for data, held in (
    (path.read_bytes(), r'holds \.cls, \.pkl'),
    (b'\0' * 10240, 'holds nothing'),
    (b'', ''),
    (b'\x1f\x8b' + b'z' * 2000, ''),
  ):
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf'x\.tar .*no image.*{held}') as error:
      sources.open_source(str(tmp_path))
    assert '\n' not in str(error.value)


def test_a_broken_member_is_named(tmp_path):
  members = [('1.jpg', b''), ('2.png', makers.png(2)[:99]), ('3.png', b'x')]
  source = sources.open_source(str(makers.tar(tmp_path / 'x.tar', members)))
  for i in range(3):
    with pytest.raises(ImageDecodeError, match=rf'x\.tar:{i + 1}\.\w+: .'):
      source[i]


def test_a_shard_that_changed_or_went_stops_the_run(tmp_path):
  first, second = shard(tmp_path / '1.tar'), shard(tmp_path / '2.tar')
  source = sources.open_source(str(tmp_path))
  source[0], source[3]
  first.write_bytes(second.read_bytes() + b'\0' * 512)
  second.unlink()
  for i, words in ((0, r'1\.tar has changed'), (3, r'2\.tar is gone')):
    with pytest.raises(UserError, match=words) as caught:
      source[i]
    assert not isinstance(caught.value, ImageDecodeError)


@pytest.fixture
def opens(tmp_path, monkeypatch):
  """Names of the shards' images, and how many shards were walked for them."""
  walked, real = [], tar.walk
  monkeypatch.setattr(tar, 'walk', lambda path: walked.append(1) or real(path))

  def names():
    walked.clear()
    return sources.open_source(str(tmp_path)).names, len(walked)

  return names


def test_an_index_is_read_once_a_shard(tmp_path, opens):
  shard(tmp_path / '1.tar', range(3))
  second = shard(tmp_path / '2.tar', range(3, 6))
  names, walked = opens()
  assert walked == 2 and opens()[1] == 2, 'a file just written is kept'
  settle(tmp_path)
  assert opens() == (names, 2) and opens() == (names, 0)
  # Of the same size and time, as a copy with kept times would have.
  status = os.stat(second)
  shard(second, range(6, 9))
  os.utime(second, ns=(status.st_atime_ns, status.st_mtime_ns))
  assert os.stat(second).st_size == status.st_size
  assert opens() == ([f'{i:06}' for i in (0, 1, 2, 6, 7, 8)], 1)


def test_a_damaged_index_is_read_again(
  tmp_path, opens, cache_folder, monkeypatch
):
  shard(tmp_path / '1.tar')
  settle(tmp_path)
  names, _ = opens()
  (entry,) = cache_folder.iterdir()
  good = entry.read_bytes()
  flipped = good[:60] + bytes([good[60] ^ 1]) + good[61:]
  for data in (b'', good[:100], flipped, b'\x80\x04cos\nsystem\n'):
    entry.write_bytes(data)
    assert opens() == (names, 1)
  assert opens() == (names, 0)
  shard(tmp_path / '2.tar')
  settle(tmp_path)
  assert opens()[1] == 2 and opens()[1] == 0
  second = next(e for e in cache_folder.iterdir() if e != entry)
  second.write_bytes(entry.read_bytes())  # of another tar
  assert opens()[1] == 1
  assert len(list(cache_folder.iterdir())) == 2, 'a temporary file is left'
  # A cache that cannot be written is no error.
  monkeypatch.setenv('VQRAE_JAX_CACHE', '/dev/null/x')
  assert opens()[1] == 2


def test_many_threads_leave_no_file_open(tmp_path):
  for i in range(5):
    shard(tmp_path / f'{i}.tar', range(4 * i, 4 * i + 4))
  source = sources.open_source(str(tmp_path))
  before = len(os.listdir('/proc/self/fd'))

  def read(i):
    np.testing.assert_array_equal(source[i], makers.photo(i))

  draws = np.random.default_rng(0).integers(0, 20, 360).tolist()
  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    list(pool.map(read, draws))
  assert len(os.listdir('/proc/self/fd')) <= before


def test_real_shards(shared_data):
  path = shared_data / 'cifar10_wds' / 'test-00000.tar'
  source = sources.open_source(str(path))
  with tarfile.open(path) as file:
    members = [m for m in file if m.name.endswith('.jpg')]
    assert len(source) == len(members) == 1500
    for i in (0, 700, 1499):
      assert source.name(i) == f'test-00000.tar:{members[i].name}'
      label = members[i].name.replace('.jpg', '.cls')
      assert source.label(i) == int(file.extractfile(label).read())
      image = np.asarray(Image.open(file.extractfile(members[i])))
      np.testing.assert_array_equal(source[i], image)
