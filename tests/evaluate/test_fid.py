"""The Fréchet distance against scipy and by hand; Inception against PyTorch."""

import functools
import importlib.util
import sys
import types

import jax
import numpy as np
import pytest
import scipy.linalg

from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import fid
from vqrae_jax.nn import inception
from vqrae_jax.pretrained import networks


def features(n, d, noise):
  """f64[n d], correlated and far from zero, as Inception's are."""
  rng = np.random.default_rng(0)
  mix = np.eye(d) + rng.random((d, d)) ** 8
  x = np.abs(rng.normal(0.4, 0.3, (n, d))) @ mix
  return x + np.random.default_rng(1).normal(0, noise, (n, d)) * (noise > 0)


def test_against_scipy():
  a, b = features(400, 48, 0.0), features(400, 48, 0.2)
  one, other = (fid.Moments.of(x).statistics() for x in (a, b))
  for (mean, covariance), x in zip((one, other), (a, b), strict=True):
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.T), rtol=1e-9, atol=1e-13)
  root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
  want = ((a.mean(0) - b.mean(0)) ** 2).sum()
  want += np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
  np.testing.assert_allclose(fid.frechet_distance(one, other), want, rtol=1e-9)
  assert abs(fid.frechet_distance(one, one)) < 1e-12 * np.trace(one[1])


def test_fewer_images_than_features():
  """Covariances are singular, and a root of their product is off by 5e-7. The
  exact trace is the singular values' sum of the centred features' product."""
  a, b = features(30, 48, 0.0), features(30, 48, 0.2)
  found = fid.frechet_distance(
    *(fid.Moments.of(x).statistics() for x in (a, b))
  )
  roots = np.linalg.svd((a - a.mean(0)) @ (b - b.mean(0)).T, compute_uv=False)
  want = ((a.mean(0) - b.mean(0)) ** 2).sum() - 2 * roots.sum() / 29
  want += np.trace(np.cov(a.T)) + np.trace(np.cov(b.T))
  np.testing.assert_allclose(found, want, rtol=1e-11)


def test_no_spread_and_not_finite():
  zero, x = np.zeros((4, 4)), features(30, 4, 0.2)
  mean, covariance = fid.Moments.of(x).statistics()
  assert fid.frechet_distance((mean, zero), (mean, zero)) == 0
  found = fid.frechet_distance((mean, covariance), (mean + 1, zero))
  np.testing.assert_allclose(found, 4 + np.trace(covariance))
  covariance[1, 2] = np.nan
  assert np.isnan(fid.frechet_distance((mean, covariance), (mean, zero)))


def test_parts_merge_in_any_order():
  x = features(50, 8, 0.2)
  whole = fid.Moments.of(x)
  parts = [fid.Moments.of(part) for part in np.split(x, (1, 1, 30))]
  for order in (parts, parts[::-1]):
    total = sum(order)
    assert total.count == 50
    np.testing.assert_allclose(total.total, whole.total, rtol=1e-14)
    np.testing.assert_allclose(total.products, whole.products, rtol=1e-14)


def test_statistics_files(tmp_path):
  mean, covariance = fid.Moments.of(features(50, 8, 0.2)).statistics()
  good, bad = tmp_path / 'good.npz', tmp_path / 'bad.npz'
  np.savez(good, mu=mean, sigma=covariance, more=1)
  for found, want in zip(
    fid.load_statistics(good, 8), (mean, covariance), strict=True
  ):
    np.testing.assert_array_equal(found, want)
  with pytest.raises(UserError, match='good.npz.* 16 '):
    fid.load_statistics(good, 16)
  np.savez(bad, mu=mean)
  np.save(tmp_path / 'array.npy', mean)
  for path in (bad, tmp_path / 'none.npz', tmp_path, tmp_path / 'array.npy'):
    with pytest.raises(UserError, match='"sigma"'):
      fid.load_statistics(path, 8)
  np.savez(bad, mu=mean, sigma=covariance * np.nan)
  with pytest.raises(UserError, match='bad.npz has NaN'):
    fid.load_statistics(bad, 8)
  np.savez_compressed(bad, mu=mean, sigma=covariance)
  data = bytearray(bad.read_bytes())
  data[240:304] = b'\xff' * 64  # no stream of zlib
  bad.write_bytes(data)
  with pytest.raises(UserError, match='bad.npz'):
    fid.load_statistics(bad, 8)
  good.write_bytes(good.read_bytes()[:100])
  with pytest.raises(UserError, match='good.npz'):
    fid.load_statistics(good, 8)


@functools.cache
def torch_inception():
  """torch-fidelity's network, every array of it random."""
  torch = pytest.importorskip('torch')
  spec = importlib.util.find_spec('torch_fidelity')
  if spec is None:
    pytest.skip('no package torch_fidelity')
  # Its own __init__ imports torchvision.
  package = types.ModuleType('torch_fidelity')
  package.__path__ = list(spec.submodule_search_locations)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, 'torch_fidelity', package)
    module = importlib.import_module(
      'torch_fidelity.feature_extractor_inceptionv3'
    )
    patch.setattr(module, 'load_state_dict_from_url', lambda *_, **__: {})
    kind = module.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as empty:
      empty.setattr(kind, 'load_state_dict', lambda self, state: None)
      net = kind('inception', ['2048'])
  generator = torch.Generator().manual_seed(0)
  for name, x in net.state_dict().items():
    if name.endswith('conv.weight'):
      x.normal_(0, (2 / x[0].numel()) ** 0.5, generator=generator)
    elif name.endswith(('bn.weight', 'running_var')):
      x.uniform_(0.5, 1.5, generator=generator)
    elif name.endswith(('bn.bias', 'running_mean')):
      x.normal_(0, 0.1, generator=generator)
  return torch, net


def test_inception_is_torch_fidelitys(tmp_path):
  """By its file, on an image of one side smaller than 299 and one larger."""
  torch, net = torch_inception()
  path = tmp_path / 'inception.pth'
  torch.save(net.state_dict(), path)
  tree = networks.load('rfid', {'inception': path})
  apply = jax.jit(inception.InceptionV3().apply)
  images = np.random.default_rng(0).integers(0, 256, (1, 40, 310, 3), np.uint8)
  (want,) = net(torch.from_numpy(images).movedim(-1, 1))
  want = want.numpy()
  found = np.asarray(apply({'params': tree['net']}, images))
  np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
