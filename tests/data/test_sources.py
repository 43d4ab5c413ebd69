"""DATA: what it opens, in which order, and what it says when it cannot."""

import errno
import importlib.util
import os
import pathlib

import numpy as np
import pytest

from tests.data import makers
from vqrae_jax import paths
from vqrae_jax.data import listing, sources
from vqrae_jax.data.decode import ImageDecodeError
from vqrae_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
  for i in range(7):
    where = tmp_path / ('deep' if i % 2 else '.')
    where.mkdir(exist_ok=True)
    (where / f'photo{i}.png').write_bytes(makers.png(i))
  (tmp_path / 'notes.txt').write_text('no image')
  return tmp_path


def test_folders_are_searched_in_depth_and_sorted(folder):
  source = sources.open_source(str(folder))
  assert len(source) == 7
  assert source.paths == sorted(source.paths)
  assert source.name(0) == 'deep/photo1.png' and source.names[0] == 'photo1'
  for i in range(7):
    which = int(source.names[i][-1])
    np.testing.assert_array_equal(source[i], makers.photo(which))
  with pytest.raises(IndexError):
    source[7]
  kept = sources.open_source(str(folder), exclude=('photo0',))
  assert len(kept) == 6 and 'photo0' not in kept.names
  kept = sources.open_source(str(folder), exclude=('deep/*',))
  assert kept.names == [f'photo{i}' for i in (0, 2, 4, 6)]
  with pytest.raises(UserError, match=r'"photo1".*"deep/photo1\.png"'):
    sources.open_source(str(folder), exclude=('dep/*',))
  kept = sources.open_source(str(folder), include=('photo[12]',))
  assert sorted(kept.names) == ['photo1', 'photo2']
  np.testing.assert_array_equal(kept[1], makers.photo(2))
  assert kept.name(1) == 'photo2.png' and kept.size(1) == (20, 24)
  assert kept.shared_with(source) == 2 == source.shared_with(kept)
  link = folder.with_name('link')
  link.symlink_to(folder)
  linked = sources.open_source(str(link))
  assert kept.shared_with(linked) == 2 == linked.shared_with(kept)


def test_sub_folders_are_classes(tmp_path):
  """Numbered in sorted order over all images, chosen or not; hidden files and
  folders have none."""
  names = 'dog/a/1.jpg', 'dog/2.jpg', 'cat/3.jpg', 'emu/4.jpg'
  for name in (*names, '.trash/1.jpg', 'dog/.a/2.jpg', 'dog/.3.jpg'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  for data in ('', '/*/**/*.jpg', '/{emu/4,dog/2,cat/3,dog/a/1}.jpg'):
    source = sources.open_source(f'{tmp_path}{data}')
    assert source.classes == ['cat', 'dog', 'emu']
    assert [source.label(i) for i in range(4)] == [0, 1, 1, 2]
  source = sources.open_source(str(tmp_path), exclude=('3',))
  assert [source.label(i) for i in range(3)] == [1, 1, 2]
  (tmp_path / '5.jpg').touch()  # beside them, so of no class
  for data in (tmp_path, tmp_path / 'dog', tmp_path / 'cat', 'bundled:photos'):
    source = sources.open_source(str(data))
    assert source.classes is None and source.label(0) is None


@pytest.mark.parametrize(
  'pattern, names',
  [
    ('*.png', [f'photo{i}.png' for i in (0, 2, 4, 6)]),
    ('**/photo[01].*', ['deep/photo1.png', 'photo0.png']),
    ('photo4.png', ['photo4.png']),
    ('{deep/photo5,photo2}.png', ['deep/photo5.png', 'photo2.png']),
    ('.//', ['deep/photo1.png', 'deep/photo3.png', 'deep/photo5.png']
     + [f'photo{i}.png' for i in (0, 2, 4, 6)]),
    ('deep/../photo0.png', ['photo0.png']),
  ],
)  # fmt: skip
def test_globs_and_relative_paths(folder, monkeypatch, pattern, names):
  monkeypatch.chdir(folder)
  for data in (pattern, str(folder / pattern)):
    source = sources.open_source(data)
    assert [source.name(i) for i in range(len(source))] == names
    assert source.paths[0].is_file() and source[0].shape == (20, 24, 3)


@pytest.mark.parametrize(
  'pattern, want',
  [
    ('x-{000..002}.tar', ['x-000.tar', 'x-001.tar', 'x-002.tar']),
    ('x-{8..11}', ['x-8', 'x-9', 'x-10', 'x-11']),
    ('x-{08..11}', ['x-08', 'x-09', 'x-10', 'x-11']),
    ('{2..0}', ['2', '1', '0']),
    ('{a,b}{0..1}', ['a0', 'a1', 'b0', 'b1']),
    ('{a,b{0..1},}', ['a', 'b0', '', 'a', 'b1', '']),
    ('plain{x}.tar', ['plain{x}.tar']),
    ('{x}-{a,b}', ['{x}-a', '{x}-b']),
  ],
)
def test_braces(pattern, want):
  assert sorted(listing.braces(pattern)) == sorted(want)
  assert next(listing.braces(pattern)) == want[0]


@pytest.mark.parametrize(
  'files, data, words',
  [
    ('', '.', 'no image'),
    ('a.txt b.txt c', '.', r'no image .* 2 \.txt, 1 '),
    ('a.txt', 'a.txt', r'1 \.txt'),
    ('a.jpg b.tar', '.', r'1 image files and 1 \.tar'),
    ('a.tar b.array_record', '*', r'ArrayRecord files and 1 \.tar'),
    ('a.tar.gz b.tgz', '.', r'compressed tars \(2\)'),
    ('a.jpg', '*.jpeg', r'\*\.jpeg'),
    ('d/a.jpg', '*', 'no image'),
    ('x-0.tar', 'x-{0..1}.tar', r'x-1\.tar'),
    ('a.jpg', '{0..9999999}.tar', '1,000,000 files'),
    ('', 'nowhere', 'nowhere'),
    ('', 'bundled:cats', 'bundled:photos'),
    ('', 'gs://bucket/x-{0..9}.tar', 'gs://bucket.* URL.*mount.* copy'),
  ],
)
def test_bad_data_says_what_is_right(tmp_path, monkeypatch, files, data, words):
  monkeypatch.chdir(tmp_path)
  for path in map(pathlib.Path, files.split()):
    path.parent.mkdir(exist_ok=True)
    path.touch()
  with pytest.raises(UserError, match=words) as caught:
    sources.open_source(data)
  assert '\n' not in str(caught.value)


def test_bundled_images_are_in_colour():
  source = sources.open_source('bundled:photos')
  assert len(source) == 11
  index = source.names.index('chelsea')
  image = source[index]
  assert image.shape == (300, 451, 3)
  assert (image[..., 0] != image[..., 2]).any()
  assert source.picture(index) is source.picture(index), 'decoded again'


def test_a_broken_and_a_lost_file_are_named(folder, monkeypatch):
  source = sources.open_source(str(folder / '*.png'))
  (folder / 'photo0.png').write_bytes(b'\x89PNG no png')
  (folder / 'photo2.png').unlink()
  with pytest.raises(ImageDecodeError, match=r'photo0\.png: '):
    source[0]
  for read in (source.__getitem__, source.size):
    with pytest.raises(ImageDecodeError, match=r'photo2\.png: No such file'):
      read(1)
  np.testing.assert_array_equal(source[-1], makers.photo(6))

  def full(*_, **keys):
    raise OSError(errno.EMFILE, 'Too many open files')

  # No fault of an image.
  monkeypatch.setattr(os, 'open', full)
  with pytest.raises(OSError, match='Too many open files'):
    source[2]


def test_links_are_followed_and_loops_end(tmp_path, caplog):
  root, outside = tmp_path / 'root', tmp_path / 'outside'
  for path in (outside / 'x.jpg', root / 'a' / 'one.jpg', root / '._two.jpg'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  (root / 'folder.jpg').mkdir()
  for link, end in {
    'a/loop': root,
    'a/self': '.',
    'A-link': 'a',  # before "a", and yet "a" has the name
    'two.jpg': outside / 'x.jpg',
    'z': outside,
    'y': outside,
    'broken.jpg': 'nowhere',
    'itself.jpg': 'itself.jpg',
  }.items():
    (root / link).symlink_to(end)
  names = listing.list_data(str(root)).names
  assert names == ['a/one.jpg', 'two.jpg', 'y/x.jpg']
  assert str(root / 'itself.jpg') in caplog.text


def test_names_of_any_bytes(tmp_path):
  root = os.fsencode(tmp_path)
  for name in (b'caf\xc3\xa9.jpg', b'\xff\xfe.jpg', b'a b\n.jpg'):
    path = os.fsdecode(os.path.join(root, name))
    pathlib.Path(path).write_bytes(makers.png(len(name)))
  source = sources.open_source(str(tmp_path))
  assert len(source) == 3
  for i in range(3):
    size = len(os.fsencode(source.name(i)))
    np.testing.assert_array_equal(source[i], makers.photo(size))


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
  def refused(path):
    raise PermissionError(13, 'Permission denied', path)

  monkeypatch.setattr(os, 'scandir', refused)
  with pytest.raises(UserError, match=f'{tmp_path}: Permission denied'):
    sources.open_source(str(tmp_path))


def test_where_the_cache_lies(monkeypatch, tmp_path):
  for variable, below in (
    ('HOME', '.cache/vqrae_jax'),
    ('XDG_CACHE_HOME', 'vqrae_jax'),
    ('VQRAE_JAX_CACHE', ''),
  ):
    monkeypatch.delenv('VQRAE_JAX_CACHE', raising=False)
    monkeypatch.setenv(variable, str(tmp_path / variable))
    assert paths.cache_folder() == tmp_path / variable / below


def test_a_decoder_that_is_not_installed_is_named(folder, monkeypatch):
  source = sources.open_source(str(folder))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  np.testing.assert_array_equal(source.decoded_by('pil', 1)[0], source[0])
  with pytest.raises(UserError, match='fast_jpeg'):
    source.decoded_by('simplejpeg', 1)
