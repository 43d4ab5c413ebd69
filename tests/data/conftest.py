"""No test here reads or leaves a cache of the user."""

import pytest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
  folder = tmp_path_factory.mktemp('cache')
  monkeypatch.setenv('VQRAE_JAX_CACHE', str(folder))
  return folder
