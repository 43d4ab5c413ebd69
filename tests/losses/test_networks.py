"""The perceptual networks' files, and files that do not fit."""

import functools
import re
import sys

import jax
import numpy as np
import pytest

from tests.losses import torch_networks
from vqrae_jax.errors import UserError
from vqrae_jax.nn.vgg import WIDTHS
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import networks
from vqrae_jax.weights import hub
from vqrae_jax.weights.load import export

torch = pytest.importorskip('torch')

SIZES = {
  'lpips': dict(widths=(4, 4, 8, 8, 8)),
  'convnext': dict(depths=(1, 2, 1, 1), widths=(4, 8, 12, 16), classes=5),
}


@functools.cache
def states(term):
  """{row of the table: a random state dict under the published names}."""
  sizes = SIZES[term]
  made = {'convnext-small': torch_networks.ConvNeXt}
  if term == 'lpips':
    made = {'vgg16': torch_networks.VGG16, 'lpips-vgg': torch_networks.Heads}
  return {
    row: torch_networks.randomised(network(**sizes)).state_dict()
    for row, network in made.items()
  }


def saved(folder, term, **changes):
  """The files; `changes` are rows' state dicts to save in their place."""
  files = {}
  for row, state in (states(term) | changes).items():
    files[row] = folder / f'{row}.pth'
    torch.save(state, files[row])
  return files


@pytest.mark.parametrize('term', SIZES)
def test_every_array_arrives(tmp_path, term):
  """And goes back under its name, to the last bit."""
  tree = networks.load(term, saved(tmp_path, term), **SIZES[term])
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


@pytest.mark.parametrize('term', SIZES)
def test_random_arrays(term):
  """Of the form of loaded ones, drawn from the key alone, told apart."""
  draw = jax.jit(functools.partial(networks.random, term, **SIZES[term]))
  one, again, other = map(draw, map(jax.random.key, (0, 0, 1)))
  jax.tree.map(np.testing.assert_array_equal, one, again)
  kernels = [n for n in trees.flatten(one) if n.endswith('kernel')]
  for name in kernels:
    a, b = trees.flatten(one)[name], trees.flatten(other)[name]
    assert np.isfinite(a).all() and np.abs(a - b).max() > 0
  for head in one.get('heads', {}).values():
    assert head.min() >= 0


def test_names_and_sizes_of_the_published_files():
  """torchvision's numbers of VGG16's convolutions, LPIPS's of its heads."""
  sources = [
    r.source for r in networks.VGG16_TABLE.rows if hasattr(r, 'source')
  ]
  numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
  assert sources == [
    f'features.{n}.{word}' for n in numbers for word in ('weight', 'bias')
  ]
  assert [r.source for r in networks.HEADS_TABLE.rows] == [
    f'lin{n}.model.1.weight' for n in range(5)
  ]
  made = {
    term: jax.eval_shape(
      functools.partial(networks.random, term), jax.random.key(0)
    )
    for term in SIZES
  }
  shapes = {n: x.shape for n, x in made['lpips']['heads'].items()}
  assert shapes == {f'tap{n}': (w,) for n, w in enumerate(WIDTHS, 1)}
  sizes = {
    term: sum(x.size for x in jax.tree.leaves(tree['net']))
    for term, tree in made.items()
  }
  # Of torchvision's VGG16 the classifier's 123,642,856 are left out.
  wanted = dict(lpips=138_357_544 - 123_642_856, convnext=50_223_688)
  assert sizes == wanted


def test_files_that_do_not_fit(tmp_path):
  vgg, heads = states('lpips')['vgg16'], states('lpips')['lpips-vgg']
  last, tap = 'features.28.bias', 'lin3.model.1.weight'
  for row, state, words in (
    ('vgg16', {k: v for k, v in vgg.items() if k != last}, last),
    ('vgg16', vgg | {'features.30.bias': vgg[last]}, 'features.30.bias'),
    ('vgg16', vgg | {last: torch.full((8,), torch.nan)}, last),
    ('vgg16', heads, 'features.0.weight'),
    ('lpips-vgg', vgg, tap[:4]),
    ('lpips-vgg', heads | {tap: -heads[tap]}, 'negative'),
  ):
    files = saved(tmp_path, 'lpips', **{row: state})
    with pytest.raises(UserError, match=re.escape(words)) as caught:
      networks.load('lpips', files, **SIZES['lpips'])
    assert '\n' not in str(caught.value)
  # And a smaller ConvNeXt than the published.
  with pytest.raises(UserError, match='missing in it: .*convnext-small'):
    networks.load('convnext', saved(tmp_path, 'convnext'))


def test_unknown_terms():
  for call in (networks.load, networks.random):
    with pytest.raises(UserError, match='did you mean "lpips"'):
      call('lpip', *([jax.random.key(0)] if call is networks.random else []))


@pytest.fixture
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv('VQRAE_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path


def test_nothing_here_names_the_command(cache, monkeypatch):
  # A module without a spec is no package with heads in it.
  monkeypatch.setitem(sys.modules, 'lpips', type(sys)('lpips'))
  with pytest.raises(UserError, match='fetch_weights --names=vgg16'):
    networks.load('lpips')
  with pytest.raises(UserError, match='fetch_weights --names=convnext-small'):
    networks.load('convnext')


def test_the_heads_of_an_installed_package(cache, monkeypatch):
  """Its file is found by its place, if it is the published one."""
  place = cache / 'site' / 'lpips'
  folder = place / 'weights' / 'v0.1'
  folder.mkdir(parents=True)
  (place / '__init__.py').write_text('raise ImportError("imported")')
  monkeypatch.syspath_prepend(cache / 'site')
  monkeypatch.delitem(sys.modules, 'lpips', raising=False)
  assert networks.installed_heads() is None
  files = saved(cache, 'lpips')
  path = folder / 'vgg.pth'
  path.write_bytes(files['lpips-vgg'].read_bytes())
  assert networks.installed_heads() is None  # another file
  row = hub.FILES['lpips-vgg']
  ours = row.__class__(row.url, row.licence, '', hub.digest(path))
  monkeypatch.setitem(hub.FILES, 'lpips-vgg', ours)
  assert networks.installed_heads() == path
  tree = networks.load('lpips', {'vgg16': files['vgg16']}, **SIZES['lpips'])
  want = states('lpips')['lpips-vgg']['lin2.model.1.weight'].numpy()
  np.testing.assert_array_equal(tree['heads']['tap3'], want[0, :, 0, 0])
  assert 'lpips' not in sys.modules
