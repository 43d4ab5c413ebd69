"""docs/from_pytorch.md names only what exists.

The columns "key here", "function here" and "command here" of its tables: every
name in backticks is looked up in the package.
"""

import ast
import pathlib
import re

import pytest

import vqrae_jax
from tests.contract import today
from vqrae_jax import cli, types
from vqrae_jax.errors import UserError
from vqrae_jax.models.tokenizer import Tokenizer, build_tokenizer
from vqrae_jax.pretrained import vqrae_torch
from vqrae_jax.quantizers import QUANTIZERS, Quantizer
from vqrae_jax.train import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / 'docs' / 'from_pytorch.md').read_text()


def column(head):
  """[(name in backticks, {head: cell} of its row)] of all tables with it."""
  found = []
  for table in re.findall(r'(?:^\|.*\n)+', PAGE, re.M):
    heads, _, *rows = (
      [cell.strip() for cell in line.strip('|').split('|')]
      for line in table.splitlines()
    )
    for row in (dict(zip(heads, cells, strict=True)) for cells in rows):
      found += [(n, row) for n in re.findall(r'`([^`]+)`', row.get(head, ''))]
  return found


def keys():
  """All keys of a config and their sections; a quantizer's of any."""
  found = {'model.encoder.name', 'model.decoder.name', 'model.dtype'}
  for key in today.config_keys():
    key = re.sub(r'^model\.quantizer\.\w+', 'model.quantizer', key)
    losses = today.CHOICES['loss'] if '*' in key else ['']
    found |= {key.replace('*', name) for name in losses}
  parts = (key.split('.') for key in found)
  return {'.'.join(p[:n]) for p in parts for n in range(1, len(p) + 1)}


def functions():
  """The public functions, and the fields and methods of public classes."""
  classes = types.QuantizerOutput, types.TokenizerOutput, Quantizer, Tokenizer
  found = {f'vqrae_jax.{name}' for name in vqrae_jax.__all__}
  for owner in classes:
    names = {*dir(owner), *owner.__dataclass_fields__}
    found |= {f'{owner.__name__}.{name}' for name in names}
  return found


@pytest.mark.parametrize(
  'head, known, least', [('key', keys, 30), ('function', functions, 14)]
)
def test_every_name_exists(head, known, least):
  names = [name for name, _ in column(f'{head} here')]
  assert len(names) >= least, 'the parser lost a table'
  assert {*names} <= known()


def test_every_command_is_one():
  lines = [line for line, _ in column('command here')]
  assert len(lines) >= 6, 'the parser lost a table'
  flags, known = today.command_flags(), keys()
  for first, *words in map(str.split, lines):
    if first == 'make':
      assert f'\n{words[0]}:' in (ROOT / 'Makefile').read_text()
      continue
    for word in words[2:]:
      name, _, value = word.removeprefix('--').partition('=')
      if name.startswith('config.'):
        assert name.removeprefix('config.') in known
      else:
        assert name in flags[words[1].removeprefix('vqrae_jax.')], word
      if name == 'config':
        path, _, arguments = value.partition(':')
        recipe = today.recipe(pathlib.Path(path).stem, arguments or None)
        config_lib.read_config(recipe)


def test_defaults_and_usual_ranges_are_the_packages():
  seen = set()
  for key, row in column('key here'):
    section, _, field = key.rpartition('.')
    number = re.match(r'[\d.e-]+', row.get('default', ''))
    if section == 'model.quantizer' and number:
      defaults = [getattr(q, field, None) for q in QUANTIZERS.values()]
      assert ast.literal_eval(number[0]) in defaults, row
    if row.get('usual'):
      seen.add((field, *map(float, row['usual'].split('…'))))
  assert seen == {
    (field, *usual)
    for fields in config_lib.RANGES.values()
    for field, usual in fields.items()
  } | {('commit', *config_lib.COMMIT_LPIPS)}


def test_files_it_names_exist():
  paths = re.findall(r'`((?:docs|tests|configs)/[\w/]*(?:\.\w+)?)', PAGE)
  assert paths
  for path in paths:
    assert (ROOT / path).exists(), path


def refused(name):
  """Whether a recipe's tokenizer has no counterpart in the PyTorch project."""
  config = cli.load_config(f'configs/{name}.py')
  try:
    vqrae_torch.check_counterpart(build_tokenizer(config.model))
  except UserError:
    return True
  return False


def test_recipes_that_do_not_go_back():
  names = {p.stem for p in (ROOT / 'configs').glob('[!_]*.py')} - {'common'}
  listed = {name for name, _ in column('recipe')}
  assert {name for name in names if refused(name)} == listed
