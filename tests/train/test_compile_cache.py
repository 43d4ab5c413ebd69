"""A second start reads its programs; what may not be kept is not."""

import jax
import pytest

from tests import runs, tiny
from vqrae_jax.train import __main__ as command
from vqrae_jax.train import compile_cache, loop

PROGRAM = """
import pathlib, sys
import jax
from vqrae_jax import cli
from vqrae_jax.train import compile_cache

def main(argv):
  compile_cache.keep_in(pathlib.Path(argv[0]) if argv[0] else None)
  x = jax.numpy.ones((8, 8))
  assert jax.jit(lambda x: (x @ x).sum())(x) == 512
  compile_cache.log_saved()

cli.run(main)
"""
OWN, JAXS = 'VQRAE_JAX_CACHE', 'JAX_COMPILATION_CACHE_DIR'


@pytest.fixture
def start(monkeypatch):
  """(workdir, devices, variables) -> what the start of a run says."""

  def started(workdir, devices=1, **variables):
    env = tiny.alone(devices)
    env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    env.pop(JAXS)
    env.pop(OWN, None)
    env |= {name: str(path) for name, path in variables.items()}
    monkeypatch.setattr(tiny, 'alone', lambda _: env)
    said = runs.finished(runs.python(PROGRAM, devices, workdir or ''))
    monkeypatch.undo()
    return said

  return started


def kept(folder):
  return {p.name: p for p in folder.rglob('*-cache')}


def test_a_second_start_reads_what_the_first_compiled(start, tmp_path):
  """And compiles again what is damaged."""
  assert 'saved' not in start(tmp_path / 'run')
  files = kept(tmp_path / 'run' / 'compile_cache')
  assert files
  (tmp_path / 'run').rename(tmp_path / 'moved')
  assert f'read from {tmp_path}/moved' in start(tmp_path / 'moved')
  files = kept(tmp_path / 'moved')
  for path in files.values():
    path.write_bytes(path.read_bytes()[:-9])
  assert 'saved' not in start(tmp_path / 'moved')
  assert kept(tmp_path / 'moved').keys() == files.keys()


def test_the_cache_of_the_user_wins(start, tmp_path):
  run, own, jaxs = (tmp_path / name for name in ('run', 'own', 'jaxs'))
  start(run, **{OWN: own})
  assert kept(own / 'compile_cache') and not run.exists()
  start(run, **{OWN: tmp_path / 'other', JAXS: jaxs})
  assert kept(jaxs) and not run.exists() and not (tmp_path / 'other').exists()


def test_many_cpus_and_nowhere_keep_nothing(start, tmp_path):
  start(tmp_path / 'run', devices=2)
  start(None)
  assert not any(tmp_path.iterdir())


def test_a_dry_run_names_no_workdir(monkeypatch, tmp_path):
  config = runs.config_file(tiny.run(), tmp_path / 'config.py')
  named = []
  monkeypatch.setattr(compile_cache, 'keep_in', named.append)
  monkeypatch.setattr(loop, 'dry_run', lambda config: {})
  command.main([f'--config={config}', '--dry_run'])
  assert named == [None]
  assert not jax.config.jax_compilation_cache_dir
