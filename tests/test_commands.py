"""Command lines as a user types them: help, one-line errors, exit code 2."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vqrae_jax import cli, export, reconstruct_images
from vqrae_jax.errors import UserError
from vqrae_jax.train import __main__ as train_main

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = '--config=configs/quickstart.py'


def typed(*argv, cwd=ROOT):
  """A real process: (exit code, stdout, stderr)."""
  done = subprocess.run(
    [sys.executable, '-m', *argv], capture_output=True, text=True, cwd=cwd
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
  'module',
  ('train', 'reconstruct_images', 'fetch_weights', 'convert', 'latent_stats'),
)
def test_help_has_an_example(module):
  code, out, _ = typed(f'vqrae_jax.{module}', '--help')
  assert code == 0
  assert f'example:\n  python -m vqrae_jax.{module} --' in out


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
  code, out, err = typed('vqrae_jax.train', '--confg=x', cwd=tmp_path)
  assert (code, out) == (2, '')
  assert err == 'error: unknown flag --confg; did you mean "config"?\n'
  assert not list(tmp_path.iterdir())


def test_the_installed_configs_are_found_from_anywhere(tmp_path):
  path = cli.find_config('configs/simvq_siglip_l.py')
  assert pathlib.Path(path).is_file()
  code, _, err = typed(
    'vqrae_jax.train', '--config=configs/simvq_siglip_l.py', cwd=tmp_path
  )
  assert code == 2
  assert 'data "FOLDER" is no folder' in err.splitlines()[-1]


@pytest.mark.parametrize(
  'argv, words',
  [
    ([], 'flag --config is missing'),
    (['--config=configs/quickstrt.py'], 'did you mean "configs/quickstart.py"'),
    ([CONFIG, '--config.batch_sise=3'], 'did you mean .batch_size'),
    ([CONFIG, '--config.optim.b3=3'], 'config.optim.b3"; did you mean "b2"'),
    ([CONFIG, '--config.mesh.foo=3'], 'there are: layout, tensor'),
    ([CONFIG, '--config.seed.x=3'], '"config.seed" has no keys'),
    ([CONFIG, '--config.data.image_size=(64,30)', '--dry_run'], '64x30'),
    (['--config', 'configs/quickstrt.py'], 'no config at'),
    ([CONFIG, '--profile=1:2', '--dry_run'], 'no --profile'),
    ([CONFIG + ':steps=3', '--profile=2:9'], 'after the 3 steps'),
    ([CONFIG, '--config.eval.tile=4096'], 'smaller than eval.tile=4096'),
    ([CONFIG, '--workdir=/dev/null/x'], '/dev/null is a file'),
    ([CONFIG, '--config.batch_size=many'], 'batch_size'),
    ([CONFIG + ':stepz=3'], 'stepz=3'),
    ([CONFIG, '--workdri=x'], 'did you mean "workdir"'),
    ([CONFIG, 'words'], 'unexpected argument "words"'),
    ([CONFIG, '--profile=3'], 'FIRST:LAST'),
    ([CONFIG, '--profile=5:3'], 'FIRST:LAST'),
    ([CONFIG, '--config.mesh.layout=ddp', '--dry_run'], 'mesh layout "ddp"'),
    ([CONFIG, '--config.data.source=nowhere'], 'data "nowhere"'),
    ([CONFIG, '--config.ema=2.0', '--dry_run'], r'ema=2.0'),
  ],
)
def test_train_says_what_is_right(argv, words, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=words) as error:
    train_main.main(argv)
  assert '\n' not in str(error.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'words, workdir',
  [
    ('configs/quickstart.py', 'runs/quickstart'),
    ('a/b.py:stage=2,decay=0.8', 'runs/b-stage=2,decay=0.8'),
    ('a/b.py:data=x/y', 'runs/b-data=x_y'),
  ],
)
def test_each_argument_has_a_workdir_of_its_own(words, workdir):
  assert train_main.default_workdir(words) == workdir


def test_a_config_of_ones_own(tmp_path, monkeypatch, capsys):
  """Any file with get_config() will do, with overrides and arguments."""
  (tmp_path / 'mine.py').write_text(
    'import ml_collections\n'
    'def get_config(arg):\n'
    f'  config = ml_collections.ConfigDict({tiny.run()!r})\n'
    '  config.batch_size = int(arg)\n'
    '  return config\n'
  )
  monkeypatch.chdir(tmp_path)
  train_main.main(
    ['--config=mine.py:16', '--dry_run', '--config.losses.l2=0.5']
  )
  assert 'loss/l2' in capsys.readouterr().out


@pytest.fixture
def tokenizer_dir(tmp_path):
  export.save_tokenizer(*tiny.built(tiny.model()), tmp_path / 'tokenizer')
  return tmp_path / 'tokenizer'


@pytest.mark.parametrize('tile', ([], ['--tile=0'], ['--tile=8']))
def test_reconstruct_images(tile, tokenizer_dir, tmp_path, capsys):
  photos = tmp_path / 'photos'
  photos.mkdir()
  for i, (h, w) in enumerate(((30, 41), (16, 16), (64, 20))):
    Image.fromarray(tiny.images(1, h, w)[0]).save(photos / f'p{i}.png')
  out = tmp_path / 'out'
  reconstruct_images.main(
    [
      f'--tokenizer={tokenizer_dir}',
      f'--images={photos}',
      f'--out={out}',
      *tile,
    ]
  )
  assert {p.name for p in out.iterdir()} == {
    'comparison.png', 'p0.png', 'p1.png', 'p2.png'
  }  # fmt: skip
  side = {(): 16, ('--tile=0',): 4, ('--tile=8',): 8}[tuple(tile)]
  with Image.open(out / 'p0.png') as image:
    assert image.size == (41 // side * side, 30 // side * side)
  said = capsys.readouterr().out
  assert said.count(' dB ') == 3 and 'comparison.png' in said


def test_tiles_have_the_grid_that_statistics_are_of(tmp_path):
  """The decoder's own grid is 4x4, the statistics' 2x2: tiles of 8 px."""
  tokenizer = tiny.normalised('fsq-cosmos', 'position', grid=(2, 2))
  export.save_tokenizer(*tokenizer, tmp_path / 'tokenizer')
  Image.fromarray(tiny.images(1, 17, 25)[0]).save(tmp_path / 'p.png')
  flags = [f'--tokenizer={tmp_path}/tokenizer', f'--images={tmp_path}/p.png']
  reconstruct_images.main([*flags, f'--out={tmp_path}/out'])
  with Image.open(tmp_path / 'out' / 'p.png') as image:
    assert image.size == (24, 16)
  with pytest.raises(UserError, match='4x4 tokens, .* are of 2x2'):
    reconstruct_images.main([*flags, f'--out={tmp_path}/x', '--tile=16'])


@pytest.mark.parametrize(
  'change, words',
  [
    ({'tokenizer': None}, 'flag --tokenizer is missing'),
    ({'tokenizer': 'nowhere'}, 'no tokenizer at nowhere'),
    ({'images': 'nowhere'}, 'data "nowhere"'),
    ({'tile': '7'}, '--tile=7 must be 0 or a multiple'),
    ({'tile': '-4'}, '--tile=-4 must be'),
    ({'tile': 'big'}, 'tile'),
    ({'out': None}, 'flag --out is missing'),
  ],
)
def test_reconstruct_images_says_what_is_right(
  change, words, tokenizer_dir, tmp_path
):
  photo = tmp_path / 'p.png'
  Image.fromarray(tiny.images(1)[0]).save(photo)
  flags = {
    'tokenizer': tokenizer_dir, 'images': photo, 'out': tmp_path / 'out'
  } | change  # fmt: skip
  argv = [f'--{k}={v}' for k, v in flags.items() if v is not None]
  with pytest.raises(UserError, match=words):
    reconstruct_images.main(argv)
  assert not (tmp_path / 'out').exists()


def test_originals_are_never_overwritten(tokenizer_dir, tmp_path):
  photos = tmp_path / 'photos'
  (photos / 'deep').mkdir(parents=True)
  for name in ('a.png', 'deep/a.png'):
    Image.fromarray(tiny.images(1)[0]).save(photos / name)
  before = (photos / 'a.png').read_bytes()
  flags = [f'--tokenizer={tokenizer_dir}']
  for argv, words in (
    ([f'--images={photos}', f'--out={tmp_path}/out'], 'would both be'),
    ([f'--images={photos}/a.png', f'--out={photos}'], 'would overwrite'),
  ):
    with pytest.raises(UserError, match=words):
      reconstruct_images.main(flags + argv)
  assert (photos / 'a.png').read_bytes() == before
  assert not (tmp_path / 'out').exists()


def test_a_broken_config_file_is_named(tmp_path, monkeypatch):
  (tmp_path / 'mine.py').write_text('def get_config(:\n')
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r'mine\.py:1: '):
    train_main.main(['--config=mine.py'])


def test_an_image_smaller_than_a_tile_is_named(tokenizer_dir, tmp_path):
  Image.fromarray(np.zeros((3, 9, 3), np.uint8)).save(tmp_path / 'p.png')
  with pytest.raises(UserError, match='3x9 is smaller than'):
    reconstruct_images.main(
      [f'--tokenizer={tokenizer_dir}', f'--images={tmp_path / "p.png"}',
       f'--out={tmp_path / "out"}']
    )  # fmt: skip


def test_run_turns_user_errors_into_exit_code_2(capsys, monkeypatch):
  def main(_):
    raise UserError('what was wrong; what would be right')

  with pytest.raises(SystemExit) as stop:
    cli.run(main)
  assert stop.value.code == 2
  assert capsys.readouterr().err.endswith(
    'error: what was wrong; what would be right\n'
  )
