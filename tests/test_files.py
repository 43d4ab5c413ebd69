"""Files are written whole, under no name that another could hold."""

import os
import stat

import pytest
from PIL import Image

from tests import tiny
from vqrae_jax import export
from vqrae_jax.evaluate import visualize
from vqrae_jax.files import atomic_write


@pytest.fixture
def umask():
  old = os.umask(0o027)
  yield 0o640
  os.umask(old)


def mode(path):
  return stat.S_IMODE(path.stat().st_mode)


def test_two_writers_of_one_file_do_not_meet(tmp_path, umask):
  path = tmp_path / 'x.bin'
  with atomic_write(path) as one, atomic_write(path) as other:
    one.write(b'one' * 9)
    other.write(b'other')
    assert not path.exists()
  assert path.read_bytes() == b'one' * 9
  assert mode(path) == umask and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_what_was(tmp_path):
  path = tmp_path / 'x.bin'
  path.write_bytes(b'before')
  with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
    file.write(b'half')
    raise KeyboardInterrupt
  assert path.read_bytes() == b'before' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('name', ('b.png', 'b.png.writing'))
def test_no_link_is_written_through(tmp_path, name):
  victim = tmp_path / 'victim'
  victim.write_bytes(b'mine')
  (tmp_path / name).symlink_to(victim)
  visualize.save_png(Image.new('RGB', (9, 9)), tmp_path / 'b.png')
  assert victim.read_bytes() == b'mine'
  assert (tmp_path / 'b.png').read_bytes().startswith(b'\x89PNG')


def test_a_tokenizer_has_the_mode_that_the_umask_gives(tmp_path, umask):
  (tmp_path / 't.writing').symlink_to('elsewhere')
  export.save_tokenizer(*tiny.built(tiny.model('none')), tmp_path / 't')
  for path in (tmp_path / 't').iterdir():
    assert mode(path) == umask, path.name
