"""Command lines as a user types them: help, flags, the config, exit codes."""

import json
import pathlib
import shutil
import sys
from unittest import mock

import pytest
from absl import flags
from PIL import Image

from tests import runs, tiny
from vqrae_jax import cli, export, reconstruct_images
from vqrae_jax.errors import Stopped, UserError
from vqrae_jax.train import __main__ as train_main
from vqrae_jax.train import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = '--config=configs/quickstart.py'


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_help_has_an_example(name, monkeypatch, capsys):
  """By `vqrae NAME --help`, which finds each command."""
  monkeypatch.setattr(sys, 'argv', ['vqrae', name, '--help'])
  with pytest.raises(SystemExit) as stop:
    cli.vqrae()
  assert stop.value.code == 0
  out = capsys.readouterr().out
  assert f'example:\n  python -m vqrae_jax.{name} --' in out


def test_vqrae_lists_the_commands(monkeypatch, capsys):
  """All that have a main: files at the top of the package, and
  packages."""
  files = (ROOT / 'vqrae_jax').glob('*.py')
  names = {f.stem for f in files if 'def main(' in f.read_text()}
  names |= {'train', 'train.export', 'evaluate', 'export'}
  assert names == {*cli.COMMANDS}
  monkeypatch.setattr(sys, 'argv', ['vqrae', '--help'])
  cli.vqrae()
  listed = capsys.readouterr().out
  assert all(f'  {name} ' in listed for name in names)
  monkeypatch.setattr(sys, 'argv', ['vqrae', 'trian'])
  with pytest.raises(SystemExit, match='2'):
    cli.vqrae()
  assert '"train"' in capsys.readouterr().err


@pytest.mark.parametrize(
  'error, code, line',
  [
    (UserError('what was\nwrong'), 2, 'error: what was wrong\n'),
    (FileNotFoundError(2, 'No such file', 'a/b'), 2, 'error: a/b: No such fi'),
    (OSError(28, 'No space left on device'), 1, 'error: No space left'),
    (ImportError('Please install gcsfs'), 2, 'error: Please install gcsfs\n'),
    (Stopped('by SIGTERM'), 143, 'stopped: by SIGTERM\n'),
  ],
)
def test_exit_codes(error, code, line, capsys):
  with pytest.raises(SystemExit) as stop:
    cli.run(mock.Mock(side_effect=error))
  assert stop.value.code == code
  assert capsys.readouterr().err.startswith(line)
  broken = ImportError('no such name', name='numpy')
  for other in (ZeroDivisionError(), ConnectionError(), broken):
    with pytest.raises(type(other)):  # with a traceback
      cli.run(mock.Mock(side_effect=other))


def test_the_installed_configs_are_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r'--config\.data\.source'):
    train_main.main(['--config=configs/simvq_siglip_l.py'])


@pytest.mark.parametrize(
  'argv, words',
  [
    (['--config'], '--config'),
    (['--config=configs/quickstrt.py'], '"configs/quickstart.py"'),
    ([CONFIG, '--config.batch_sise=3'], '"batch_size"'),
    ([CONFIG, '--config.optim.b3=3'], 'config.optim.b3"; .*"b2"'),
    ([CONFIG, '--config.mesh.foo=3'], 'layout, tensor'),
    ([CONFIG, '--config.seed.x=3'], 'config.seed'),
    ([CONFIG, '--config.batch_size=many'], 'config.batch_size=many'),
    ([CONFIG, '--config.optim=3'], 'config.optim=3'),
    ([CONFIG, '--config.data.source'], 'config.data.source'),
    ([CONFIG, '--config.data.include=3'], 'data.include'),
    ([CONFIG, '--config.data.image_size=(64,30)', '--dry_run'], '64x30'),
    ([CONFIG + ':stepz=3'], 'stepz=3'),
    ([CONFIG + ':steps=3', '--profile=2:9'], '--profile=2:9'),
    ([CONFIG, '--profile=1:2', '--dry_run'], '--profile'),
    ([CONFIG, '--profile=3'], '--profile=3'),
    ([CONFIG, '--profile=5:3'], '--profile=5:3'),
    ([CONFIG, '--dry_run=maybe'], 'dry_run=maybe'),
    ([CONFIG, '--workdri=x'], '"workdir"'),
    ([CONFIG, '--workdir='], '--workdir'),
    ([CONFIG, 'words'], '"words"'),
    (['--config=configs/simvq_siglip_l.py:stage=2'], '--config.init_from'),
  ],
)
def test_train_names_what_is_wrong(argv, words, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=words) as error:
    train_main.main(argv)
  assert '\n' not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_a_host_that_finds_no_others_is_told_the_flags():
  """On one machine `jax.distributed` has nobody to ask."""
  values = flags.FlagValues()
  cli.define_hosts(values)
  values(['', '--num_processes=2'])
  error = ValueError('coordinator_address should be defined.')
  with (
    mock.patch('jax.distributed.initialize', side_effect=error) as initialize,
    pytest.raises(UserError, match='--coordinator_address, --process_id'),
  ):
    cli.join_hosts(values)
  initialize.assert_called_once_with(num_processes=2)


@pytest.mark.parametrize(
  'source, workdir',
  [
    ('configs/quickstart.py', 'runs/quickstart'),
    ('a/b.py:stage=2,decay=0.8', 'runs/b-stage=2,decay=0.8'),
    ('a/b.py:data=x/y', 'runs/b-data=x_y'),
  ],
)
def test_each_argument_has_a_workdir_of_its_own(source, workdir):
  assert train_main.default_workdir(source) == workdir


def test_a_config_of_ones_own(tmp_path, monkeypatch, capsys):
  """Any file with get_config() will do, with overrides, arguments, flags in a
  file; a dry run says that it passed, and writes nothing."""
  config = f'{tiny.run()!r} | dict(batch_size=int(arg))'
  (tmp_path / 'mine.py').write_text(f'def get_config(arg): return {config}\n')
  (tmp_path / 'flags').write_text('--config=mine.py:16\n--dry_run\n')
  monkeypatch.chdir(tmp_path)
  train_main.main(['--flagfile=flags', '--config.losses.l2=0.5'])
  out = capsys.readouterr().out
  assert 'loss/l2' in out and 'passed' in out
  assert {p.name for p in tmp_path.iterdir()} == {'mine.py', 'flags'}


OWN = """import importlib
from configs import common

def get_config(arguments=None):
  late = importlib.import_module('configs.mine_too')
  recipe = importlib.import_module('configs.vq_dinov2_b_decxl')
  config = recipe.get_config()
  seed = common.base().seed + late.SEED
  config.update(seed=seed, duration=arguments)
  return config
"""


@pytest.mark.parametrize('folder', ['x', 'x/configs'])
def test_configs_of_a_config(folder, tmp_path, monkeypatch):
  """The recipes, whatever lies beside it, then its own folder's files; what
  Python finds is left as it was, also by a file that raises. It looks in that
  folder last from then on."""
  home, elsewhere = tmp_path / folder, tmp_path / 'elsewhere'
  home.mkdir(parents=True)
  elsewhere.mkdir()
  monkeypatch.chdir(elsewhere)
  (home / 'mine.py').write_text(OWN)
  (home / 'mine_too.py').write_text('SEED = 3\n')
  (home / 'common.py').write_text('raise ValueError')
  (home / 'wrong.py').write_text('from configs import mine_too, nowhere')
  monkeypatch.setattr(sys, 'path', [*sys.path])
  there = {k: v for k, v in sys.modules.items() if 'configs' in k}
  config = cli.load_config(f'{home}/mine.py:3 epochs')
  assert (config.seed, config.duration) == (3, '3 epochs')
  assert config.model.decoder.name == 'XL'
  with pytest.raises(UserError, match=r'wrong\.py:1: ImportError: .*nowhere'):
    cli.load_config(f'{home}/wrong.py')
  now = {k: v for k, v in sys.modules.items() if 'configs' in k}
  assert (sys.path[-1], now) == (str(home), there)


def test_overrides_reach_the_config():
  with mock.patch('vqrae_jax.train.loop.dry_run', return_value={}) as dry_run:
    train_main.main(
      ['--config.log.every=7', '--config', 'configs/quickstart.py:steps=60',
       '--config.data.include', "('a*', 'b')", '--noconfig.data.flip',
       '--config.data.image_size=(64, 32)', '--config.init.encoder=x',
       '--config.optim.clip=None', '--config.teacher=None',
       '--config.data.examples=5e9', '--config.networks.remat=None',
       '--config.eval.tile=32', '--dry_run']
    )  # fmt: skip
  (config,) = dry_run.call_args.args
  assert (config.log.every, config.duration) == (7, '60 steps')
  assert config.data.include == ('a*', 'b') and not config.data.flip
  assert config.data.image_size == (64, 32) and config.init.encoder == 'x'
  # Also after it was written to config.json, where a tuple is a list.
  for had in (config, json.loads(json.dumps(config_lib.recorded(config)))):
    run = config_lib.read_config(had)
    assert run.data.sizes == ((64, 32),)
    assert run.optim.clip is None and run.teacher is None
    assert run.data.examples == 5e9 and run.networks.remat is None
    assert run.eval.tile == 32


@pytest.fixture(scope='module')
def reconstruct(tmp_path_factory):
  """(images, out, *flags) -> None, by a tokenizer of tiles of 16 px."""
  folder = tmp_path_factory.mktemp('run') / 'tokenizer'
  export.save_tokenizer(*tiny.built(tiny.model()), folder)

  def run(images, out, *flags, tokenizer=folder):
    argv = [f'--tokenizer={tokenizer}', f'--images={images}', f'--out={out}']
    reconstruct_images.main([*argv, *flags])

  return run


@pytest.mark.parametrize(
  'tile, size', ((16, (16, 16)), (0, (28, 20)), (8, (24, 16)))
)
def test_reconstruct_images(tile, size, reconstruct, tmp_path, capsys):
  photos, out = runs.images(tmp_path / 'photos', 20, 30), tmp_path / 'out'
  names = {p.name for p in photos.iterdir()} | {'comparison.png'}
  Image.new('RGB', (40, 3)).save(photos / 'flat.png')  # below a patch
  reconstruct(photos, out, *([f'--tile={tile}'] if tile < 16 else []))
  assert {p.name for p in out.iterdir()} == names
  with Image.open(out / 'image0.png') as image:
    assert image.size == size
  printed = capsys.readouterr().out
  assert printed.count(' dB ') == 4 and 'comparison.png' in printed
  assert 'flat  skipped: 3x40 pixels' in printed and '(1 skipped)' in printed


def test_tiles_have_the_grid_that_statistics_are_of(reconstruct, tmp_path):
  """The decoder's own grid is 4x4, the statistics' 2x3: tiles of 8x12 px."""
  here, path = (
    tmp_path / 'tokenizer',
    runs.images(tmp_path / 'photos', 20, 30) / 'image0.png',
  )
  tokenizer = tiny.normalised('fsq-cosmos', 'position', grid=(2, 3))
  export.save_tokenizer(*tokenizer, here)
  reconstruct(path, tmp_path / 'out', tokenizer=here)
  with Image.open(tmp_path / 'out' / 'image0.png') as image:
    assert image.size == (24, 16)
  with pytest.raises(UserError, match='4x4'):
    reconstruct(path, tmp_path / 'x', '--tile=16', tokenizer=here)


def test_originals_are_never_overwritten(reconstruct, tmp_path):
  photos = runs.images(tmp_path / 'photos', 20, 30)
  (photos / 'deep').mkdir()
  shutil.copy(photos / 'image0.png', photos / 'deep')
  before = (photos / 'image0.png').read_bytes()
  for images, out in (
    (photos, tmp_path / 'out'),
    (photos / 'image0.png', photos),
  ):
    with pytest.raises(UserError, match='image0.png'):
      reconstruct(images, out)
  assert (photos / 'image0.png').read_bytes() == before
  assert not (tmp_path / 'out').exists()
