"""One run in a workdir, whatever is done to its lock file."""

import os

import pytest

from vqrae_jax.errors import UserError
from vqrae_jax.train import loop


def test_a_run_whose_lock_was_removed_stops_at_its_next_checkpoint(tmp_path):
  with loop.only_run_in(tmp_path) as check:
    (tmp_path / 'lock').unlink()
    with pytest.raises(UserError, match='lock was removed'):
      check()
    removed = pytest.raises(UserError, match='lock was removed')
    with loop.only_run_in(tmp_path), removed:  # another file of that name
      check()


@pytest.mark.parametrize(
  'make', (os.mkfifo, os.mkdir, lambda path: path.symlink_to('/nowhere'))
)
def test_a_lock_that_is_no_file_is_an_error_at_once(make, tmp_path):
  make(tmp_path / 'lock')
  for start in (loop.check_no_run_in, loop.only_run_in):
    refused = pytest.raises(UserError, match='lock is no regular file')
    with refused, start(tmp_path):
      pass
