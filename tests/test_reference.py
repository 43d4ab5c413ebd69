"""The reference says what the code does: keys, values, flags, recipes."""

import ast
import copy
import dataclasses
import re
import typing

import pytest

from docs import generate
from tests import tiny
from vqrae_jax import cli, quantizers
from vqrae_jax.errors import UserError
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.nn import discriminators
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import setup

SECTIONS = [s for _, _, group in generate.GROUPS for s in group]
by_section = pytest.mark.parametrize(
  'section', SECTIONS, ids=[s.anchor for s in SECTIONS]
)
STEP = 1e-6  # beside a bound, of a float

# Sections in which a field may take any of its own values: no other field asks
# for a multiple of it, or for another choice.
VIT = tiny.VIT | dict(num_heads=1)
TABLE = dict(name='vq', num_codes=8, code_dim=4)
QUANTIZERS = {
  'fsq': dict(levels=(8, 5), convention='cosmos', preserve_symmetry=True),
  'residual': dict(quantizer=TABLE),
  'grouped': dict(quantizer=TABLE),
  'multiscale': dict(quantizer=TABLE, scales=(1, 2, 4), phis=1),
}
FIELDS = {'patch': dict(hidden=8, groups=1), 'dino': dict(taps=(2, 0))}
RATE = dict(lr=1e-3, end_lr=1e-4, layers=(0.5, 1.0))


def config_of(section):
  """A run that has the section, and the section in it, to be changed."""
  name = section.name if section.key == 'model.quantizer' else ''
  config = tiny.run()
  config['model'] = dict(
    encoder=dict(vit=dict(VIT), layers=(0,), pixel_norm={}),
    quantizer=dict(name=name or 'vq') | QUANTIZERS.get(name, {}),
    decoder=dict(vit=dict(VIT), pixel_norm={}),
    latents=dict(norm='position', grid=(4, 4)),
    feature_decoder={},
  )
  config['model']['quantizer']['post_quant'] = {}
  fields = section.name if section.key == 'discriminator.fields' else 'patch'
  config |= dict(
    losses=dict(
      TERM=dict(weight=1.0, fn='a.b:c'),
      distill=dict(weight=1.0, target='self'),
      gan=dict(weight=1.0),
      NAME=dict(weight=1.0, fn='a.b:c'),
    ),
    eval=dict(source='photos'),
    temperature={},
    discriminator=dict(name=fields, fields=copy.deepcopy(FIELDS[fields])),
    **{key: {} for key in ('optim', 'init', 'networks', 'mesh', 'log')},
    checkpoint={},
  )
  config = copy.deepcopy(config)
  if section.key == 'schedules':
    rate = dict(RATE)
    config['schedules'] = (('.*', rate),)
    return config, rate
  here = config
  for key in filter(None, section.key.split('.')):
    here = here[key]
  return config, here


def check(config):
  """All that a run refuses before it looks at data or devices."""
  spec = config_lib.read_config(config)
  build_tokenizer(spec.model)
  gan = spec.discriminator
  discriminators.build({'name': gan.name, **gan.fields})


def error_of(section, name, value):
  """What is said of a value of a field; None if it is accepted."""
  config, here = config_of(section)
  here[name] = value
  try:
    check(config)
  except UserError as e:
    return str(e)
  return None


def numbers_in(kind):
  """Those of int and float that an annotation has, in tuples too."""
  inner = typing.get_args(kind) or (kind,)
  found = {k for k in inner if k in (int, float)}
  return found.union(*(numbers_in(k) for k in inner if k is not kind))


def described(section):
  """(name, annotation, values) of each field."""
  hints, texts = typing.get_type_hints(section.cls), section.entries()
  for name in section.fields():
    yield name, hints[name], generate.split_values(texts[name])[1]


@by_section
def test_every_field_has_an_entry(section):
  texts = section.entries()
  for name in section.fields():
    assert generate.split_values(texts[name])[0].strip(), name
  assert {*texts} <= {f.name for f in dataclasses.fields(section.cls)}


def test_every_class_that_a_config_reaches_has_a_section():
  have = {section.cls for section in SECTIONS}
  assert {*quantizers.QUANTIZERS.values()} <= have
  assert {*discriminators.DISCRIMINATORS.values()} <= have
  assert {*config_lib.TERMS.values()} <= have
  for cls in have:
    for name, kind in typing.get_type_hints(cls).items():
      for inner in (kind, *typing.get_args(kind)):
        if dataclasses.is_dataclass(inner) and name != 'parent':
          assert inner in have, f'{cls.__name__}.{name}'


@by_section
def test_a_section_is_accepted_as_it_is(section):
  config, _ = config_of(section)
  check(config)


@by_section
def test_numbers_are_refused_outside_their_range(section):
  for name, kind, values in described(section):
    kinds = numbers_in(kind)
    if not kinds:
      continue
    assert values, f'{name} has no range'
    _, here = config_of(section)
    step = 1 if int in kinds else STEP
    bounds = (values.low, -step), (values.high, step)
    for (bound, outwards), closed in zip(bounds, values.closed, strict=True):
      if bound is None:
        continue
      bound = int(bound) if int in kinds else bound
      outside, inside = bound, bound - outwards
      if closed:
        outside, inside = bound + outwards, bound
      if values.each:
        default = section.fields()[name].default
        rest = tuple(here.get(name, default))[1:]
        outside, inside = (outside, *rest), (inside, *rest)
      error = error_of(section, name, outside)
      assert error and name in error, f'{name}={outside}: {error}'
      assert error_of(section, name, inside) is None, f'{name}={inside}'


@by_section
def test_choices_are_those_of_the_code(section):
  """As the error of another value lists them."""
  known = dict(getattr(section.cls, 'choices', ()))
  for name, _, values in described(section):
    if values is None or not values.choices:
      assert name not in known, f'{name} has choices'
      continue
    error = error_of(section, name, ('~',) if values.each else '~')
    assert error and name in error, name
    listed = error.partition('; there are: ')[2].split(', ')
    assert {*listed} == {*map(str, values.choices)}, name


@by_section
def test_none_is_taken_where_the_page_says_so(section):
  for name, kind, values in described(section):
    if values is None:
      continue
    none = values.none or None in values.choices
    assert none == (type(None) in typing.get_args(kind)), name


def test_defaults_of_the_page_are_those_of_the_classes():
  page, found = generate.config_page(), 0
  for section in SECTIONS:
    for name, field in section.fields().items():
      anchor = f'{{#key-{section.anchor}-{name}}}'
      assert page.count(anchor) == 1
      row = page.partition(anchor)[2].splitlines()[1]
      shown = re.search(r'default `(.*?)`', row)
      if field.default is dataclasses.MISSING:
        assert not shown
      elif shown and 'a section' not in row:
        assert ast.literal_eval(shown[1]) == field.default
        found += 1
  assert found > 100


def test_marks():
  marks = generate.marks_of_keys()
  assert {'duration', 'ema', 'optim.eps', 'losses.TERM.start'} < marks['traced']
  assert not {'batch_size', 'optim.b1', 'log.every'} & marks['traced']
  kept = {'seed', 'batch_size', 'data.decoder', 'model.latents'}
  assert kept < marks['kept']
  assert not {'optim.b1', 'model.dtype', 'log.every'} & marks['kept']
  assert 'data.flip' in marks['flag'] and 'losses.l2' not in marks['flag']


def planned(config):
  spec = config_lib.read_config(config)
  step, numbers, *_ = setup.plan_step(spec, build_tokenizer(spec.model), 10)
  return step, numbers


def test_a_traced_number_leaves_the_compiled_step():
  step, numbers = planned(generate.numbered_config()[0])
  for key in generate.marks_of_keys()['traced'] - {'schedules.layers'}:
    config, _ = generate.numbered_config()
    path, _, name = key.rpartition('.')
    here = {
      '': config,
      'losses.TERM': config['losses']['l2'],
      'schedules': config['schedules'][-1][1],
    }.get(path) or config[path]
    here[name] -= 4 if isinstance(here[name], int) else STEP
    other, changed = planned(config)
    assert other == step and changed != numbers, key


@pytest.mark.parametrize('command', cli.COMMANDS)
def test_every_flag_has_help(command):
  module, flags = generate.command_flags(command)
  assert flags and all(flag.help for flag in flags.values())
  assert module.EXAMPLE.startswith(f'python -m vqrae_jax.{command} ')


def test_the_pages_are_written(tmp_path):
  """With every recipe, argument and command."""
  generate.write(tmp_path)
  commands = (tmp_path / 'commands.md').read_text()
  assert all(f'\n## `{name}`\n' in commands for name in cli.COMMANDS)
  recipes = (tmp_path / 'recipes.md').read_text()
  for name in generate.RECIPES:
    assert recipes.count(f'\n## `{name}`\n') == 1
    for argument in generate.arguments_of(name):
      assert f'`:{argument}=' in recipes
