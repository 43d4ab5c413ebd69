"""`latent_stats`: against numpy over all latents, as one host and as two."""

import functools
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from tests import runs, tiny
from vqrae_jax import latent_stats
from vqrae_jax.data.pipeline import Augment, augment_image
from vqrae_jax.data.sources import open_source
from vqrae_jax.errors import UserError
from vqrae_jax.latent_stats import RunningStats
from vqrae_jax.train import initialize as init_lib

POSITION = dict(norm='position', grid=(4, 4))


@pytest.mark.parametrize('shape', ((8,), (2, 3, 4)))
def test_any_split_in_any_order_is_the_sum(shape):
  """Against numpy in f64, means a thousand stds from zero beside small."""
  rng = np.random.default_rng(0)
  mean, std = rng.normal(0, 100, shape), rng.uniform(0.1, 3, shape)
  rows = rng.normal(mean, std, (500, *shape)).astype('f4').astype('f8')
  for count in (0, 1, 60):
    cuts = np.sort([0, *rng.choice(np.arange(1, 500), count, False)])
    parts = [RunningStats.of(part) for part in np.split(rows, cuts)]
    rng.shuffle(parts)  # the empty one among them
    chain = functools.reduce(RunningStats.merge, parts)
    while len(parts) > 1:
      parts.append(parts.pop(0).merge(parts.pop(0)))
    for found in (chain, *parts):
      assert found.count == len(rows)
      np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
      np.testing.assert_allclose(found.variance, rows.var(0), rtol=1e-12)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """13 images of several sizes, a broken one among them."""
  folder = tmp_path_factory.mktemp('photos')
  for i in range(13):
    h, w = ((24, 24), (40, 17), (12, 30), (16, 16))[i % 4]
    path = folder / f'{i:02}.png'
    Image.fromarray(tiny.images(1, h, w, seed=i)[0]).save(path)
  (folder / '05.png').write_bytes((folder / '04.png').read_bytes()[:200])
  return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def write_config(**keys):
  """mine.py, a config of continuous tokens; a tenth may be unreadable."""
  config = tiny.run('none', **keys)
  config['data'] |= dict(max_skipped=0.1)
  with open('mine.py', 'w') as file:
    file.write(f'def get_config():\n  return {config!r}\n')
  return config


def all_latents(config, photos, indices):
  """f64[n gh gw d] by the encoder that a run begins with."""
  tokenizer = vqrae_jax.build_tokenizer(config['model'])
  variables = jax.jit(lambda: init_lib.random_variables(tokenizer, 0))()
  augment = Augment((16, 16), resize=16, crop='center', flip=False)
  source, rng = open_source(str(photos)), np.random.default_rng(1)
  images = np.stack([augment_image(source[i], augment, rng) for i in indices])
  latents = vqrae_jax.encode(tokenizer, variables, images)
  return np.asarray(latents, np.float64)


def check(rows, *flags):
  """1e-5 of a std: the latents' own, as batches of other sizes give them."""
  latent_stats.main(['--config=mine.py', '--out=s.npz', *flags])
  with np.load('s.npz') as file:
    found = dict(file)
  assert {k: v.dtype for k, v in found.items()} == dict(mean='f8', var='f8')
  atol = 1e-5 * rows.std(0).max()
  np.testing.assert_allclose(found['mean'], rows.mean(0), atol=atol)
  np.testing.assert_allclose(found['var'], rows.var(0), rtol=1e-4, atol=1e-5)


def test_they_are_numpys_over_all_latents(photos, here, capsys):
  """By position, of all images but the broken one; the config names
  statistics that are not there yet."""
  config = write_config(
    model=tiny.model('none') | dict(latents=POSITION),
    data=dict(source=str(photos), image_size=16),
    init=dict(latents='s.npz'),
  )
  kept = [i for i in range(13) if i != 5]
  check(all_latents(config, photos, kept), '--batch_size=5')
  out, err = capsys.readouterr()
  for words in ('12 images', '1 skipped', '192 tokens', '(4, 4, 32)'):
    assert words in out.splitlines()[-1]
  assert '05.png' in out + err
  assert {p.name for p in here.iterdir()} == {'mine.py', 's.npz'}


def test_some_images_are_evenly_spaced(photos, here, capsys):
  """By channel."""
  rows = all_latents(write_config(), photos, [0, 3, 6, 9])
  check(rows.reshape(-1, 32), f'--data={photos}', '--images=4')
  assert '4 images, 64 tokens' in capsys.readouterr().out


@pytest.mark.slow
def test_two_hosts_measure_as_one(photos, here):
  """Each reads its share; batches of one, so the latents are bitwise equal."""
  write_config()
  hosts = f'--num_processes=2 --coordinator_address={runs.free_address()}'
  running = [
    subprocess.Popen(
      [sys.executable, '-m', latent_stats.MODULE, '--config=mine.py',
       f'--data={photos}', '--position', '--batch_size=1', *flags.split()],
      env=tiny.alone(1) | {'PYTHONPATH': str(runs.ROOT)},
      text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for flags in ('--out=one.npz', f'--out=two.npz --process_id=0 {hosts}',
                  f'--out=two.npz --process_id=1 {hosts}')
  ]  # fmt: skip
  ends = [(*p.communicate(timeout=300), p.returncode) for p in running]
  assert [code for *_, code in ends] == [0] * 3, ends
  one, two, silent = (out for out, *_ in ends)
  assert '12 images (1 skipped)' in one and '12 images (1 skipped)' in two
  assert 'wrote' not in silent
  with np.load('one.npz') as one, np.load('two.npz') as two:
    for name in one:
      np.testing.assert_allclose(two[name], one[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
  'argv, words',
  [
    ('--out=s.npy', '--out=s.npy'),
    ('--out=no/s.npz', '--out=no/s.npz'),
    ('--out=old.npz', '--out=old.npz'),
    ('--images=0', '--images=0'),
    ('--batch_size=0', 'batch_size=0'),
    ('--data=all --images=99', '99.* 13'),
    ('--data=bad', '1 of 2 .*data.max_skipped'),
    ('--data=bad --config.data.max_skipped=1.0', '2 of 2 '),
  ],
)
def test_bad_input_is_one_line(argv, words, photos, here):
  write_config()
  (here / 'old.npz').write_bytes(b'')
  (here / 'all').symlink_to(photos)
  (here / 'bad').mkdir()
  for name in ('a.png', 'b.png'):
    (here / 'bad' / name).write_bytes(b'\x89PNG and no more')
  before = {p.name for p in here.iterdir()}
  with pytest.raises(UserError, match=words) as error:
    latent_stats.main(['--config=mine.py', '--out=s.npz', *argv.split()])
  assert '\n' not in str(error.value)
  assert {p.name for p in here.iterdir()} == before


def test_latents_that_training_changes_have_none(photos, here):
  config = write_config()
  config['model']['encoder'] |= dict(layers=(0, 1), fuse='attention')
  (here / 'mine.py').write_text(f'def get_config():\n  return {config!r}\n')
  with pytest.raises(UserError, match='fuse="attention" trains the latents'):
    latent_stats.main(['--config=mine.py', f'--data={photos}', '--out=s.npz'])
