"""ArrayRecord files: a record is an image, or an Example that holds one."""

import numpy as np
import pytest

from tests.data import makers
from vqrae_jax.data import sources
from vqrae_jax.data.decode import ImageDecodeError
from vqrae_jax.errors import UserError


def test_both_kinds_of_records(tmp_path):
  makers.array_record(
    tmp_path / 'a.array_record', [makers.png(i) for i in range(3)]
  )
  examples = [
    makers.example(label=3, image=makers.png(3), note=b'x' * 300),
    makers.example(
      image__encoded=makers.png(4), image__class__label=5, image__format=b'png'
    ),
    makers.example(jpg=makers.png(5)),
    makers.example(webp=makers.png(6), cls=1),
  ]
  makers.array_record(tmp_path / 'b.arrayrecord', examples)
  source = sources.open_source(str(tmp_path))
  assert len(source) == 7
  for i in range(7):
    np.testing.assert_array_equal(source[i], makers.photo(i))
  assert source.size(4) == (20, 24)
  labels = [None, None, None, 3, 5, None, None]
  assert [source.label(i) for i in range(7)] == labels
  assert source.name(4) == 'b.arrayrecord:1' and source.names[4] == 'b-1'
  source = sources.open_source(str(tmp_path / 'b.*'), include=('b-[02]',))
  np.testing.assert_array_equal(source[1], makers.photo(5))


@pytest.mark.parametrize(
  'record, reason',
  [
    (b'', 'an empty file'),
    (makers.example(image=b''), 'none of the bytes features image'),
    (makers.example(image=b'pixels'), 'content is none of'),
    (makers.example(image=7, text=b'x'), 'image/encoded.*; it has text'),
    (makers.example(image=makers.png(0))[:200], 'neither an encoded image'),
    (makers.png(0)[:200], 'truncated'),
  ],
)
def test_anything_else_is_unreadable(tmp_path, record, reason):
  path = makers.array_record(tmp_path / 'x.array_record', [b'', record])
  source = sources.open_source(str(path))
  with pytest.raises(ImageDecodeError, match=rf'x\.array_record:1: .*{reason}'):
    source[1]


def test_files_that_are_no_array_record(tmp_path):
  path = makers.array_record(tmp_path / 'x.array_record', [b'x' * 99] * 9)
  data = path.read_bytes()
  for damaged in (b'', b'x' * 100_000, data[: len(data) // 2]):
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r'ArrayRecord file .*x\.array_record'):
      sources.open_source(str(tmp_path))
  makers.array_record(path, [])
  with pytest.raises(UserError, match='holds no record'):
    sources.open_source(str(tmp_path))
