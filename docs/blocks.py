"""Runs the code blocks of README.md and the site: `make docs`.

    python -m pytest -p docs.blocks README.md docs

Each ```bash block is run by `bash -e` and each ```python block executed, with
one namespace a page, in order, in a folder of the page's own that holds
`runs/quickstart` (60 steps of it), `images/train` and `images/val`. A comment
on the line before a block changes this:

    <!-- file: NAME -->            it is also written to NAME
    <!-- parsed only: WHY -->      of each command of ours, flags and the config
                                   are read, and nothing runs
    <!-- not run: WHY -->          skipped, by that name

Blocks of the pages that `generate.py` makes are parsed only; it reads their
configs itself. `<!--- invisible-code-block: python … -->` runs what a page does
not show.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import sybil.integration.pytest
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

from docs import generate

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 60
run_python = PythonEvaluator()
BIN = pathlib.Path(sys.executable).parent
SHELL = {
  **os.environ,
  'JAX_PLATFORMS': 'cpu',
  'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}',
  'PYTHONPATH': '',  # as installed
}


def comment(example, name: str) -> str | None:
  """What a comment of that name on the line before the block says."""
  before = example.document.text[: example.region.start]
  found = re.search(rf'<!-- {name}: ([^<>]+) -->\n$', before)
  return found and ' '.join(found[1].split())


def commands(text: str):
  """(name, argv) of each command of this package in a shell's lines."""
  for line in text.replace('\\\n', ' ').splitlines():
    words = shlex.split(line, comments=True)
    if words[:2] == ['python', '-m'] and words[2].startswith('vqrae_jax.'):
      yield words[2].removeprefix('vqrae_jax.'), words[3:]
    elif words[:1] == ['vqrae']:
      yield words[1], words[2:]


class Parsed(Exception):
  """The flags of a command are read, and it need not go on."""


def parse_only(name: str, argv: list[str], config: bool) -> None:
  """Reads a command's flags, and with `config` the config if it has one."""
  from ml_collections import ConfigDict

  from vqrae_jax import cli
  from vqrae_jax.train.config import read_config

  parse = cli.parse

  def then_stop(values, *args):
    parse(values, *args)
    if config and isinstance(
      values.flag_values_dict().get('config'), ConfigDict
    ):
      read_config(values.config)
    raise Parsed

  with (
    mock.patch.object(cli, 'parse', then_stop),
    mock.patch.object(cli, 'run', lambda main: main(sys.argv[1:])),
    mock.patch.object(sys, 'argv', [sys.executable, name, *argv]),
    pytest.raises(Parsed),
  ):
    cli.vqrae()


def evaluate(example) -> None:
  """Runs a block as its comment says."""
  text, folder = example.parsed, example.namespace['folder']
  if why := comment(example, 'not run'):
    pytest.skip(why)
  if name := comment(example, 'file'):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
  if example.region.lexemes['arguments'] == 'python':
    return run_python(example)
  made = pathlib.Path(example.path).name in generate.PAGES
  if made or comment(example, 'parsed only'):
    found = [*commands(text)]
    assert found, 'no command of ours to read'
    for name, argv in found:
      parse_only(name, argv, config=not made)
    return
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
