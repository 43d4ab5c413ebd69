"""A run that is killed and started again is the run that was not.

The runs are processes, ended by SIGKILL: no handler, no flush. On one device
they share the compilation cache, on 8 (slow) each compiles. Compared are all
rows of metrics.jsonl but clocks, the fingerprint of the tokenizer and every
array of the last checkpoint.
"""

import random
import re
import signal

import pytest

from tests import runs
from vqrae_jax.train import export
from vqrae_jax.train.checkpoint import Checkpoints


@pytest.fixture(scope='module')
def run(request, tmp_path_factory):
  """(the workdir of a finished run on that many devices, workdir -> the
  process of the same run there)."""
  folder = tmp_path_factory.mktemp('gan')
  config = runs.gan(runs.images(folder / 'images'))

  def started(workdir):
    return runs.started(config, workdir, request.param)

  runs.finished(started(folder / 'run'))
  return folder / 'run', started


def in_a_save(workdir):
  """A step's files are there and its hashes are not; not at the first save,
  before which there is nothing to go back to."""
  folder = workdir / 'checkpoints'
  names = {p.name[:8] for p in folder.glob('0*')}
  whole = {p.parent.name for p in folder.glob('0*/sha256.*.json')}
  return bool(names - whole - {'00000003'})


def check_same(workdir, want):
  runs.check_same(workdir, want)
  last = runs.rows(workdir)[-1]
  assert last['step'] == runs.GAN_STEPS and last['loss/discriminator'] > 0
  leaves = runs.last_state(workdir)
  for part in ('ema/', 'codebook/', 'discriminator/stats/spectral/', 'usage'):
    assert any(name.startswith(part) for name in leaves), part


@pytest.mark.parametrize('run', [1], indirect=True)
def test_killed_in_a_save_stopped_by_a_signal(run, tmp_path, monkeypatch):
  want, started = run
  process = started(tmp_path)
  said = runs.signalled(process, tmp_path, in_a_save)
  assert process.returncode == -signal.SIGKILL
  assert 'RANDOM networks in discriminator' in said
  process = started(tmp_path)
  said = runs.signalled(process, tmp_path, runs.at_step(8), signal.SIGTERM)
  assert process.returncode == 143, said
  assert 'SIGTERM after step' in said.splitlines()[-1]
  # The command that it prints works as it is.
  command = re.search(r'train\.export (--\S+ --\S+)', said.splitlines()[-1])
  monkeypatch.chdir(tmp_path.parent)
  export.main(command[1].split())
  assert (tmp_path.parent / 'tokenizer' / 'config.json').exists()
  last = runs.rows(tmp_path)[-1]['step']
  assert Checkpoints(tmp_path / 'checkpoints').steps()[-1] == last
  assert 'resumed from' in runs.finished(started(tmp_path))
  check_same(tmp_path, want)


@pytest.mark.slow
@pytest.mark.parametrize('run', [8], indirect=True)
def test_killed_at_ten_random_steps(run, tmp_path):
  want, started = run
  rng, kills = random.Random(0), 0
  steps = sorted(rng.sample(range(2, runs.GAN_STEPS), 10))
  for when in (*map(runs.at_step, steps), *4 * [in_a_save]):
    process = started(tmp_path)
    runs.signalled(process, tmp_path, when)
    kills += process.returncode == -signal.SIGKILL
  runs.finished(started(tmp_path))
  check_same(tmp_path, want)
  assert kills >= 10
