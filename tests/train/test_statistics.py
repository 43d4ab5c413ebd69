"""Statistics of latents in runs: where they come from, that they stay."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from tests import tiny
from vqrae_jax.errors import UserError
from vqrae_jax.losses.latent import distill
from vqrae_jax.ops import trees
from vqrae_jax.train import loop
from vqrae_jax.train.run import Run
from vqrae_jax.types import LatentInputs

pytestmark = pytest.mark.usefixtures('one_device')

FROZEN = (('encoder/.*', None), ('.*', dict(lr=1e-3)))
NORMS = {
  'channel': (dict(norm='channel'), (32,)),
  'position': (dict(norm='position', grid=(4, 4)), (32, 4, 4)),
}


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('photos')
  for i in range(3):
    Image.fromarray(tiny.images(1, 24, 24, seed=i)[0]).save(folder / f'{i}.png')
  return folder


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """{norm: a file of statistics}, by position in RAE's layout."""
  folder = tmp_path_factory.mktemp('stats')
  rng = np.random.default_rng(0)
  for norm, (_, shape) in NORMS.items():
    stats = dict(mean=rng.normal(size=shape), var=rng.uniform(0.5, 2, shape))
    np.savez(folder / f'{norm}.npz', **stats)
  return {norm: str(folder / f'{norm}.npz') for norm in NORMS}


def config(photos, norm='channel', kind='vq-ema', **keys):
  latents = NORMS[norm][0] if norm in NORMS else dict(norm=norm)
  base = dict(
    model=tiny.model(kind) | dict(latents=latents),
    data=dict(source=str(photos), image_size=16),
    log=dict(every=1, images_every=0, usage_window=2, tensorboard=False),
    schedules=FROZEN,
    duration=2,
    checkpoint=dict(every=1),
  )
  return tiny.run(kind, **(base | keys))


def tables(workdir):
  _, variables = vqrae_jax.load_tokenizer(workdir / 'tokenizer')
  return {n: np.asarray(x) for n, x in variables['codebook']['latents'].items()}


def wanted(path):
  with np.load(path) as stats:
    mean, std = stats['mean'], np.sqrt(stats['var'] + 1e-5)
  if mean.ndim == 3:
    mean, std = np.moveaxis(mean, 0, -1), np.moveaxis(std, 0, -1)
  return {'mean': mean.astype('f4'), 'std': std.astype('f4')}


@pytest.fixture(scope='module', params=NORMS)
def parent(request, photos, files, tmp_path_factory):
  """(norm, the workdir of a finished run of two steps)."""
  workdir = tmp_path_factory.mktemp(request.param) / 'run'
  init = dict(latents=files[request.param])
  loop.train(config(photos, request.param, init=init), workdir)
  return request.param, workdir


def same(found, want):
  for name in ('mean', 'std'):
    np.testing.assert_array_equal(found[name], want[name], err_msg=name)


def test_training_and_init_from_leave_the_statistics(parent, photos, files):
  """In the exported tokenizer, in a run from it and in one from the workdir."""
  norm, workdir = parent
  same(tables(workdir), wanted(files[norm]))
  for path in (workdir, workdir / 'tokenizer'):
    run = Run(config(photos, norm, init_from=str(path)))
    with jax.set_mesh(run.mesh):
      state, _, _ = run.start()
    same(state.codebook['latents'], wanted(files[norm]))


def test_a_table_still_starts_at_normalised_tokens(photos, files):
  """`init.latents` is no codebook: the quantizer's begins at the data."""
  run = Run(config(photos, init=dict(latents=files['channel'])))
  with jax.set_mesh(run.mesh):
    state, frozen, _ = run.start()
  stats = wanted(files['channel'])
  same(state.codebook['latents'], stats)
  assert run.frozen_record(frozen)['params']['source'] == 'seed 0'
  batch = run.batches.batch(0)['images']
  params = trees.merge(state.tokenizer.params, frozen.params)
  variables = {'params': params}
  latents = run.tokenizer.apply(variables, batch, method='encode')
  normal = (np.asarray(latents) - stats['mean']) / stats['std']
  normal = normal.reshape(-1, 32)
  for code in np.asarray(state.codebook['quantizer']['codes']):
    assert np.abs(normal - code).max(1).min() < 1e-4


def test_a_run_resumes_without_the_file(parent, photos, tmp_path):
  """Its checkpoint holds them; a new run needs the file."""
  norm, workdir = parent
  gone = dict(latents=str(tmp_path / 'gone.npz'))
  shutil.copytree(workdir, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'tokenizer')
  longer = config(photos, norm, init=gone, duration=3)
  with pytest.raises(UserError, match='init.latents=.*gone.npz'):
    loop.train(longer, tmp_path / 'new')
  loop.train(longer, tmp_path / 'run')
  same(tables(tmp_path / 'run'), tables(workdir))


def test_distilling_from_itself_is_in_the_encoders_space():
  """What the decoder reads against the latents, in their own units."""
  tokenizer, variables = tiny.normalised('vq-ema', 'channel')
  out = vqrae_jax.reconstruct(tokenizer, variables, tiny.images(2))
  stats = variables['codebook']['latents']
  read = np.asarray(out.quantizer.codes) * stats['std'] + stats['mean']
  want = np.mean((read - np.asarray(out.latents)) ** 2)
  np.testing.assert_allclose(distill(LatentInputs(out)), want, rtol=1e-5)
  tokenizer, variables = tiny.normalised('none', 'channel')
  out = vqrae_jax.reconstruct(tokenizer, variables, tiny.images(2))
  assert distill(LatentInputs(out)) < 1e-10
