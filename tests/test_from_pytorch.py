"""docs/from_pytorch.md names only what exists.

The columns "key here", "function here" and "command here" of its tables: every
name in backticks is looked up in the package.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import pathlib
import re
import typing

import pytest

import vqrae_jax
from vqrae_jax import losses, specs, types
from vqrae_jax.models import tokenizer as tokenizer_lib
from vqrae_jax.quantizers import QUANTIZERS, Quantizer
from vqrae_jax.train import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / 'docs' / 'from_pytorch.md').read_text()

TERMS = {
  *losses.IMAGE_TERMS,
  *losses.FROZEN_TERMS,
  *losses.LATENT_TERMS,
  *config_lib.TERMS,
}
# Sections that are mappings in `RunConfig`, and what each may hold.
MODEL = {
  'encoder': specs.EncoderSpec,
  'decoder': specs.DecoderSpec,
  'latents': specs.LatentsSpec,
  'quantizer': tuple(QUANTIZERS.values()),
  'dtype': None,
  'scan': None,
  'remat': None,
}
CLASSES = {
  'QuantizerOutput': types.QuantizerOutput,
  'TokenizerOutput': types.TokenizerOutput,
  'Quantizer': Quantizer,
  'Tokenizer': tokenizer_lib.Tokenizer,
}


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


def fields_of(cls):
  return {f.name for f in dataclasses.fields(cls)}


def check_below(cls, path, dotted):
  """Walks `path` down the dataclass fields of `cls`, one or several."""
  options = cls if isinstance(cls, tuple) else (cls,)
  name, *rest = path
  having = [c for c in options if name in fields_of(c)]
  assert having or name == 'name', f'no key {dotted}'
  if rest:
    hint = typing.get_type_hints(having[0])[name]
    types = (hint, *typing.get_args(hint))
    inner = [t for t in types if dataclasses.is_dataclass(t)]
    assert inner, f'{dotted}: {name} holds no keys'
    check_below(inner[0], rest, dotted)


def check_key(dotted):
  head, *rest = dotted.split('.')
  if head == 'losses' and rest:
    assert rest[0] in TERMS, f'no loss {dotted}'
    if rest[1:]:
      term = config_lib.TERMS.get(rest[0], config_lib.LossTerm)
      check_below(term, rest[1:], dotted)
  elif head == 'model':
    assert rest[0] in MODEL, f'no key {dotted}'
    if rest[1:]:
      check_below(MODEL[rest[0]], rest[1:], dotted)
  else:
    check_below(config_lib.RunConfig, [head, *rest], dotted)


def check_function(name):
  owner, attribute = name.split('.')
  if owner == 'vqrae_jax':
    assert attribute in vqrae_jax.__all__, name
    assert callable(getattr(vqrae_jax, attribute))
  else:
    cls = CLASSES[owner]
    assert attribute in fields_of(cls) or hasattr(cls, attribute), name


@functools.cache
def flags_of(module):
  """The flags that `python -m module --help` lists."""
  found = importlib.util.find_spec(module)
  assert found, module
  package = found.submodule_search_locations
  command = importlib.import_module(module + '.__main__' * bool(package))
  text = io.StringIO()
  with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
    command.main(['--help'])
  return {*re.findall(r'^ *--(?:\[no\])?(\w+)', text.getvalue(), re.M)}


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
    assert name in flags_of(module), f'{module} has no flag {word}'
    if name == 'config':
      path, _, arguments = value.partition(':')
      config = importlib.import_module(f'configs.{pathlib.Path(path).stem}')
      config_lib.read_config(config.get_config(arguments or None))


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


@pytest.mark.parametrize(
  'head, name',
  [
    ('key here', 'model.quantizer.num_embeddings'),
    ('key here', 'losses.lpips.adaptive'),
    ('key here', 'data.image_size.h'),
    ('function here', 'Quantizer.get_codebook_entry'),
    ('command here', 'python -m vqrae_jax.train --resume=3'),
  ],
)
def test_a_name_that_does_not_exist_is_found(head, name):
  with pytest.raises(AssertionError):
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
