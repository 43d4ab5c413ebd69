"""The hub's cache, random checkpoints made once, and a row of the table."""

import functools
import shutil

import pytest

from tests.encoders import references
from vqrae_jax import encoders

COMMIT = '0123456789abcdef0123456789abcdef01234567'
SIZES = dict(width=32, depth=2, heads=4, mlp=48, pixels=24, patch=4)


@functools.cache
def model(kind):
  """A tiny model of transformers with random weights."""
  return references.make(kind, **SIZES)


@pytest.fixture(scope='session')
def saved(tmp_path_factory):
  """kind -> the folder that `save_pretrained` wrote, once in a session."""

  @functools.cache
  def save(kind):
    folder = tmp_path_factory.mktemp(kind)
    model(kind).save_pretrained(folder)
    return folder

  return save


@pytest.fixture
def copy(saved, tmp_path):
  """A tiny SigLIP's folder, to be damaged."""
  return shutil.copytree(saved('siglip'), tmp_path / 'siglip')


@pytest.fixture
def cache(monkeypatch, tmp_path):
  """An empty cache of the hub, and no connection to the hub."""
  import huggingface_hub.constants as constants

  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  return tmp_path / 'hub'


def cached(cache, hub, files, branch='main'):
  """Writes a snapshot as the hub's client does."""
  repository = cache / f'models--{hub.replace("/", "--")}'
  snapshot = repository / 'snapshots' / COMMIT
  snapshot.mkdir(parents=True)
  (repository / 'refs').mkdir()
  (repository / 'refs' / branch).write_text(COMMIT)
  for path in files:
    shutil.copy(path, snapshot)
  return snapshot


@pytest.fixture
def tiny_row(monkeypatch):
  """A row of the table, for files that do not identify themselves."""
  vit = dict(width=32, depth=2, num_heads=4, mlp_dim=48, patch_size=4)
  vit |= dict(grid=(6, 6), act='gelu_tanh')
  monkeypatch.setitem(encoders.ENCODERS, 'tiny', dict(vit=vit))
  published = encoders.Published('someone/tiny', 'a licence')
  monkeypatch.setitem(encoders.PUBLISHED, 'tiny', published)
