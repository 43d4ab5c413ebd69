"""Images and finished runs that the tests of this room share."""

import functools

import pytest

from tests import runs
from vqrae_jax.train import loop


@pytest.fixture(scope='session')
def images(tmp_path_factory):
  return runs.images(tmp_path_factory.mktemp('shared') / 'images')


@pytest.fixture(scope='session')
def run_config(images):
  """(kind, **keys) -> the config of a run of two steps on `images`, the
  encoder frozen."""

  def config(kind='vq-ema', **keys):
    base = dict(schedules=(('encoder/.*', None), *runs.OPEN), duration=2)
    return runs.plain(images, kind, **base | keys)

  return config


@pytest.fixture(scope='session')
def simvq_config(run_config):
  """As `run_config`, of a SimVQ run that trains all of the tokenizer."""
  return functools.partial(run_config, 'simvq-l2', schedules=runs.OPEN)


@pytest.fixture(scope='session')
def simvq_run(simvq_config, tmp_path_factory):
  """A finished run of `simvq_config`: copy it, do not change it."""
  workdir = tmp_path_factory.mktemp('runs') / 'simvq'
  loop.train(simvq_config(), workdir)
  return workdir


@pytest.fixture(scope='session')
def vq_run(run_config, tmp_path_factory):
  """A finished run of `run_config`: copy it, do not change it."""
  workdir = tmp_path_factory.mktemp('runs') / 'vq'
  loop.train(run_config(seed=5), workdir)
  return workdir


@pytest.fixture
def log(caplog):
  """`caplog`, of lines for information too."""
  caplog.set_level('INFO', 'absl')
  return caplog
