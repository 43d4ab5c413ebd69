"""The perceptual networks' files, and files that do not fit."""

import dataclasses
import functools
import re
import sys

import jax
import numpy as np
import pytest

from tests.losses import torch_networks
from tests.losses.torch_networks import SMALL, saved
from vqrae_jax.errors import UserError
from vqrae_jax.files import digest
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import networks
from vqrae_jax.weights import hub
from vqrae_jax.weights.load import export

torch = pytest.importorskip('torch')


@functools.cache
def states(term):
  """{row of the table: a random state dict under the published names}."""
  return torch_networks.states(torch_networks.made(term, **SMALL[term]))


@pytest.mark.parametrize('term', SMALL)
def test_every_array_arrives(tmp_path, term):
  """And goes back under its name, to the last bit."""
  tree = networks.load(term, saved(tmp_path, states(term)), **SMALL[term])
  for part, (row, table) in networks.PARTS[term].items():
    back = export(table, tree[part])
    want = {
      key: value.numpy()
      for key, value in states(term)[row].items()
      if row != 'vgg16' or key.startswith('features.')
    }
    assert back.keys() == want.keys()
    for key, value in want.items():
      np.testing.assert_array_equal(back[key], value, key)
  for leaf in jax.tree.leaves(tree):
    assert leaf.dtype == np.float32


@pytest.mark.parametrize('term', SMALL)
def test_random_arrays(term):
  """Of the form of loaded ones, drawn from the key alone, told apart."""
  draw = jax.jit(functools.partial(networks.random, term, **SMALL[term]))
  one, again, other = map(draw, map(jax.random.key, (0, 0, 1)))
  jax.tree.map(np.testing.assert_array_equal, one, again)
  one, other = trees.flatten(one), trees.flatten(other)
  for name in one:
    if name.endswith('kernel'):
      assert np.isfinite(one[name]).all()
      assert np.abs(one[name] - other[name]).max() > 0
    if name.startswith('heads/'):
      assert one[name].min() >= 0


@pytest.mark.parametrize(
  'term, size',
  [
    # Of torchvision's VGG16 the classifier's 123,642,856 are left out.
    ('lpips', 138_357_544 - 123_642_856),
    ('convnext', 50_223_688),
  ],
)
def test_sizes_of_the_published_networks(term, size):
  draw = functools.partial(networks.random, term)
  net = jax.eval_shape(draw, jax.random.key(0))['net']
  assert sum(x.size for x in jax.tree.leaves(net)) == size


def test_files_that_do_not_fit(tmp_path):
  vgg, heads = states('lpips').values()
  last, tap = 'features.28.bias', 'lin3.model.1.weight'
  for row, state, words in (
    ('vgg16', {k: v for k, v in vgg.items() if k != last}, last),
    ('vgg16', vgg | {'features.30.bias': vgg[last]}, 'features.30.bias'),
    ('vgg16', vgg | {last: torch.full((8,), torch.nan)}, last),
    ('vgg16', heads, 'features.0.weight'),
    ('lpips-vgg', vgg, tap[:4]),
    ('lpips-vgg', heads | {tap: -heads[tap]}, 'negative'),
  ):
    files = saved(tmp_path, states('lpips') | {row: state})
    with pytest.raises(UserError, match=re.escape(words)) as caught:
      networks.load('lpips', files, **SMALL['lpips'])
    assert '\n' not in str(caught.value)
  # And a smaller ConvNeXt than the published.
  with pytest.raises(UserError, match='missing in it: .*convnext-small'):
    networks.load('convnext', saved(tmp_path, states('convnext')))


def test_unknown_terms():
  for call, more in ((networks.load, ()), (networks.random, (None,))):
    with pytest.raises(UserError, match='did you mean "lpips"'):
      call('lpip', *more)


def test_nothing_here_names_the_command(tmp_path, monkeypatch):
  monkeypatch.setenv('VQRAE_JAX_CACHE', str(tmp_path))
  # A module without a spec is no package with heads in it.
  monkeypatch.setitem(sys.modules, 'lpips', type(sys)('lpips'))
  with pytest.raises(UserError, match='fetch_weights --names=convnext-small'):
    networks.load('convnext')
  with pytest.raises(UserError, match='--names=vgg16,lpips-vgg,inception'):
    networks.files_of(['lpips', 'rfid'])


def test_the_heads_of_an_installed_package(tmp_path, monkeypatch):
  """Its file is found by its place, if it is the published one."""
  path = tmp_path / 'lpips' / 'weights' / 'v0.1' / 'vgg.pth'
  path.parent.mkdir(parents=True)
  (tmp_path / 'lpips' / '__init__.py').write_text('raise ImportError')
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'lpips', raising=False)
  assert networks.installed_heads() is None
  files = saved(tmp_path, states('lpips'))
  files.pop('lpips-vgg').rename(path)
  assert networks.installed_heads() is None  # another file
  row = dataclasses.replace(hub.FILES['lpips-vgg'], sha256=digest(path))
  monkeypatch.setitem(hub.FILES, 'lpips-vgg', row)
  assert networks.installed_heads() == path
  tree = networks.load('lpips', files, **SMALL['lpips'])
  want = states('lpips')['lpips-vgg']['lin2.model.1.weight'].numpy()
  np.testing.assert_array_equal(tree['heads']['tap3'], want[0, :, 0, 0])
  assert 'lpips' not in sys.modules
