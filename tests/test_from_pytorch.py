"""docs/from_pytorch.md names only what exists.

The columns "key here", "function here" and "command here" of its tables: every
name in backticks is looked up in the package.
"""

import ast
import dataclasses
import functools
import pathlib
import re

import pytest

import vqrae_jax
from tests.contract import today
from vqrae_jax import types
from vqrae_jax.models.tokenizer import Tokenizer
from vqrae_jax.quantizers import QUANTIZERS, Quantizer
from vqrae_jax.train import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / 'docs' / 'from_pytorch.md').read_text()

CLASSES = {
  c.__name__: c
  for c in (types.QuantizerOutput, types.TokenizerOutput, Quantizer, Tokenizer)
}
flags = functools.cache(today.command_flags)


def rows():
  """[{head: cell}] of all tables on the page."""
  found, heads = [], None
  for line in PAGE.splitlines():
    cells = [c.strip() for c in line.strip().strip('|').split('|')]
    if not line.startswith('|'):
      heads = None
    elif heads is None:
      heads = cells
    elif not set(line) <= set('|- '):
      found.append(dict(zip(heads, cells, strict=True)))
  return found


def column(head):
  """[(name in backticks, its row)] of every table with that column."""
  return [
    (name, row)
    for row in rows()
    for name in re.findall(r'`([^`]+)`', row.get(head, ''))
  ]


@functools.cache
def keys():
  """All keys of a config and their sections; a quantizer's of any."""
  found = {'model.encoder.name', 'model.decoder.name', 'model.dtype'}
  for key in today.config_keys():
    key = re.sub(r'^model\.quantizer\.\w+', 'model.quantizer', key)
    losses = today.CHOICES['loss'] if '*' in key else ['']
    found |= {key.replace('*', name) for name in losses}
  parts = (key.split('.') for key in found)
  return {'.'.join(p[:n]) for p in parts for n in range(1, len(p) + 1)}


def check_key(dotted):
  assert dotted in keys()


def check_function(name):
  owner, attribute = name.split('.')
  if owner == 'vqrae_jax':
    assert callable(getattr(vqrae_jax, attribute, None)), name
  else:
    fields = {f.name for f in dataclasses.fields(CLASSES[owner])}
    assert attribute in fields or hasattr(CLASSES[owner], attribute), name


def check_command(line):
  if line.startswith('make '):
    target = line.split()[1]
    assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), re.M)
    return
  python, dash_m, module, *words = line.split()
  assert (python, dash_m) == ('python', '-m')
  for word in words:
    name, _, value = word.removeprefix('--').partition('=')
    if name.startswith('config.'):
      check_key(name.removeprefix('config.'))
      continue
    assert name in flags()[module.removeprefix('vqrae_jax.')], word
    if name == 'config':
      path, _, arguments = value.partition(':')
      recipe = today.recipe(pathlib.Path(path).stem, arguments or None)
      config_lib.read_config(recipe)


CHECKS = {
  'key here': check_key,
  'function here': check_function,
  'command here': check_command,
}


@pytest.mark.parametrize('head, least', zip(CHECKS, (30, 14, 6), strict=True))
def test_every_name_exists(head, least):
  names = column(head)
  assert len(names) >= least, 'the parser lost a table'
  for name, _ in names:
    CHECKS[head](name)


def test_defaults_and_usual_ranges_are_the_packages():
  seen = set()
  for key, row in column('key here'):
    section, _, field = key.rpartition('.')
    number = re.match(r'[\d.e-]+', row.get('default', ''))
    if section == 'model.quantizer' and number:
      defaults = {
        f.default
        for cls in QUANTIZERS.values()
        for f in dataclasses.fields(cls)
        if f.name == field
      }
      assert ast.literal_eval(number[0]) in defaults, row
    if row.get('usual'):
      seen.add(
        (section == 'losses', field, *map(float, row['usual'].split('…')))
      )
  assert seen == {
    (section == 'losses', field, *usual)
    for section, fields in config_lib.RANGES.items()
    for field, usual in fields.items()
  }


def test_files_it_names_exist():
  paths = re.findall(r'`((?:docs|tests|configs)/[\w/]*(?:\.\w+)?)', PAGE)
  assert paths
  for path in paths:
    assert (ROOT / path).exists(), path
