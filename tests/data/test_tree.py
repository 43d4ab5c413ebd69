"""A tree is listed once, and again only when a folder of it has changed."""

import contextlib
import os

import pytest

from tests.data import makers
from vqrae_jax import paths
from vqrae_jax.data import sources, tree
from vqrae_jax.data import tree as cache
from vqrae_jax.errors import UserError


@pytest.fixture
def counted(monkeypatch):
  """How often folders were listed and anything was asked for its times."""
  counts = {'scandir': 0, 'stat': 0}

  def counting(name):
    real = getattr(os, name)

    def call(*args, **keys):
      counts[name] += 1
      return real(*args, **keys)

    monkeypatch.setattr(os, name, call)

  counting('scandir')
  counting('stat')
  return counts


@pytest.fixture
def few(monkeypatch):
  """Small trees are kept too."""
  monkeypatch.setattr(tree, '_MIN_KEPT', 20)


def make_tree(root, folders=6, files=4):
  for i in range(folders):
    where = root / f'class{i}'
    where.mkdir(parents=True)
    for j in range(files):
      (where / f'{j:05}.jpg').touch()
  makers.settle(root)
  return str(root)


class Entry:
  """What scandir would tell of a file, without the file."""

  def __init__(self, name):
    self.name = name

  def is_dir(self, follow_symlinks=True):
    return False

  def is_file(self):
    return True


def names(root):
  found, _ = tree.list_tree(str(root))
  return list(found['image'])


def test_a_hundred_thousand_files_cost_no_call_each(
  tmp_path, monkeypatch, counted
):
  root = make_tree(tmp_path / 'data', folders=20, files=0)
  real, entries = os.scandir, [Entry(b'%06d.jpg' % i) for i in range(5000)]

  def crowded(path):
    with real(path) as listed:
      return contextlib.nullcontext([*listed, *entries])

  monkeypatch.setattr(os, 'scandir', crowded)
  counted.update(scandir=0, stat=0)
  first = names(root)
  assert len(first) == 21 * 5000 and counted['scandir'] == 21
  assert counted['stat'] < 200
  counted.update(scandir=0, stat=0)
  assert names(root) == first
  assert counted['scandir'] == 0 and counted['stat'] < 200


def test_a_small_tree_is_not_kept(tmp_path, cache_folder):
  names(make_tree(tmp_path / 'data'))
  assert not list(cache_folder.iterdir())


def test_a_tree_just_changed_is_not_kept(tmp_path, cache_folder, few):
  """Within a clock's tick, a second change would show no other time."""
  root = make_tree(tmp_path / 'data')
  os.utime(root)
  names(root)
  assert not list(cache_folder.iterdir())


@pytest.mark.parametrize('change', ('add', 'remove', 'rename', 'deep', 'swap'))
def test_a_changed_tree_is_listed_anew(tmp_path, counted, few, change):
  root = tmp_path / 'data'
  make_tree(root)
  before = set(names(root))
  if change == 'add':
    (root / 'class3' / 'new.jpg').touch()
    want = before | {'class3/new.jpg'}
  elif change == 'remove':
    (root / 'class3' / '00001.jpg').unlink()
    want = before - {'class3/00001.jpg'}
  elif change == 'rename':
    (root / 'class3' / '00001.jpg').rename(root / 'class4' / 'moved.jpg')
    want = before - {'class3/00001.jpg'} | {'class4/moved.jpg'}
  elif change == 'deep':
    (root / 'class3' / 'more').mkdir()
    (root / 'class3' / 'more' / 'x.png').touch()
    want = before | {'class3/more/x.png'}
  else:
    # The same times as before, as a copy with kept times would have.
    status = os.stat(root / 'class3')
    (root / 'class3' / '00001.jpg').rename(root / 'class3' / 'other.jpg')
    os.utime(root / 'class3', ns=(status.st_atime_ns, status.st_mtime_ns))
    want = before - {'class3/00001.jpg'} | {'class3/other.jpg'}
  assert set(names(root)) == want


@pytest.mark.parametrize('damage', ('cut', 'flip', 'pickle', 'empty', 'folder'))
def test_a_damaged_entry_is_made_anew(tmp_path, cache_folder, few, damage):
  root = make_tree(tmp_path / 'data')
  want = names(root)
  (entry,) = cache_folder.iterdir()
  data = entry.read_bytes()
  if damage == 'cut':
    entry.write_bytes(data[: len(data) // 2])
  elif damage == 'flip':
    at = data.index(b'class5') + 5
    entry.write_bytes(data[:at] + b'6' + data[at + 1 :])
  elif damage == 'pickle':
    entry.write_bytes(b'\x80\x04cos\nsystem\n')
  elif damage == 'empty':
    entry.write_bytes(b'')
  else:
    entry.unlink()
    entry.mkdir()
  assert names(root) == want
  if damage != 'folder':
    assert entry.read_bytes() == data
  assert len(list(cache_folder.iterdir())) == 1, 'a temporary file is left'


def test_an_entry_of_another_key_or_version_is_not_taken(
  tmp_path, cache_folder, few, monkeypatch
):
  root = make_tree(tmp_path / 'data')
  names(root)
  (entry,) = cache_folder.iterdir()
  assert cache.load('folder', root) is not None
  entry.rename(cache._path('folder', '/elsewhere'))
  assert cache.load('folder', '/elsewhere') is None
  names(root)
  monkeypatch.setattr(cache, '_VERSION', 2)
  assert cache.load('folder', root) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, few, monkeypatch):
  root = make_tree(tmp_path / 'data')
  (tmp_path / 'file').touch()
  for where in (tmp_path / 'file', tmp_path / 'file' / 'deep', '/dev/null/x'):
    monkeypatch.setenv('VQRAE_JAX_CACHE', str(where))
    assert len(names(root)) == 24


def test_where_the_cache_lies(monkeypatch, tmp_path):
  assert paths.cache_folder() != tmp_path
  monkeypatch.setenv('VQRAE_JAX_CACHE', str(tmp_path))
  assert paths.cache_folder() == tmp_path
  monkeypatch.delenv('VQRAE_JAX_CACHE')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert paths.cache_folder() == tmp_path / 'vqrae_jax'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert paths.cache_folder() == tmp_path / '.cache' / 'vqrae_jax'


def test_links_are_followed_and_loops_end(tmp_path):
  outside = tmp_path / 'outside'
  outside.mkdir()
  (outside / 'x.jpg').touch()
  root = tmp_path / 'root'
  (root / 'a' / 'deep').mkdir(parents=True)
  (root / 'a' / 'one.jpg').touch()
  (root / 'a' / 'loop').symlink_to(root)
  (root / 'a' / 'deep' / 'self').symlink_to('.')
  (root / 'A-link').symlink_to('a')  # Before "a", and yet "a" has the name.
  (root / 'two.jpg').symlink_to(outside / 'x.jpg')
  (root / 'z').symlink_to(outside)
  (root / 'y').symlink_to(outside)
  (root / 'broken.jpg').symlink_to('nowhere')
  (root / 'folder.jpg').mkdir()
  (root / '._two.jpg').touch()
  assert names(root) == ['a/one.jpg', 'two.jpg', 'y/x.jpg']
  assert tree.list_tree(str(root))[1]['broken links'] == 1


def test_names_of_any_bytes(tmp_path):
  root = os.fsencode(tmp_path)
  for name in (b'caf\xc3\xa9.jpg', b'\xff\xfe.jpg', b'a b\n.jpg'):
    with open(os.path.join(root, name), 'wb') as file:
      file.write(makers.png(len(name)))
  source = sources.open_source(str(tmp_path))
  assert len(source) == 3
  for i in range(3):
    size = len(os.fsencode(source.name(i)))
    assert (source[i] == makers.photo(size)).all()


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
  (tmp_path / 'x.jpg').touch()

  def refused(path):
    raise PermissionError(13, 'Permission denied', path)

  monkeypatch.setattr(os, 'scandir', refused)
  with pytest.raises(UserError, match=f'{tmp_path}: Permission denied'):
    sources.open_source(str(tmp_path))
