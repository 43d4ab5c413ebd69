"""docs/from_pytorch.md names only what exists.

Its tables are read by the names of their columns: in "key here", "function
here", "command here" and "test here" every word in backticks is looked up in
the package.
"""

import ast
import contextlib
import dataclasses
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
from vqrae_jax.train import config as ranges
from vqrae_jax.train import config as terms

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / 'docs' / 'from_pytorch.md').read_text()

TERMS = {
  *losses.IMAGE_TERMS,
  *losses.FROZEN_TERMS,
  *losses.LATENT_TERMS,
  *terms.TERMS,
}
# Sections that are mappings in `RunSpec`, and what each may hold.
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


def tables(page=PAGE):
  """[(heads, [cells by head])] of every table on the page."""
  found, heads = [], None
  for line in page.splitlines():
    if not line.startswith('|'):
      heads = None
      continue
    cells = [c.strip() for c in line.strip().strip('|').split('|')]
    if heads is None:
      heads = cells
      found.append((heads, []))
    elif not set(line) <= set('|- '):
      assert len(cells) == len(heads), line
      found[-1][1].append(dict(zip(heads, cells, strict=True)))
  return found


def words(cell):
  return re.findall(r'`([^`]+)`', cell)


def column(name):
  """[(word in backticks, its row)] of every table with that column."""
  return [
    (word, row)
    for heads, rows in tables()
    if name in heads
    for row in rows
    for word in words(row[name])
  ]


def field_types(cls):
  return {f.name: f.type for f in dataclasses.fields(cls)}


def below(cls, path, dotted):
  """Walks `path` down the dataclass fields of `cls`."""
  options = cls if isinstance(cls, tuple) else (cls,)
  name, *rest = path
  having = [c for c in options if name in field_types(c)]
  assert having or name == 'name', f'no key {dotted}'
  if rest:
    hint = typing.get_type_hints(having[0])[name]
    kinds = (hint, *typing.get_args(hint))
    inner = [t for t in kinds if dataclasses.is_dataclass(t)]
    assert inner, f'{dotted}: {name} holds no keys'
    below(inner[0], rest, dotted)


def check_key(dotted):
  head, *rest = dotted.split('.')
  assert head in field_types(config_lib.RunSpec), f'no key {dotted}'
  if not rest:
    return
  if head == 'losses':
    assert rest[0] in TERMS, f'no loss {dotted}'
    if rest[1:]:
      kind = terms.TERMS.get(rest[0], terms.LossTerm)
      below(kind, rest[1:], dotted)
  elif head == 'model':
    assert rest[0] in MODEL, f'no key {dotted}'
    if rest[1:]:
      below(MODEL[rest[0]], rest[1:], dotted)
  else:
    below(config_lib.RunSpec, [head, *rest], dotted)


def check_function(name):
  owner, attribute = name.split('.')
  if owner == 'vqrae_jax':
    assert attribute in vqrae_jax.__all__, name
    assert callable(getattr(vqrae_jax, attribute))
  else:
    cls = CLASSES[owner]
    assert attribute in field_types(cls) or hasattr(cls, attribute), name


def check_command(line):
  if line.startswith('make '):
    target = line.split()[1]
    assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), re.M)
    return
  python, dash_m, module, *flags = line.split()
  assert (python, dash_m) == ('python', '-m')
  if module == 'vqrae_jax.train':
    module = f'{module}.__main__'
  shown = io.StringIO()
  with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
    importlib.import_module(module).main(['--help'])
  defined = re.findall(r'^  --(\w+)', shown.getvalue(), re.M)
  for flag in flags:
    name, _, value = flag.removeprefix('--').partition('=')
    assert flag.startswith('--')
    if name.startswith('config.'):
      check_key(name.removeprefix('config.'))
      continue
    assert name in defined, f'{module} has no flag {flag}'
    if name == 'config':
      path, _, arguments = value.partition(':')
      config = importlib.import_module(f'configs.{pathlib.Path(path).stem}')
      assert (ROOT / path).is_file()
      config_lib.read_config(config.get_config(arguments or None))


def check_test(name):
  path, _, function = name.partition('::')
  source = (ROOT / path).read_text()
  assert not function or re.search(rf'^def {function}\(', source, re.M), name


CHECKS = {
  'key here': check_key,
  'function here': check_function,
  'command here': check_command,
  'test here': check_test,
}
CASES = [(kind, word) for kind in CHECKS for word, _ in column(kind)]


@pytest.mark.parametrize('kind, word', CASES)
def test_it_exists(kind, word):
  CHECKS[kind](word)


@pytest.mark.parametrize(
  'kind, word',
  [
    ('key here', 'model.quantizer.num_embeddings'),
    ('key here', 'losses.lpips2'),
    ('key here', 'losses.lpips.adaptive'),
    ('key here', 'discriminator.strat'),
    ('key here', 'data.image_size.h'),
    ('key here', 'noise_tao'),
    ('function here', 'vqrae_jax.forward'),
    ('function here', 'Quantizer.get_codebook_entry'),
    ('command here', 'python -m vqrae_jax.train --resume=3'),
    ('command here', 'python -m vqrae_jax.train --config.nose=3'),
    ('test here', 'tests/quantizers/test_fsq.py::test_nothing'),
  ],
)
def test_what_does_not_exist_would_be_found(kind, word):
  with pytest.raises((AssertionError, OSError)):
    CHECKS[kind](word)


def test_the_page_is_read():
  """Enough of each kind, or the parser has lost a table."""
  for kind, least in zip(CHECKS, (30, 14, 6, 13), strict=True):
    assert len(column(kind)) >= least, kind
  assert len(tables()) == 6


def quantizer_defaults(field):
  """{default of `field` in each quantizer that has it}."""
  return {
    f.default
    for cls in QUANTIZERS.values()
    for f in dataclasses.fields(cls)
    if f.name == field
  }


def test_defaults_and_usual_ranges_are_the_packages():
  seen = set()
  for key, row in column('key here'):
    section, _, field = key.rpartition('.')
    number = re.match(r'[\d.e-]+', row.get('default', ''))
    if section == 'model.quantizer' and number:
      assert ast.literal_eval(number[0]) in quantizer_defaults(field), row
    if not row.get('usual'):
      continue
    low, high = map(float, row['usual'].split('…'))
    tables_of = [
      ranges.RANGES['losses'] if section == 'losses' else fields
      for name, fields in ranges.RANGES.items()
      if (name == 'losses') == (section == 'losses')
    ]
    match = [t for t in tables_of if t.get(field) == (low, high)]
    assert match, row
    seen.add((field, low, high))
  listed = {
    (field, *usual)
    for fields in ranges.RANGES.values()
    for field, usual in fields.items()
  }
  assert seen == listed


def test_files_it_names_exist():
  paths = re.findall(r'`((?:docs|tests|configs)/[\w/]*(?:\.\w+)?)', PAGE)
  assert paths
  for path in paths:
    assert (ROOT / path).exists(), path
