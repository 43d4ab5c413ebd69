"""`latent_stats`: against numpy over all latents, as one host and as two."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.train.test_hosts import free_port
from vqrae_jax import latent_stats
from vqrae_jax import latent_stats as latents
from vqrae_jax.data.pipeline import Augment, augment_image
from vqrae_jax.data.sources import open_source
from vqrae_jax.errors import UserError
from vqrae_jax.latent_stats import RunningStats
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.train import initialize
from vqrae_jax.train.run import Run

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """13 photographs of several sizes, a broken one among them."""
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


def write_config(folder, name='mine.py', **keys):
  config = tiny.run('none', **keys)
  config['data'] = dict(config['data'], max_skipped=0.1)
  (folder / name).write_text(
    'import ml_collections\n'
    'def get_config():\n'
    f'  return ml_collections.ConfigDict({config!r})\n'
  )
  return config


def all_latents(config, source, indices):
  """f64[n gh gw d], image by image, by the encoder that a run begins with."""
  tokenizer = build_tokenizer(config['model'])
  variables = jax.jit(lambda: initialize.from_seed(tokenizer, 0))()
  size = (config['data']['image_size'],) * 2
  augment = Augment(size, resize=size[0], crop='center', flip=False)
  rng = np.random.default_rng(1)
  images = [augment_image(source[i], augment, rng) for i in indices]
  encode = jax.jit(lambda x: tokenizer.apply(variables, x, method='encode'))
  return np.concatenate([encode(x[None]) for x in images]).astype(np.float64)


def measured(*more):
  latent_stats.main(['--config=mine.py', '--out=s.npz', *more])
  with np.load('s.npz') as file:
    assert set(file) == {'mean', 'var'}
    return file['mean'], file['var']


def close(found, rows):
  """1e-5 of a std: the latents' own, as batches of other sizes give them."""
  mean, var = found
  assert mean.dtype == var.dtype == np.float64
  std = rows.std(0)
  np.testing.assert_allclose(mean, rows.mean(0), atol=1e-5 * std.max())
  np.testing.assert_allclose(var, rows.var(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('position', (False, True))
def test_they_are_numpys_over_all_latents(position, photos, here, capsys):
  config = write_config(here)
  source = open_source(str(photos))
  kept = [i for i in range(13) if i != 5]
  rows = all_latents(config, source, kept)
  flags = ['--position'] if position else []
  found = measured(f'--data={photos}', '--batch_size=5', *flags)
  close(found, rows if position else rows.reshape(-1, 32))
  said = capsys.readouterr()
  last = said.out.splitlines()[-1]
  shape = '(4, 4, 32)' if position else '(32,)'
  assert (
    f'12 images (1 skipped), 192 tokens, mean and var of shape {shape}'
    in (last)
  )
  assert '05.png' in said.out + said.err
  assert {p.name for p in here.iterdir()} >= {'mine.py', 's.npz'}
  assert not list(here.glob('*writing*'))


def test_a_run_takes_what_the_command_wrote(photos, here):
  """From the config that names statistics which are not there yet."""
  model = tiny.model('none') | dict(latents=dict(norm='position', grid=(4, 4)))
  keys = dict(source=str(photos), image_size=16)
  config = write_config(
    here, model=model, data=keys, init=dict(latents='s.npz')
  )
  mean, var = measured()
  run = Run(config)
  with jax.set_mesh(run.mesh):
    state, _, _ = run.start()
    stats = state.codebook['latents']
    np.testing.assert_array_equal(stats['mean'], mean.astype('f4'))
    std = np.sqrt(var + 1e-5).astype('f4')
    np.testing.assert_array_equal(stats['std'], std)


def test_some_images_are_evenly_spaced(photos, here, capsys):
  assert list(latents.spread(13, 4)) == [0, 3, 6, 9]
  assert list(latents.spread(5, None)) == [0, 1, 2, 3, 4]
  config = write_config(here)
  rows = all_latents(config, open_source(str(photos)), [0, 3, 6, 9])
  close(measured(f'--data={photos}', '--images=4'), rows.reshape(-1, 32))
  assert '4 images, 64 tokens' in capsys.readouterr().out


def test_batches_and_hosts_do_not_move_the_sums():
  """Of the same latents: 1e-12 in f64, however they are cut."""
  rng = np.random.default_rng(0)
  rows = rng.normal(3, 0.2, (23, 2, 2, 4)).astype(np.float32)
  images = np.arange(23, dtype=np.uint8).reshape(23, 1, 1, 1)

  def encode(batch):
    return rows[batch[:, 0, 0, 0]]

  def found(indices, batch_size):
    told = []
    moments, count = latents.moments_of(
      encode, images[list(indices)], (4,), batch_size, told.append
    )
    assert count == sum(told) == len(indices)
    return moments

  whole = found(range(23), 23)
  want = rows.reshape(-1, 4).astype(np.float64)
  for batch_size in (1, 4, 7):
    for hosts in (1, 2, 3):
      total = RunningStats.none((4,))
      for host in range(hosts):
        total = total.merge(found(range(host, 23, hosts), batch_size))
      assert total.count == whole.count == 92
      np.testing.assert_allclose(total.mean, want.mean(0), rtol=1e-12)
      np.testing.assert_allclose(total.variance, want.var(0), rtol=1e-12)


WORKER = """
import json, sys
import jax
address, rank, count, argv = sys.argv[1:]
if int(count) > 1:
  jax.distributed.initialize(address, int(count), int(rank))
from vqrae_jax import latent_stats
latent_stats.main(json.loads(argv))
"""


def as_processes(count, argv, cwd):
  address = f'127.0.0.1:{free_port()}'
  env = tiny.alone(1) | {'PYTHONPATH': str(ROOT)}
  running = [
    subprocess.Popen(
      [sys.executable, '-c', WORKER, address, str(rank), str(count),
       json.dumps(argv)],
      env=env, cwd=cwd, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for rank in range(count)
  ]  # fmt: skip
  ends = [(*p.communicate(timeout=300), p.returncode) for p in running]
  assert [code for *_, code in ends] == [0] * count, ends
  return ''.join(out for out, *_ in ends)


def test_two_hosts_measure_as_one(photos, here):
  """Each reads its share; batches of one, so the latents are bitwise equal."""
  write_config(here)
  argv = ['--config=mine.py', f'--data={photos}', '--batch_size=1']
  found = {}
  for hosts in (1, 2):
    said = as_processes(hosts, [*argv, f'--out={hosts}.npz'], here)
    assert said.count('wrote') == 1 and '12 images (1 skipped)' in said
    with np.load(here / f'{hosts}.npz') as file:
      found[hosts] = {k: file[k] for k in file}
  for name, value in found[1].items():
    np.testing.assert_allclose(found[2][name], value, rtol=1e-12, atol=1e-13)


def test_real_photographs(shared_data, here):
  folder = shared_data / 'imagenet_sample'
  if not folder.is_dir():
    pytest.skip('no photographs at ../shared/data/imagenet_sample')
  data = dict(source=str(folder), image_size=32)
  config = write_config(here, data=data)
  source = open_source(str(folder))
  few = min(len(source), 40)
  rows = all_latents(config, source, latents.spread(len(source), few))
  close(measured(f'--images={few}'), rows.reshape(-1, 32))


@pytest.mark.parametrize(
  'argv, words',
  [
    ('', 'flag --config is missing'),
    ('--config=mine.py', 'flag --out is missing'),
    ('--config=mine.py --out=s.npy', '--out=s.npy must end in .npz'),
    ('--config=mine.py --out=no/s.npz', 'there is no folder no'),
    ('--config=mine.py --out=old.npz', 'old.npz exists and is not replaced'),
    ('--config=mine.py --out=s.npz --images=0', '--images=0 must be above 0'),
    ('--config=mine.py --out=s.npz --batch_size=0', 'size=0 must be above 0'),
    ('--config=mine.py --out=s.npz --images=x', 'must be a whole number'),
    ('--config=mine.py --out=s.npz --data=nowhere', 'data "nowhere"'),
    ('--config=mine.py --out=s.npz --data=all --images=99', 'holds 13'),
    ('--config=mine.py --out=s.npz --data=bad', '1 of 2 photographs could'),
    (
      '--config=mine.py --out=s.npz --data=bad --config.data.max_skipped=1.0',
      'none of the 2 photographs',
    ),
    ('--config=mine.py --out=s.npz --dta=x', 'did you mean "data"'),
    ('--config=mine.py --out=s.npz --config.batch_sise=3', 'did you mean .b'),
    ('--config=wrong.py --out=s.npz', r'8x8 tokens, .* are of 4x4'),
  ],
)
def test_bad_input_is_one_line(argv, words, photos, here):
  write_config(here)
  latent_norm = dict(norm='position', grid=(4, 4))
  write_config(
    here,
    'wrong.py',
    model=tiny.model('none') | dict(latents=latent_norm),
    data=dict(source=str(photos), image_size=32),
  )
  (here / 'old.npz').write_bytes(b'')
  (here / 'all').symlink_to(photos)
  (here / 'bad').mkdir()
  for name in ('a.png', 'b.png'):
    (here / 'bad' / name).write_bytes(b'\x89PNG and no more')
  before = {p.name for p in here.iterdir()}
  with pytest.raises(UserError, match=words) as error:
    latent_stats.main(argv.split())
  assert '\n' not in str(error.value)
  assert {p.name for p in here.iterdir()} == before
