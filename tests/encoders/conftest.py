"""The hub's cache, and a row of the table, for tests of encoders."""

import pytest

from vqrae_jax import encoders
from vqrae_jax.encoders import published

COMMIT = '0123456789abcdef0123456789abcdef01234567'


@pytest.fixture
def cache(monkeypatch, tmp_path):
  """An empty cache of the hub, and no way to the hub."""
  import huggingface_hub.constants as constants

  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  return tmp_path / 'hub'


def cached(cache, hub, files, branch='main'):
  """Lays a snapshot as the hub's client does."""
  repository = cache / f'models--{hub.replace("/", "--")}'
  snapshot = repository / 'snapshots' / COMMIT
  snapshot.mkdir(parents=True)
  (repository / 'refs').mkdir()
  (repository / 'refs' / branch).write_text(COMMIT)
  for name, path in files.items():
    (snapshot / name).write_bytes(path.read_bytes())
  return snapshot


@pytest.fixture
def tiny_row(monkeypatch):
  """A row of the table, for files that do not say what they are."""
  vit = dict(
    width=32,
    depth=2,
    num_heads=4,
    mlp_dim=48,
    patch_size=4,
    grid=(6, 6),
    act='gelu_tanh',
  )
  monkeypatch.setitem(encoders.ENCODERS, 'tiny', dict(vit=vit))
  row = published.Published('someone/tiny', 'a licence')
  monkeypatch.setitem(published.PUBLISHED, 'tiny', row)
