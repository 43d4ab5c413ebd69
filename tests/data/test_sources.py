"""The DATA word: what it opens, and what it says when it cannot."""

import numpy as np
import pytest

from tests.data import makers
from vqrae_jax.data import sources, listing as tree
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
  kept = sources.open_source(str(folder), include=('photo[12]',))
  assert sorted(kept.names) == ['photo1', 'photo2']
  assert [p.stem for p in kept.paths] == kept.names
  np.testing.assert_array_equal(kept[1], makers.photo(2))
  assert kept.name(1) == 'photo2.png' and kept.size(1) == (20, 24)


def test_globs_and_files_are_named_below_their_folder(folder):
  source = sources.open_source(str(folder / '*.png'))
  assert [source.name(i) for i in range(4)] == [
    f'photo{i}.png' for i in (0, 2, 4, 6)
  ]
  source = sources.open_source(str(folder / '**' / 'photo[01].*'))
  assert [source.name(i) for i in range(2)] == ['deep/photo1.png', 'photo0.png']
  source = sources.open_source(str(folder / 'photo4.png'))
  assert len(source) == 1 and source.name(0) == 'photo4.png'
  np.testing.assert_array_equal(source[0], makers.photo(4))
  source = sources.open_source(str(folder / '{deep/photo5,photo2}.png'))
  assert source.names == ['photo5', 'photo2']


def test_relative_words(folder, monkeypatch):
  monkeypatch.chdir(folder)
  for word in ('.', './/', '*.png', './*.png', 'deep', 'deep/../photo0.png'):
    source = sources.open_source(word)
    assert source[0].shape == (20, 24, 3) and source.paths[0].is_file()


@pytest.mark.parametrize(
  'pattern, words',
  [
    ('x-{000..002}.tar', ['x-000.tar', 'x-001.tar', 'x-002.tar']),
    ('x-{8..11}', ['x-8', 'x-9', 'x-10', 'x-11']),
    ('x-{08..11}', ['x-08', 'x-09', 'x-10', 'x-11']),
    ('{2..0}', ['2', '1', '0']),
    ('{a,b}{0..1}', ['a0', 'a1', 'b0', 'b1']),
    ('{a,b{0..1},}', ['a', 'b0', '', 'a', 'b1', '']),
    ('plain{x}.tar', ['plain{x}.tar']),
  ],
)
def test_braces(pattern, words):
  assert sorted(tree.braces(pattern)) == sorted(words)
  assert next(tree.braces(pattern)) == words[0]


@pytest.mark.parametrize(
  'files, word, words',
  [
    ([], '', 'holds no image .* it holds nothing'),
    (['a.txt', 'b.txt', 'c'], '', 'it holds 2 .txt, 1 without extension'),
    (['a.txt'], '/a.txt', 'it holds 1 .txt'),
    (
      ['a.jpg', 'b.tar'],
      '',
      r'1 image files and 1 \.tar shards; name one kind',
    ),
    (['a.tar', 'b.array_record'], '/*', r'ArrayRecord files and 1 \.tar'),
    (['a.tar.gz'], '', r'compressed tars \(1\).* decompress'),
    (['a.tgz', 'b.tgz'], '/*.tgz', r'compressed tars \(2\).* decompress'),
    (['a.jpg'], '/*.jpeg', 'is no folder, file, glob'),
    (['d/a.jpg'], '/*', 'it holds 1 folders'),
    (['x-0.tar'], '/x-{0..1}.tar', r'there is no .*x-1\.tar'),
    (['a.jpg'], '/{0..9999999}.tar', 'names over 1,000,000 files'),
  ],
)
def test_what_a_word_does_not_name(tmp_path, files, word, words):
  for name in files:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b'x')
  with pytest.raises(UserError, match=words) as caught:
    sources.open_source(f'{tmp_path}{word}')
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'data, keys, words',
  [
    ('nowhere', {}, 'no folder, file, glob or "bundled:photos"'),
    ('bundled:cats', {}, 'did you mean "bundled:photos"'),
    ('bundled:photos', dict(include=('chelsee',)), 'did you mean "chelsea"'),
    ('bundled:photos', dict(exclude=('*',)), 'holds no image'),
    ('gs://bucket/x-{0..9}.tar', {}, 'is a URL; name files of this machine'),
  ],
)
def test_bad_sources_say_what_is_right(data, keys, words):
  with pytest.raises(UserError, match=words):
    sources.open_source(data, **keys)


def test_an_empty_folder_and_a_broken_file_are_named(tmp_path):
  with pytest.raises(UserError, match='holds no image'):
    sources.open_source(str(tmp_path))
  (tmp_path / 'broken.jpg').write_bytes(b'\xff\xd8 no jpeg')
  with pytest.raises(UserError, match=r'cannot read the image .*broken\.jpg'):
    sources.open_source(str(tmp_path))[0]


def test_bundled_photographs_are_in_colour():
  source = sources.open_source('bundled:photos')
  assert len(source) == 11
  image = source[source.names.index('chelsea')]
  assert image.shape == (300, 451, 3)
  assert (image[..., 0] != image[..., 2]).any()
