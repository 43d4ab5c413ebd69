"""k-NN and the linear probe against scikit-learn."""

import numpy as np
import pytest

from vqrae_jax.evaluate import probes

neighbors = pytest.importorskip('sklearn.neighbors')
linear_model = pytest.importorskip('sklearn.linear_model')


def clusters(n=240, classes=5, d=12):
  rng = np.random.default_rng(0)
  labels = rng.integers(classes, size=n).astype(np.int32)
  centres = rng.normal(size=(classes, d))
  scales = rng.uniform(0.1, 3, d)
  latents = (centres[labels] + rng.normal(0, 1.2, (n, d))) * scales + 5
  return latents.astype(np.float32), labels


def test_halves_take_every_other_of_each_class():
  labels = np.array([0, 0, 1, 0, 2, 1, 1, 0])
  assert probes.halves(labels).tolist() == [1, 0, 1, 1, 1, 0, 1, 0]


def test_knn():
  latents, labels = clusters()
  train = probes.halves(labels)
  unit = latents / np.linalg.norm(latents, axis=-1, keepdims=True)
  peer = neighbors.KNeighborsClassifier(
    probes.K, weights=lambda d: np.exp(-(d**2) / 2 / probes.TEMPERATURE)
  ).fit(unit[train], labels[train])
  want = peer.score(unit[~train], labels[~train])
  assert probes.knn(latents, labels) == pytest.approx(want)
  assert 0.3 < want < 1


def test_linear():
  latents, labels = clusters()
  train = probes.halves(labels)
  x = (latents - latents[train].mean(0)) / latents[train].std(0)
  peer = linear_model.LogisticRegression(
    C=1 / (probes.DECAY * train.sum()), max_iter=1000
  ).fit(x[train], labels[train])
  want = peer.score(x[~train], labels[~train])
  assert probes.linear(latents, labels) == pytest.approx(want, abs=0.01)
  assert 0.3 < want < 1
  assert probes.linear(np.zeros_like(latents), labels) < 0.35
