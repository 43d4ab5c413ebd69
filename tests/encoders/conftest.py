"""The hub's cache, a folder to damage, and a row of the table."""

import pathlib
import shutil

import pytest

from tests import tiny
from tests.encoders import references
from vqrae_jax import encoders

COMMIT = '0123456789abcdef0123456789abcdef01234567'


@pytest.fixture
def copy(tmp_path) -> pathlib.Path:
  """A tiny SigLIP's folder, to be damaged."""
  return shutil.copytree(references.saved('siglip'), tmp_path / 'siglip')


@pytest.fixture
def cached(monkeypatch, tmp_path):
  """(ORG/NAME, files) -> the snapshot, as the hub's client writes it into its
  cache; there is no connection to the hub."""
  import huggingface_hub.constants as constants

  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))

  def write(hub, files):
    repository = tmp_path / 'hub' / f'models--{hub.replace("/", "--")}'
    snapshot = repository / 'snapshots' / COMMIT
    snapshot.mkdir(parents=True)
    (repository / 'refs').mkdir()
    (repository / 'refs' / 'main').write_text(COMMIT)
    for path in files:
      shutil.copy(path, snapshot)
    return snapshot

  return write


@pytest.fixture
def tiny_row(monkeypatch):
  """A row of the table, for files that do not identify themselves."""
  vit = tiny.VIT | dict(act='gelu_tanh')
  monkeypatch.setitem(encoders.ENCODERS, 'tiny', dict(vit=vit))
  published = encoders.Published('someone/tiny', 'a licence')
  monkeypatch.setitem(encoders.PUBLISHED, 'tiny', published)
