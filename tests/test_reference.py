"""The reference says what the code does: keys, values, flags, recipes."""

import ast
import copy
import dataclasses
import re
import typing

import pytest

from docs import generate
from tests import tiny
from vqrae_jax import cli, optim, quantizers, sharding, specs
from vqrae_jax.data import decode, pipeline
from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import metrics
from vqrae_jax.losses import adversarial
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.nn import discriminators
from vqrae_jax.ops import trees
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
  """(name, annotation, the sentence of its values) of each field."""
  hints, texts = typing.get_type_hints(section.cls), section.entries()
  for name in section.fields():
    sentence = generate.split_values(texts[name])[1]
    yield name, hints[name], sentence[:1].lower() + sentence[1:]


def bounds_of(sentence):
  """[(bound, whether it is a value itself, the sign of what is outside)]."""
  if low := re.search(r'(at least|above) ([\d.]*\d)', sentence):
    return [(float(low[2]), low[1] == 'at least', -1)]
  if ends := re.search(r'in ([\[(])(\S+), (\S+)([\])])', sentence):
    low, high = float(ends[2]), float(ends[3])
    return [(low, ends[1] == '[', -1), (high, ends[4] == ']', 1)]
  return []


def choices_of(sentence):
  """The values of "One of …", or None."""
  listed = re.fullmatch(r'(?:each )?one of (.*)\.', sentence)
  return listed and ast.literal_eval(f'({listed[1]},)')


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
  for name, kind, sentence in described(section):
    kinds = numbers_in(kind)
    if not kinds:
      continue
    assert sentence, f'{name} has no range'
    _, here = config_of(section)
    step = 1 if int in kinds else STEP
    for bound, closed, sign in bounds_of(sentence):
      bound = int(bound) if int in kinds else bound
      inside = bound if closed else bound - sign * step
      outside = inside + sign * step
      if sentence.startswith('each'):
        default = section.fields()[name].default
        rest = tuple(here.get(name, default))[1:]
        outside, inside = (outside, *rest), (inside, *rest)
      error = error_of(section, name, outside)
      assert error and name in error, f'{name}={outside}: {error}'
      assert error_of(section, name, inside) is None, f'{name}={inside}'


# {key: its choices}; those of a quantizer are in its class.
CHOICES = {
  'losses.TERM.unit': optim.UNITS,
  'losses.distill.target': config_lib.DISTILL_TARGETS,
  'losses.NAME.on': ('images', 'latents'),
  'schedules.decay': optim.DECAYS,
  'temperature.decay': optim.DECAYS,
  'discriminator.name': discriminators.DISCRIMINATORS,
  'discriminator.loss': adversarial.D_LOSSES,
  'discriminator.fields.dtype': specs.DTYPES,
  'data.crop': pipeline.CROPS,
  'data.decoder': decode.DECODERS,
  'eval.metrics': metrics.METRICS,
  'networks.dtype': (*specs.DTYPES, None),
  'mesh.layout': sharding.LAYOUTS,
  'init.networks': config_lib.NETWORKS,
  'model.encoder.output_norm': specs.OUTPUT_NORMS,
  'model.encoder.resize': (*specs.RESIZES, specs.TORCH_BICUBIC),
  'model.encoder.posemb_resize': specs.RESIZES,
  'model.encoder.fuse': specs.FUSES,
  'model.encoder.vit.norm': ('layer', 'rms'),
  'model.encoder.vit.act': specs.ACTS,
  'model.encoder.vit.qkv_bias': (True, False, 'qv'),
  'model.encoder.vit.posemb': specs.POSEMBS,
  'model.encoder.vit.remat': specs.REMATS,
  'model.encoder.vit.dtype': specs.DTYPES,
  'model.latents.norm': specs.LATENT_NORMS,
  'model.quantizer.post_quant.space': ('code', 'latent'),
  'model.quantizer.projection': (True, False, 'mlp'),
}
# Those that ask for another key as well.
NOT_ALONE = {
  ('losses.distill.target', 'teacher'),
  ('schedules.decay', 'constant'),
  ('discriminator.schedule.decay', 'constant'),
  ('discriminator.name', 'dino'),
  ('model.encoder.fuse', 'attention'),
  ('model.latents.norm', 'none'),
  ('model.latents.norm', 'channel'),
  ('model.quantizer.convention', 'centered'),
  ('model.quantizer.code_scale', 'unit'),
  ('model.quantizer.code_scale', 'none'),
  ('model.quantizer.bound', 'clip'),
  ('model.quantizer.adapter_in', 'mlp'),
}


@by_section
def test_choices_are_those_of_the_code(section):
  known = dict(getattr(section.cls, 'choices', ()))
  for name, _, sentence in described(section):
    listed = choices_of(sentence)
    if listed is None:
      assert name not in known, f'{name} has choices'
      continue
    key = f'{section.key}.{name}'
    assert {*listed} == {*known.get(name, CHOICES.get(key, ()))}, key
    each = sentence.startswith('each')
    error = error_of(section, name, ('~',) if each else '~')
    assert error and name in error, key
    for value in listed:
      error = error_of(section, name, (value,) if each else value)
      assert (error is None) == ((key, value) not in NOT_ALONE), error


@by_section
def test_none_is_taken_where_the_page_says_so(section):
  for name, _, sentence in described(section):
    if sentence:
      error = error_of(section, name, None)
      # The grid of "position".
      alone = (section.key, name) != ('model.latents', 'grid')
      assert (error is None) == (alone and 'None.' in sentence), error


def row_of(page, anchor):
  """What stands under a key, before its text."""
  _, key, rest = page.partition(f'{{#key-{anchor}}}')
  assert key and key not in rest
  return rest.splitlines()[1]


def test_defaults_of_the_page_are_those_of_the_classes():
  page, found = generate.config_page(), 0
  for section in SECTIONS:
    for name, field in section.fields().items():
      row = row_of(page, f'{section.anchor}-{name}')
      shown = re.search(r'default `(.*?)`', row)
      if field.default is dataclasses.MISSING:
        assert not shown
      elif shown and 'a section' not in row:
        assert ast.literal_eval(shown[1]) == field.default
        found += 1
  assert found > 100


def test_a_flag_is_what_every_recipe_sets():
  page = generate.config_page()
  assert '*flag*' in row_of(page, 'config-data-flip')
  assert '*flag*' not in row_of(page, 'config-losses-TERM-weight')


def with_numbers():
  """(a run with all its parts, {key: (its section, its name)} of each number
  that is none of the model's), every number set."""
  config = tiny.run('gumbel')
  rate, term = dict(layers=(0.5, 1.0)), {}
  config |= dict(
    losses=dict(l2=term, gan=dict(weight=1.0, start=32), kl=1.0),
    schedules=(('encoder/transformer/.*', rate), ('.*', dict(lr=1e-3))),
    discriminator=dict(name='patch', fields=dict(FIELDS['patch'])),
    eval=dict(source='photos'),
    **{key: {} for key in ('temperature', 'optim', 'mesh', 'log')},
    checkpoint={},
  )
  places = config | {'': config, 'losses.TERM': term, 'schedules': rate}
  found = {}
  for section in SECTIONS:
    here = places.get(section.key)
    for name, kind, _ in described(section) if here is not None else ():
      if kinds := numbers_in(kind):
        # Multiples of the patch; the discriminator starts before its loss.
        here.setdefault(name, 16 if int in kinds else 0.5)
        found[f'{section.key}.{name}'.strip('.')] = here, name
  config['duration'] = 64
  return config, found


def planned(config):
  spec = config_lib.read_config(config)
  step, numbers, *_ = setup.plan_step(spec, build_tokenizer(spec.model), 10)
  return step, numbers


def test_a_traced_number_leaves_the_compiled_step():
  config, places = with_numbers()
  step, numbers = planned(config)
  traced = set()
  for key, (here, name) in places.items():
    value = here[name]
    if isinstance(value, tuple):
      here[name] = (value[0] / 2, *value[1:])
    else:
      here[name] = value - 4 if isinstance(value, int) else value / 2
    other, changed = planned(config)
    here[name] = value
    if other == step and changed != numbers:
      traced.add(key)
  assert traced == generate.TRACED


def test_a_run_that_resumes_must_have_what_is_kept():
  spec = config_lib.read_config(tiny.run())
  identity = setup.setup(spec).identity()
  kept = {key.rpartition('.')[2] for key in generate.KEPT}
  assert {*identity} == kept | {'images', 'model'}
  model = {name.rpartition('/')[2] for name in trees.flatten(identity['model'])}
  assert 'width' in model and not model & {*specs.RUN_OPTIONS}
  assert generate.is_kept('model.latents')
  assert not generate.is_kept('model.encoder.vit.dtype')


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
