"""Images and finished runs that the tests of this room share."""

import pytest
from absl import logging
from PIL import Image

from tests import tiny

OPEN = (('.*', dict(lr=1e-3)),)


@pytest.fixture(scope='session')
def images(tmp_path_factory):
  """A folder of four images of 40x48."""
  folder = tmp_path_factory.mktemp('images')
  for i in range(4):
    pixels = tiny.images(1, 40, 48, seed=i)[0]
    Image.fromarray(pixels).save(folder / f'image{i}.png')
  return folder


@pytest.fixture(scope='session')
def run_config(images):
  """(kind, **keys) -> the config of a run of two steps on `images`, the
  encoder frozen."""

  def config(kind='vq-ema', **keys):
    base = dict(
      data=dict(source=str(images), image_size=16),
      log=dict(every=1, images_every=0, usage_window=2, tensorboard=False),
      schedules=(('encoder/.*', None), ('.*', dict(lr=1e-3))),
      duration=2,
      checkpoint=dict(every=1),
    )
    return tiny.run(kind, **(base | keys))

  return config


@pytest.fixture(scope='session')
def simvq_config(run_config):
  """As `run_config`, of a SimVQ run that trains all of the tokenizer."""

  def config(**keys):
    return run_config('simvq-l2', **(dict(schedules=OPEN) | keys))

  return config


@pytest.fixture(scope='session')
def simvq_run(simvq_config, tmp_path_factory):
  """A finished run of `simvq_config`: copy it, do not change it."""
  from vqrae_jax.train import loop

  workdir = tmp_path_factory.mktemp('runs') / 'simvq'
  loop.train(simvq_config(), workdir)
  return workdir


@pytest.fixture(scope='session')
def vq_run(run_config, tmp_path_factory):
  """A finished run of `run_config`: copy it, do not change it."""
  from vqrae_jax.train import loop

  workdir = tmp_path_factory.mktemp('runs') / 'vq'
  loop.train(run_config(seed=5), workdir)
  return workdir


@pytest.fixture
def log(monkeypatch):
  """{"info", "warning": lines} of what is logged."""
  lines = {'info': [], 'warning': []}
  for level, found in lines.items():
    monkeypatch.setattr(
      logging,
      level,
      lambda words, *x, to=found: to.append(words % x if x else str(words)),
    )
  return lines
