"""The pages of the reference that the code makes: keys, commands, recipes.

`write(folder)` writes config.md, commands.md and recipes.md, MyST Markdown.
Nothing in them is written twice: keys come from the dataclasses and their
docstrings, flags from absl's definitions, recipes from the configs as they
load. It compiles nothing and needs no network.
"""

import dataclasses
import importlib
import inspect
import pathlib
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from absl import flags

from configs import common
from vqrae_jax import cli, losses, quantizers, specs
from vqrae_jax.files import atomic_write
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.nn.discriminators import DISCRIMINATORS
from vqrae_jax.optim import AdamWConfig, Schedule
from vqrae_jax.train import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]


PAGES = 'config.md', 'commands.md', 'recipes.md'


def write(folder: pathlib.Path) -> None:
  """Writes the three pages into `folder`."""
  makers = config_page, commands_page, recipes_page
  for name, page in zip(PAGES, makers, strict=True):
    path, text = folder / name, page()
    # A file that stays as it is is not built again.
    if not path.exists() or path.read_text() != text:
      with atomic_write(path) as file:
        file.write(text.encode())


# ----------------------------------------------------------------------------
# Docstrings.


def prose(text: str) -> str:
  """A docstring's text as Markdown: what is not code is taken as it is."""
  parts = re.split(r'(`[^`]*`)', inspect.cleandoc(text))
  # Every second part is code.
  parts[::2] = [re.sub(r'([*_<[\]])', r'\\\1', part) for part in parts[::2]]
  parts[::2] = [re.sub(FLAG, _as_code, part) for part in parts[::2]]
  return ''.join(parts)


# A flag in text, as code: Sphinx would make one dash of its two.
FLAG = re.compile(r'(?<![\w-])--\w[^\s,;:)]*(?<!\.)')


def _as_code(flag: re.Match) -> str:
  return '`' + flag[0].replace('\\', '') + '`'


def about(doc: str) -> str:
  """A docstring up to its sections."""
  sections = r'\n+(?:Attributes|Args|Returns|Raises):\n'
  return re.split(sections, inspect.cleandoc(doc))[0]


def entries(doc: str, section: str = 'Attributes') -> dict[str, str]:
  """{name: text} of a section of a docstring."""
  match = re.search(
    rf'^{section}:\n((?:  .*\n|\n)*)', f'{inspect.cleandoc(doc)}\n', re.M
  )
  return split_entries(match[1])


def split_entries(text: str) -> dict[str, str]:
  """{name: text} of lines "name: text"."""
  text = textwrap.dedent(text).strip()
  found = (
    entry.partition(':') for entry in re.split(r'^(?=\S)', text, flags=re.M)[1:]
  )
  return {name: inspect.cleandoc(words) for name, _, words in found}


# How an entry ends: `vqrae_jax/train/config.py` describes it.
VALUES = re.compile(
  r'(Each )?(at least|above|in(?= [\[(])|any number|one of).*\.', re.IGNORECASE
)


def split_values(text: str) -> tuple[str, str]:
  """(an entry without the sentence that says its values, that or "")."""
  text = ' '.join(text.split())
  *rest, last = re.split(r'(?<=\.) (?=[A-Z])', text)
  return (' '.join(rest), last) if VALUES.fullmatch(last) else (text, '')


# ----------------------------------------------------------------------------
# config.md


@dataclasses.dataclass(frozen=True)
class Section:
  """The keys of a class.

  Attributes:
    key: where they stand in a config, "" at the top.
    cls: a dataclass, or a linen module.
    name: of a quantizer or a discriminator, whose keys stand at one place.
    also: other places that take the same keys.
    base: a class whose fields have a section of their own.
  """

  key: str
  cls: type
  name: str = ''
  also: tuple[str, ...] = ()
  base: type | None = None

  @property
  def anchor(self) -> str:
    """Of the section, and before the names of its keys."""
    key = '-'.join(filter(None, ('config', self.key, self.name)))
    return key.replace('.', '-')

  @property
  def title(self) -> str:
    """Its heading."""
    return f'`{self.key}`' + f' with `name="{self.name}"`' * bool(self.name)

  def fields(self) -> dict[str, dataclasses.Field]:
    """Those that a config may set here and that no base has."""
    # Of modules: linen's own, and what follows the encoder or `model.dtype`.
    hidden = set()
    if 'parent' in typing.get_type_hints(self.cls):
      hidden = {'parent', 'name'}
    if self.key == 'model.quantizer':
      hidden |= {'latent_dim', 'dtype'}
    shared = {}
    if self.base:
      shared = {f.name: f.default for f in dataclasses.fields(self.base)}
    return {
      f.name: f
      for f in dataclasses.fields(self.cls)
      if f.init
      and f.name not in hidden
      # The same field with another default is listed again.
      and not (f.name in shared and shared[f.name] == f.default)
    }

  def entries(self) -> dict[str, str]:
    """{field: its text}, those of the classes that it extends included."""
    found: dict[str, str] = {}
    for cls in reversed(self.cls.__mro__):
      doc = cls.__dict__.get('__doc__') or ''
      if 'Attributes:' in doc:
        found |= entries(doc)
    return found


def _section(key: str, cls: type, *also: str) -> Section:
  return Section(key, cls, also=also)


# Every class that a config reaches, in the order of the page.
GROUPS: tuple[tuple[str, str, tuple[Section, ...]], ...] = (
  (
    'The run',
    'Keys at the top of a config.',
    (_section('', config_lib.RunConfig),),
  ),
  (
    'Images',
    'The training images and the held-out images.',
    (
      _section('data', config_lib.DataSpec),
      _section('eval', config_lib.EvalSpec),
    ),
  ),
  (
    'Model',
    'The tokenizer. A part that is named has the fields of its name, and those '
    'that the section gives over them: [encoders](encoders.md), decoders "B", '
    '"L", "XL" and "symmetric" (as large as the encoder), '
    '[quantizers](quantizers.md).',
    (
      _section('model.encoder', specs.EncoderSpec),
      _section(
        'model.encoder.vit',
        specs.ViTSpec,
        'model.decoder.vit',
        'model.feature_decoder.vit',
        'discriminator.fields.vit',
      ),
      _section(
        'model.encoder.pixel_norm', specs.PixelNorm, 'model.decoder.pixel_norm'
      ),
      _section('model.quantizer', quantizers.Quantizer),
      *(
        Section('model.quantizer', cls, name, base=quantizers.Quantizer)
        for name, cls in quantizers.QUANTIZERS.items()
      ),
      _section('model.quantizer.post_quant', specs.PostQuantSpec),
      _section('model.decoder', specs.DecoderSpec),
      _section('model.latents', specs.LatentsSpec),
      _section('model.feature_decoder', specs.FeatureDecoderSpec),
      _section('temperature', config_lib.Temperature),
    ),
  ),
  (
    'Losses',
    'A loss that a config does not name is not computed; `l2=1.0` is short for '
    '`l2=dict(weight=1.0)`. Each is logged unweighted, under its name.',
    (
      _section(
        'losses.TERM',
        config_lib.LossTerm,
        'losses.features.deep',
        'losses.features.shallow',
      ),
      *(
        Section(f'losses.{name}', cls, base=config_lib.LossTerm)
        for name, cls in (
          *config_lib.TERMS.items(),
          ('NAME', config_lib.OtherTerm),
        )
      ),
    ),
  ),
  (
    'Discriminator',
    'Of `losses.gan`.',
    (
      _section('discriminator', config_lib.DiscriminatorSpec),
      *(
        Section('discriminator.fields', cls, name)
        for name, cls in DISCRIMINATORS.items()
      ),
    ),
  ),
  (
    'Optimization',
    'A schedule for every parameter, and AdamW.',
    (
      _section('schedules', Schedule, 'discriminator.schedule'),
      _section('optim', AdamWConfig, 'discriminator.optim'),
    ),
  ),
  (
    'Weights, devices, files',
    'Where weights come from, what a run is laid out on, what it writes.',
    (
      _section('init', config_lib.InitSpec),
      _section('networks', config_lib.NetworksSpec),
      _section('mesh', config_lib.MeshSpec),
      _section('log', config_lib.LogSpec),
      _section('checkpoint', config_lib.CheckpointSpec),
    ),
  ),
)

# Numbers of the compiled step, and what a run that resumes must have again.
TRACED = {
  'duration', 'ema', 'noise_tau',
  'losses.TERM.weight', 'losses.TERM.start', 'losses.TERM.ramp',
  'schedules.lr', 'schedules.end_lr', 'schedules.warmup', 'schedules.layers',
  'optim.eps', 'optim.weight_decay', 'optim.clip',
  'temperature.start', 'temperature.end', 'temperature.duration',
  'discriminator.start', 'discriminator.lecam', 'discriminator.r1',
}  # fmt: skip
KEPT = {'seed', 'batch_size', 'data.image_size', 'data.decoder'}

MARKS = """\
A config is a Python file, and `--config.KEY=VALUE` changes any key that it
sets. Marks stand beside a key where they apply:

flag
: Every recipe sets it (`common.base`), so that the flag always works. Other
  keys have a flag where the file sets them.

traced
: A number of the compiled step: changing it compiles nothing, unless that turns
  something on or off (0, None).

kept
: A resumed run must have the same value. It must also have the same number of
  images, and a state of the same arrays: this depends on what is frozen, on
  whether there are a discriminator, averaged weights, clipping and weight
  decay, and on `log.usage_window`.

Durations are "30 epochs", "2000 steps" or a number of steps. The values that a
key takes stand after its default; others are refused before anything compiles.
"""


def config_page() -> str:
  """Every key of a config."""
  lines, flagged = ['# Config keys', '', MARKS], {*dotted(common.base())}
  anchors = {
    key: section.anchor
    for _, _, sections in GROUPS
    for section in sections
    for key in (section.key, *section.also)
    if not section.name
  }
  anchors['losses'] = anchors['losses.TERM']
  for title, text, sections in GROUPS:
    lines += [f'## {title}', '', text, '']
    lines += _model_keys(anchors) if title == 'Model' else []
    lines += _loss_names() if title == 'Losses' else []
    for section in sections:
      if section.key:
        lines += [f'({section.anchor})=', f'### {section.title}', '']
        lines += [prose(about(section.cls.__doc__)), '']
        lines += _notes(section)
      texts, usual = section.entries(), _usual(section)
      for name, field in section.fields().items():
        key = f'{section.key}.{name}'.strip('.')
        text, values = split_values(texts[name])
        kind = typing.get_type_hints(section.cls)[name]
        default = default_of(field)
        facts = [type_name(kind, anchors.get(key))]
        if default is dataclasses.MISSING:
          facts.append('**required**')
        elif (shown := literal(default)) != 'dict()':
          facts.append(f'default `{shown}`')
        facts += [_shown(values)] if values else []
        facts += [usual[name]] if name in usual else []
        facts += ['*flag*'] * (key in flagged)
        facts += ['*traced*'] * (key in TRACED)
        facts += ['*kept*'] * is_kept(key)
        lines += [*_entry(f'key-{section.anchor}-{name}', key, facts, text), '']
  return '\n'.join(lines)


def is_kept(key: str) -> bool:
  """Whether a run that resumes must have the same value."""
  path, _, name = key.rpartition('.')
  in_model = path.split('.')[0] == 'model' and name not in specs.RUN_OPTIONS
  return in_model or key in KEPT


def _entry(anchor: str, key: str, facts: list[str], text: str) -> list[str]:
  # A sentence that starts as in the source, in lower case, after the name.
  text = prose(text[:1].upper() + text[1:])
  return [f'`{key}`{{#{anchor}}}', f': {" · ".join(facts)}\\', f'  {text}']


def _notes(section: Section) -> list[str]:
  notes = []
  if section.also:
    also = ', '.join(f'`{key}`' for key in section.also)
    notes.append(f'The same keys: {also}.')
  if section.base is config_lib.LossTerm:
    notes.append('Beside the keys of [every loss](#config-losses-TERM):')
  if section.base is quantizers.Quantizer:
    notes.append(
      'Beside the keys of [every quantizer](#config-model-quantizer), with '
      'other defaults where they are listed again.'
    )
    quantizer = example_of(section.cls)
    names = ', '.join(f'`{name}`' for name in quantizer.loss_names)
    notes.append(f'Losses: {names or "none"}, at the defaults.')
    if issubclass(section.cls, quantizers.Nested):
      names = ', '.join(f'`{name}`' for name in section.cls.allowed)
      notes.append(f'Of {names}.')
  return [line for note in notes for line in (note, '')]


def example_of(cls: type) -> quantizers.Quantizer:
  """A quantizer with its defaults, for latents of 32 channels."""
  fields = {'latent_dim': 32}
  if issubclass(cls, quantizers.Nested):
    fields['quantizer'] = quantizers.VQ(latent_dim=32, code_dim=4)
  return cls(**fields)


def _usual(section: Section) -> dict[str, str]:
  """{field: values that a run does not warn of}."""
  found = config_lib.RANGES.get(section.name, {})
  return {
    field: f'usually {low:g} to {high:g}'
    for field, (low, high) in found.items()
  }


def _model_keys(anchors: Mapping[str, str]) -> list[str]:
  """Keys of `model` that are no section of a class."""
  text = entries(build_tokenizer.__doc__, 'Args')['model_config']
  text = re.sub(r'^( *)- ', r'\1', text.partition('\n')[2], flags=re.M)
  lines = []
  for name, entry in split_entries(text).items():
    key = f'model.{name}'
    text, values = split_values(entry)
    kind = bool if name in specs.RUN_OPTIONS else Mapping
    shown = _shown(values) if values else type_name(kind, anchors.get(key))
    facts = [shown, *['*kept*'] * is_kept(key)]
    lines += [*_entry(f'key-config-model-{name}', key, facts, text), '']
  return lines


def _loss_names() -> list[str]:
  """All terms, with the first sentence of each function."""
  tables = {
    'of images': losses.IMAGE_TERMS,
    'of images, by a frozen network': losses.FROZEN_TERMS,
    'of latents': losses.LATENT_TERMS,
  }
  lines = ['### Terms', '']
  for kind, table in tables.items():
    for name, fn in table.items():
      text = about(fn.__doc__).split('\n\n')[0]
      facts = [kind]
      if name == 'commit':
        for where, usual in (
          ('', config_lib.COMMIT),
          (' beside LPIPS (but for SimVQ)', config_lib.COMMIT_LPIPS),
        ):
          facts.append('weight usually {:g} to {:g}'.format(*usual) + where)
      anchor, key = name.replace('/', '-'), name.replace('/', '.')
      text = ' '.join(text.split())
      lines += _entry(
        f'key-config-losses-{anchor}', f'losses.{key}', facts, text
      )
      lines.append('')
  return lines


def type_name(kind: Any, anchor: str | None = None) -> str:
  """An annotation, as a config's author reads it; a section has its link."""
  if dataclasses.is_dataclass(kind) or kind is Mapping:
    return f'[a section](#{anchor})' if anchor else 'a section'
  if typing.get_origin(kind) in (types.UnionType, typing.Union):
    kinds = typing.get_args(kind)
    return ' or '.join(type_name(kind, anchor) for kind in kinds)
  name = getattr(kind, '__name__', str(kind))
  name = str(kind) if typing.get_args(kind) else name
  return '`None`' if kind is types.NoneType else f'`{name}`'


def literal(value: Any) -> str:
  """A value as a config writes it; of a dataclass what is not its default."""
  if dataclasses.is_dataclass(value):
    value = {
      f.name: getattr(value, f.name)
      for f in dataclasses.fields(value)
      if getattr(value, f.name) != default_of(f)
    }
  if isinstance(value, Mapping):
    return f'dict({", ".join(f"{k}={literal(v)}" for k, v in value.items())})'
  if isinstance(value, tuple):
    return f'({", ".join(map(literal, value))}{"," * (len(value) == 1)})'
  return f'"{value}"' if isinstance(value, str) else repr(value)


def default_of(field: dataclasses.Field) -> Any:
  """A field's default, or MISSING."""
  factory = field.default_factory
  return field.default if factory is dataclasses.MISSING else factory()


def _shown(values: str) -> str:
  """The sentence of a field's values, constants as code."""
  values = values[0].lower() + values[1:-1]
  return re.sub(
    r'"[^"]*"|\b(?:True|False|None)\b|[\[(].+[\])]', r'`\g<0>`', values
  )


def dotted(config: Any, prefix: str = '') -> Iterator[str]:
  """The keys of all that a config sets, sections left out."""
  for name, value in config.items():
    if hasattr(value, 'items'):
      yield from dotted(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}'


# ----------------------------------------------------------------------------
# commands.md


def commands_page() -> str:
  """Every command and its flags."""
  lines = [
    '# Commands',
    '',
    'Each is `python -m vqrae_jax.NAME` or `vqrae NAME`; `--help` prints its '
    'flags. Bad input is a one-line error with exit code 2, a full disk and '
    'its like one with 1. A run that was stopped and has saved exits with '
    '143, one that lost another host with 75.',
    '',
  ]
  for name, text in cli.COMMANDS.items():
    lines.append(f'- [`{name}`](#command-{name.replace(".", "-")}): {text}')
  for name, text in cli.COMMANDS.items():
    module, values = command_flags(name)
    usage, _, text = inspect.cleandoc(module.__doc__).partition('\n')
    lines += ['', f'(command-{name.replace(".", "-")})=', f'## `{name}`', '']
    lines += ['```', usage, '```', '', *_passages(text), '']
    if usage != module.EXAMPLE:
      lines += ['```bash', shell(module.EXAMPLE), '```', '']
    for flag in values.values():
      lines += [*_flag(name, flag), '']
  return '\n'.join(lines)


def shell(command: str) -> str:
  """A command, a flag a line if it is longer than a page is wide."""
  return command if len(command) < 84 else command.replace(' --', ' \\\n  --')


def command_flags(name: str) -> tuple[types.ModuleType, dict[str, flags.Flag]]:
  """(a command's module, {flag: its definition} in the order of the file)."""
  module, values = cli.module_of(name), flags.FlagValues()
  if hasattr(module, 'ABOUT'):
    flags.DEFINE_string('config', None, module.ABOUT, values)
  module.define(values)
  return module, {n: values[n] for n in values if n == values[n].name}


def _flag(command: str, flag: flags.Flag) -> list[str]:
  kind = 'list' if 'list' in flag.flag_type() else flag.flag_type()
  facts = [f'`{kind}`'] if kind != 'bool' else [f'`bool`, `--no{flag.name}`']
  if choices := getattr(flag.parser, 'enum_values', None):
    facts = ['one of ' + ', '.join(f'`{choice}`' for choice in choices)]
  if (low := getattr(flag.parser, 'lower_bound', None)) is not None:
    high = getattr(flag.parser, 'upper_bound', None)
    facts.append(f'at least {low}' if high is None else f'{low} to {high}')
  default = (flag.default_as_str or '').strip("'")
  facts.append(f'default `{default}`' if default else 'no default')
  anchor = f'command-{command.replace(".", "-")}-{flag.name}'
  return _entry(anchor, f'--{flag.name}', facts, flag.help)


def _passages(text: str) -> list[str]:
  """A docstring's paragraphs as Markdown; what is indented stays as it is."""
  found = []
  for part in re.split(r'\n\n+', inspect.cleandoc(text)):
    indented = part.startswith('  ')
    found += ['```', inspect.cleandoc(part), '```', ''] if indented else []
    found += [] if indented else [prose(part), '']
  return found


# ----------------------------------------------------------------------------
# recipes.md

RECIPES = sorted(
  path.stem
  for path in (ROOT / 'configs').glob('[!_]*.py')
  if path.stem != 'common'
)
# Trainings that recipes share, each of one source.
TRAININGS = ('original', 'original_second', 'rae', 'vqrae')


def recipe(name: str, arguments: str | None = None) -> Any:
  """The ConfigDict of a file in configs/."""
  module = importlib.import_module(f'configs.{name}')
  return module.get_config(arguments or None)


def arguments_of(name: str) -> dict[str, Any]:
  """{argument: its default, or the tuple of its choices} of a recipe."""
  with mock.patch.object(common, 'arguments', wraps=common.arguments) as seen:
    recipe(name)
  return seen.call_args_list[0].kwargs if seen.called else {}


def recipes_page() -> str:
  """Every recipe, what it trains, and where its numbers come from."""
  lines = [
    '# Recipes',
    '',
    'Each starts with `python -m vqrae_jax.train --config=configs/NAME.py '
    '--config.data.source=FOLDER`; arguments follow the name, as in '
    '`configs/NAME.py:stage=2,open=6`. (`quickstart` brings its images, and '
    '`two_stages_small` begins with `:stage=0`.) `:stage=2` trains the '
    'encoder too and needs `--config.init_from=` the first run. What this '
    'page has is read from the configs, and a key at its '
    '[default](config.md) is left out; each docstring cites the source of '
    'its numbers.',
    '',
    '| recipe | encoder | quantizer | decoder | pixels | tokens |',
    '|---|---|---|---|---|---|',
  ]
  forms = {name: facts(name) for name in RECIPES}
  columns = 'encoder', 'quantizer', 'decoder', 'pixels', 'tokens'
  for name, form in forms.items():
    cells = [form[column].split(';')[0] for column in columns]
    lines.append(f'| [`{name}`](#recipe-{name}) | {" | ".join(cells)} |')
  lines += ['', '| recipe | losses | with `:stage=2` |', '|---|---|---|']
  for name, form in forms.items():
    staged = 'stage' in arguments_of(name)
    second = facts(name, 'stage=2')['`losses`'] if staged else ''
    lines.append(
      f'| [`{name}`](#recipe-{name}) | {form["`losses`"]} | {second} |'
    )
  usual = {
    f'`{f.name}`': f'`{literal(default_of(f))}`'
    for f in dataclasses.fields(config_lib.RunConfig)
  }
  for name, form in forms.items():
    shown = {k: v for k, v in form.items() if v != usual.get(k)}
    lines += ['', f'(recipe-{name})=', f'## `{name}`', '', *_text_of(name)]
    lines += [*_arguments(name), *_table(shown)]
    for arguments in forms_of(name):
      other = facts(name, arguments)
      if changed := {k: v for k, v in other.items() if form[k] != v}:
        lines += [f'`:{arguments}` differs in:', '', *_table(changed)]
  lines += ['## Trainings', '', prose(about(common.__doc__)), '']
  for name in TRAININGS:
    users = ', '.join(f'[`{n}`](#recipe-{n})' for n in _users(name))
    text = inspect.getdoc(getattr(common, name))
    lines += [f'(training-{name})=', f'### `common.{name}`', '']
    lines += [*_passages(text), f'Of {users}.', '']
  for name in ('dino_discriminator', 'paper_discriminator'):
    text = inspect.getdoc(getattr(common, name))
    lines += [f'### `common.{name}`', '', *_passages(text)]
  return '\n'.join(lines)


def _users(training: str) -> list[str]:
  source = {n: (ROOT / 'configs' / f'{n}.py').read_text() for n in RECIPES}
  return [n for n in RECIPES if f'common.{training}(' in source[n]]


def _text_of(name: str) -> list[str]:
  doc = inspect.getdoc(importlib.import_module(f'configs.{name}'))
  commands = [line for line in doc.splitlines() if line.startswith('python -m')]
  text = doc.split('\n\n', 1)[1]
  known = '|'.join(TRAININGS)
  lines = ['```bash', *map(shell, commands), '```', '', *_passages(text)]
  return [
    re.sub(rf'(`common\.({known})`)', r'[\1](#training-\2)', line)
    for line in lines
  ]


def _arguments(name: str) -> list[str]:
  lines = []
  for argument, value in arguments_of(name).items():
    choices = value if isinstance(value, tuple) else (value,)
    if isinstance(value, bool):
      choices = value, not value
    shown = ', '.join(f'`:{argument}={choice}`' for choice in choices)
    lines.append(
      f'- {shown}' + ' (the first is the default)' * (len(choices) > 1)
    )
  return ['Arguments:', '', *lines, ''] if lines else []


def forms_of(name: str) -> list[str]:
  """Arguments that have another choice, one by one, and those of the commands
  in the recipe's docstring."""
  found = []
  for argument, value in arguments_of(name).items():
    if argument == 'recipe':
      continue
    others = value[1:] if isinstance(value, tuple) else ()
    if isinstance(value, bool):
      others = (not value,)
    found += [f'{argument}={other}' for other in others]
  doc = inspect.getdoc(importlib.import_module(f'configs.{name}'))
  found += re.findall(rf'configs/{name}\.py:(\S+)', doc)
  return list(dict.fromkeys(found))


def _table(rows: Mapping[str, str]) -> list[str]:
  lines = ['| | |', '|---|---|']
  cells = {name: text.replace('|', '\\|') for name, text in rows.items()}
  return [*lines, *(f'| {name} | {text} |' for name, text in cells.items()), '']


def facts(name: str, arguments: str | None = None) -> dict[str, str]:
  """{what: a cell of Markdown} of a recipe: what its model amounts to, and the
  config's keys."""
  spec = config_lib.read_config(recipe(name, arguments))
  model, tokenizer = spec.model, build_tokenizer(spec.model)
  grid = tokenizer.grid(*spec.data.size)
  encoder, decoder = tokenizer.encoder_spec, tokenizer.decoder_spec
  rows = {
    'encoder': _network(model['encoder'], encoder.vit),
    'quantizer': _quantizer(tokenizer.quantizer, model['quantizer']),
    'decoder': _network(model['decoder'], decoder.vit),
    'pixels': f'{spec.data.size[0]}',
    'tokens': f'{grid[0]}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{grid[1]}',
  }
  if encoder.layers:
    name, *rest = rows['encoder'].split('; ')
    blocks = ', '.join(map(str, encoder.layers))
    blocks = f'the latents are of blocks {blocks}, fused by `{encoder.fuse}`'
    name += f', {len(encoder.layers)} blocks by {encoder.fuse}'
    rows['encoder'] = '; '.join((name, *rest, blocks))
  if tokenizer.features_spec:
    depth = tokenizer.features_spec.vit.depth
    name, *rest = rows['decoder'].split('; ')
    name += ', after a feature decoder'
    rows['decoder'] = '; '.join((name, *rest, f'that has {depth} blocks'))
  keys = {f'model.{k}': model[k] for k in specs.RUN_OPTIONS if k in model}
  keys |= {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
  for key, value in keys.items():
    if key not in ('model', 'log', 'checkpoint'):
      rows[f'`{key}`'] = f'`{literal(value)}`'
  terms = spec.terms()
  known = *losses.IMAGE_TERMS, *losses.FROZEN_TERMS, 'gan', *losses.LATENT_TERMS
  lines = (_loss(n, terms[n]) for n in known if n in terms)
  rows['`losses`'] = '<br>'.join(lines)
  lines = (f'`{literal(row)}`' for row in spec.schedule_rows())
  rows['`schedules`'] = '<br>'.join(lines)
  return rows


def _network(section: Mapping, vit: specs.ViTSpec) -> str:
  size = f'ViT, {vit.width} wide, {vit.depth} blocks of patch {vit.patch_size}'
  if 'name' not in section:
    return f'{size.partition(" blocks")[0]} blocks; from scratch'
  return f'{section["name"]}; {size}'


def _quantizer(quantizer: quantizers.Quantizer, section: Mapping) -> str:
  if not quantizer.codebook_size:
    return 'none'
  size, width = quantizer.codebook_size, quantizer.code_width
  given = {
    k: v
    for k, v in section.items()
    if k not in ('name', 'num_codes', 'code_dim')
  }
  given = ', '.join(f'`{k}={literal(v)}`' for k, v in given.items())
  text = f'{section["name"]}, {size:,} codes of {width}'
  return f'{text}; {given}' if given else text


def _loss(name: str, term: config_lib.LossTerm) -> str:
  value = term.weight if term == type(term)(term.weight) else term
  return f'`{name.replace("/", ".")}={literal(value)}`'
