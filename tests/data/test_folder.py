"""Image files that come and go under the source."""

import errno

import numpy as np
import pytest

from tests.data import makers
from vqrae_jax.data import sources
from vqrae_jax.data import sources as folder
from vqrae_jax.data.decode import ImageDecodeError


@pytest.fixture
def files(tmp_path):
  for i in range(3):
    (tmp_path / f'{i}.png').write_bytes(makers.png(i))
  return tmp_path


def test_a_broken_and_a_lost_file_are_named(files):
  source = sources.open_source(str(files))
  (files / '0.png').write_bytes(b'\x89PNG no png')
  (files / '1.png').unlink()
  with pytest.raises(
    ImageDecodeError, match=r'cannot read the image .*/0\.png: its'
  ):
    source[0]
  with pytest.raises(ImageDecodeError, match=r'1\.png: No such file') as caught:
    source[1]
  assert caught.value.reason == 'No such file or directory'
  with pytest.raises(ImageDecodeError, match=r'1\.png: No such file'):
    source.size(1)
  np.testing.assert_array_equal(source[2], makers.photo(2))
  np.testing.assert_array_equal(source[-1], makers.photo(2))


def test_running_out_of_files_is_no_fault_of_a_photograph(files, monkeypatch):
  def full(*_):
    raise OSError(errno.EMFILE, 'Too many open files')

  source = sources.open_source(str(files))
  monkeypatch.setattr(folder, 'open', full, raising=False)
  with pytest.raises(OSError, match='Too many open files'):
    source[0]
