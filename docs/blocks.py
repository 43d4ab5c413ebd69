"""Runs the code blocks of README.md and the site: `make docs`.

    python -m pytest -p docs.blocks README.md docs

Each ```bash block is run by `bash -e` and each ```python block executed, with
one namespace a page, in order, in a folder of the page's own that holds
`runs/quickstart` (60 steps of it), `images/train`, `images/val` and a link to
`benchmarks`. A comment on the line before a block changes this:

    <!-- file: NAME -->            it is also written to NAME
    <!-- parsed only: WHY -->      nothing runs; `read_only` reads every line

Blocks of the pages that `generate.py` makes are parsed only; it reads their
configs itself. `<!--- invisible-code-block: python … -->` runs what a page does
not show.
"""

import argparse
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from unittest import mock

import pytest
import sybil.integration.pytest
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

from docs import generate

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 60
EXTRAS = re.compile(r'(?:\.|vqrae_jax)\[([\w,]+)\]')
run_python = PythonEvaluator()
BIN = pathlib.Path(sys.executable).parent
SHELL = {
  **os.environ,
  'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}',
  'PYTHONPATH': '',  # the package is installed
}


def comment(example, name: str) -> str | None:
  """What a comment of that name on the line before the block says."""
  before = example.document.text[: example.region.start]
  found = re.search(rf'<!-- {name}: ([^<>]+) -->\n$', before)
  return found and ' '.join(found[1].split())


class Parsed(Exception):
  """The flags of a command are read, and it need not go on."""


def parse_only(module: str, argv: list[str], config: bool) -> None:
  """Reads a command's flags, and with `config` the config if it has one."""
  from ml_collections import ConfigDict

  from vqrae_jax import cli
  from vqrae_jax.train.config import read_config

  parse, parse_args = cli.parse, argparse.ArgumentParser.parse_args

  def then_stop(values, *args):
    parse(values, *args)
    if config and isinstance(
      values.flag_values_dict().get('config'), ConfigDict
    ):
      read_config(values.config)
    raise Parsed

  def args_then_stop(*args, **kwargs):
    parse_args(*args, **kwargs)
    raise Parsed

  with (
    warnings.catch_warnings(action='ignore'),  # runpy's, of a module twice
    mock.patch.object(cli, 'parse', then_stop),
    mock.patch.object(cli, 'run', lambda main: main(sys.argv[1:])),
    mock.patch.object(argparse.ArgumentParser, 'parse_args', args_then_stop),
    mock.patch.object(sys, 'argv', [module, *argv]),
    pytest.raises(Parsed),
  ):
    runpy.run_module(module, run_name='__main__', alter_sys=False)


def read_only(text: str, config: bool) -> None:
  """Reads a shell's lines and runs none: flags and configs of our modules, the
  extras that pip installs, the repository's address, make's targets."""
  about = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  for line in re.split(r'\n|&&', text.replace('\\\n', ' ')):
    match shlex.split(line, comments=True):
      case ['python', '-m', module, *argv]:
        parse_only(module, argv, config)
      case ['vqrae', *argv]:
        parse_only('vqrae_jax', argv, config)
      case ['pip', 'install', *_]:
        extras = {e for found in EXTRAS.findall(line) for e in found.split(',')}
        assert extras <= about['optional-dependencies'].keys(), line
      case ['git', 'clone', address]:
        assert address == about['urls']['Repository']
      case ['make', target]:
        subprocess.run(['make', '-n', target], check=True, cwd=ROOT)
      case [] | ['cd' | 'export', _]:
        pass
      case _:
        pytest.fail(f'no reader of this line: {line}')


def evaluate(example) -> None:
  """Runs a block as its comment says."""
  text, folder = example.parsed, example.namespace['folder']
  if name := comment(example, 'file'):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
  if example.region.lexemes['arguments'] == 'python':
    return run_python(example)
  made = pathlib.Path(example.path).name in generate.PAGES
  if made or comment(example, 'parsed only'):
    return read_only(text, config=not made)
  done = subprocess.run(
    ['bash', '-euo', 'pipefail', '-c', text],
    cwd=folder, env=SHELL, text=True, timeout=600,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip
  assert done.returncode == 0, f'{text}\n{done.stdout[-4000:]}'


@pytest.fixture(scope='session')
def quickstart(tmp_path_factory) -> pathlib.Path:
  """A folder with a short run of the quick-start, and images."""
  from PIL import Image

  from vqrae_jax.data.pipeline import each_image
  from vqrae_jax.data.sources import open_source

  folder = tmp_path_factory.mktemp('quickstart')
  photos = open_source('bundled:photos')
  for i, image in each_image(photos):
    part = folder / 'images' / ('val' if i % 4 == 0 else 'train')
    part.mkdir(parents=True, exist_ok=True)
    for k in range(4):  # quarters
      y, x = (k // 2 * image.shape[0] // 2, k % 2 * image.shape[1] // 2)
      crop = image[y : y + 200, x : x + 240]
      Image.fromarray(crop).save(part / f'{photos.names[i]}{k}.png')
  subprocess.run(
    [sys.executable, '-m', 'vqrae_jax.train', '--workdir=runs/quickstart',
     f'--config=configs/quickstart.py:steps={STEPS}'],
    check=True, cwd=folder, env=SHELL,
  )  # fmt: skip
  return folder


@pytest.fixture(scope='module')
def folder(quickstart, tmp_path_factory):
  """A page's own copy of it, where its blocks run and Python looks first."""
  page = tmp_path_factory.mktemp('page') / 'work'
  shutil.copytree(quickstart, page)
  (page / 'benchmarks').symlink_to(ROOT / 'benchmarks')
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(page)
    patch.chdir(page)
    yield page


pytest_collect_file = sybil.integration.pytest.pytest_integration(
  Sybil(
    parsers=[CodeBlockParser(name, evaluate) for name in ('bash', 'python')],
    path=str(ROOT),
    patterns=['README.md', 'docs/*.md'],
    fixtures=['folder'],
  )
)
