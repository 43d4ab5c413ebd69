"""What is published: an sdist, a wheel of it, and that wheel where no checkout
is, on each Python there is here."""

import contextlib
import email
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml

import vqrae_jax
from tests.runs import ROOT

slow = pytest.mark.slow
# The first with the versions of constraints.txt, the others with the newest.
PYTHONS = '3.11', '3.12', '3.13'
OWN = """from configs import common, quickstart

def get_config(arguments=None):
  config = quickstart.get_config('steps=40')
  config.seed = common.arguments(arguments, seed=1).seed
  return config
"""
# A user's: no place of the checkout, all the CPU's threads, one device.
OURS = 'PYTHON', 'XLA_', 'JAX_', 'NPROC', 'VIRTUAL_ENV', 'MAKE'
USER = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}


def text(name):
  """Of a file of the checkout."""
  return (ROOT / name).read_text()


def run(*command, cwd, ok=True):
  """Its output."""
  done = subprocess.run(
    [*map(str, command)], cwd=cwd, env=USER, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip
  assert (done.returncode == 0) == ok, done.stdout
  return done.stdout


def interpreter(version):
  """A Python of that version that starts, or None."""
  others = pathlib.Path('~/.pyenv/versions').expanduser()
  installed = others.glob(f'{version}.*/bin/python')
  for python in (f'python{version}', *map(str, installed)):
    with contextlib.suppress(OSError):
      if not subprocess.run([python, '-c', ''], capture_output=True).returncode:
        return python
  return None


def files(*folders):
  """Of the checkout, {path from its top}."""
  return {
    str(path.relative_to(ROOT))
    for folder in folders
    for path in (ROOT / folder).rglob('*')
    if path.is_file() and '__pycache__' not in path.parts
  }


def test_the_release_is_one():
  """The changelog's newest, and the one to cite, is the package's."""
  (cited,) = re.findall(r'^version: (.+)$', text('CITATION.cff'), re.M)
  newest = re.findall(r'^## \[(\d.+)\] - (.+)$', text('CHANGELOG.md'), re.M)[0]
  (date,) = re.findall(r'^date-released: (.+)$', text('CITATION.cff'), re.M)
  assert (cited, date) == newest
  assert cited == vqrae_jax.__version__


def test_the_workflows_have_their_targets():
  """Each `make X` of theirs and of .ci/run is in the Makefile."""
  lines = [text('.ci/run')]
  for path in (ROOT / '.github' / 'workflows').glob('*.yml'):
    for job in yaml.safe_load(path.read_text())['jobs'].values():
      lines += [step.get('run', '') for step in job['steps']]
      matrix = job.get('strategy', {}).get('matrix', {})
      lines += [f'make {target}' for target in matrix.get('target', ())]
  asked = re.findall(r'^ *make ([a-z-]+)', '\n'.join(lines), re.M)
  there = re.findall(r'^([a-z-]+):', text('Makefile'), re.M)
  assert {'test', 'wheel'} <= {*asked} <= {*there}


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
  """The folder that `make wheel` fills, in a copy of the project."""
  copy = tmp_path_factory.mktemp('built') / 'copy'
  ignored = '.*', 'runs', 'build', 'dist', '__pycache__', '*.egg-info'
  shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*ignored))
  run('make', 'wheel', f'PYTHON={sys.executable}', cwd=copy)
  return copy / 'dist'


@slow
def test_what_is_in_them(dist):
  (sdist,), (wheel,) = dist.glob('*.tar.gz'), dist.glob('*.whl')
  name = f'vqrae_jax-{vqrae_jax.__version__}'
  assert sdist.name == f'{name}.tar.gz'
  assert wheel.name == f'{name}-py3-none-any.whl'
  with tarfile.open(sdist) as file:
    names = {m.name.removeprefix(f'{name}/') for m in file if m.isfile()}
  assert {n for n in names if n.startswith(('vqrae_jax/', 'configs/'))} == (
    files('vqrae_jax', 'configs')
  )
  assert not any(n.startswith('tests') for n in names)
  beside = {'pyproject.toml', 'setup.py', 'README.md', 'LICENSE'}
  beside |= {'CHANGELOG.md', 'CITATION.cff', 'constraints.txt'}
  assert names >= beside
  with zipfile.ZipFile(wheel) as file:
    names = {*file.namelist()}
    metadata = email.message_from_bytes(file.read(f'{name}.dist-info/METADATA'))
  recipes = {f'vqrae_jax/{path}' for path in files('configs')}
  modules = {n for n in names if not n.startswith(f'{name}.dist-info/')}
  assert modules == files('vqrae_jax') | recipes
  assert f'{name}.dist-info/licenses/LICENSE' in names
  assert metadata['License-Expression'] == 'Apache-2.0'
  assert metadata['Requires-Python'] == f'>={PYTHONS[0]}'
  said = metadata.get_all('Classifier')
  assert all(f'Programming Language :: Python :: {p}' in said for p in PYTHONS)


@slow
@pytest.mark.parametrize('version', PYTHONS)
def test_the_wheel_alone(version, dist, tmp_path):
  """A short quick-start and a config of one's own, from another folder."""
  python = interpreter(version)
  if python is None:
    pytest.skip(f'no Python {version}')
  (wheel,) = dist.glob('*.whl')
  run(python, '-m', 'venv', 'env', cwd=tmp_path)
  bin = tmp_path / 'env' / 'bin'
  pins = ['-c', ROOT / 'constraints.txt'] if version == PYTHONS[0] else []
  install = 'pip', 'install', '-qq', '--no-compile', f'{wheel}[cpu,demo]'
  run(bin / 'python', '-m', *install, *pins, cwd=tmp_path)
  here = tmp_path / 'elsewhere'
  (here / 'configs').mkdir(parents=True)
  (here / 'configs' / 'mine.py').write_text(OWN)
  run(bin / 'vqrae', 'train', '--config=configs/quickstart.py:steps=40',
      '--workdir=run', cwd=here)  # fmt: skip
  found = json.loads((here / 'run' / 'summary.json').read_text())
  assert found['psnr'] > 15
  run(bin / 'vqrae', 'train', '--config=configs/mine.py:seed=2', cwd=here)
  saved = (here / 'runs' / 'mine-seed=2' / 'config.json').read_text()
  assert json.loads(saved)['seed'] == 2
  code = 'import sys, vqrae_jax; assert not {"jax", "flax"} & {*sys.modules}'
  run(bin / 'python', '-c', code, cwd=tmp_path)
  said = run(bin / 'python', '-c', 'import configs', cwd=tmp_path, ok=False)
  assert "No module named 'configs'" in said
