"""The recipes' launch lines, and what else their sources' tables say."""

import ast
import importlib
import pathlib
import re

import pytest

from tests.test_configs import NAMES, SMALL, WANTED, read
from vqrae_jax.train import config as config_lib
from vqrae_jax.train.__main__ import default_workdir

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAGED = {
  'simvq_siglip_l', 'simvq_siglip2_l', 'internvit_6b', 'paper_siglip2_so400m',
  'paper_internvit_300m',
}  # fmt: skip


def launch_lines(name):
  """(config's words, {flag: value}) of each command in a docstring."""
  text = (ROOT / 'configs' / f'{name}.py').read_text()
  lines = ast.get_docstring(ast.parse(text)).splitlines()
  for line in lines:
    if line.startswith('python -m vqrae_jax.train '):
      flags = dict(
        word.removeprefix('--').split('=', 1) for word in line.split()[3:]
      )
      yield flags.pop('config'), flags


@pytest.mark.parametrize('name', [n for n in NAMES if n not in SMALL])
def test_launch_lines_are_commands(name):
  """A second stage begins where the first, by its line, has left its run."""
  lines = list(launch_lines(name))
  asked = [words.partition(':')[2] for words, _ in lines]
  assert any('stage=2' in a for a in asked) == (name in STAGED)
  for (words, flags), arguments in zip(lines, asked, strict=True):
    assert words.partition(':')[0] == f'configs/{name}.py'
    read(name, arguments or None)
    assert flags.pop('config.data.source') == 'FOLDER'
    if name == 'finetune_decoder':
      assert flags == {'config.init_from': 'TOKENIZER'}
    elif 'stage=2' in arguments:
      first = re.sub(r',?stage=2', '', arguments)
      assert first in asked
      before = f'configs/{name}.py' + (f':{first}' if first else '')
      assert flags == {'config.init_from': default_workdir(before)}
    else:
      assert not flags


# (rate at the end, warm-up, b1, b2, weight decay), and who trains so.
REQUEST = (1e-5, 2000, 0.9, 0.999, 1e-4)
REQUEST_2 = (1e-6, 1000, 0.9, 0.95, 0.05)
PAPER = (1e-4, 2000, 0.9, 0.999, 1e-4)
PAPER_2 = (1e-5, 2000, 0.9, 0.999, 1e-4)
RAE = (2e-5, '1 epochs', 0.9, 0.95, 0.0)
TUNED = (2e-6, 1000, 0.9, 0.95, 0.0)
LIKE = {
  'simvq_siglip_l': (REQUEST, REQUEST_2),
  'fsq_siglip_l': (REQUEST,),
  'fsq_cosmos_64k': (REQUEST,),
  'vqvae_16k': (REQUEST,),
  'paper_siglip2_so400m': (PAPER, PAPER_2),
  'paper_internvit_300m': (PAPER, PAPER_2),
  'internvit_6b': (PAPER, PAPER_2),
  'vq_dinov2_b': (RAE,),
  'vq_dinov2_b_decxl': (RAE,),
  'rae_dinov2_b': (RAE,),
  'finetune_decoder': (TUNED,),
}


@pytest.mark.parametrize('name, arguments', WANTED)
def test_rates_optimizers_and_crops(name, arguments):
  spec = read(name, arguments)
  second = 'stage=2' in (arguments or '')
  if name == 'simvq_siglip2_l':
    paper = 'preset=paper' in (arguments or '')
    want = (PAPER, PAPER_2)[second] if paper else (REQUEST, REQUEST_2)[second]
  else:
    want = LIKE[name][second]
  rest = [s for _, s in spec.schedule_rows() if s is not None][-1]
  adam = spec.optim
  found = (rest.end_lr, rest.warmup, adam.b1, adam.b2, adam.weight_decay)
  assert found == want
  assert rest.decay == 'cosine' and adam.clip == 1.0
  # RAE's: crops from 1.5 times the side, no flips; else 1.14 times, and flips.
  rae = 'dinov2' in name or 'dinov2' in (arguments or '')
  side = spec.data.size[0]
  assert spec.data.resize == (side * 3 // 2 if rae else side + 32)
  assert spec.data.flip == (not rae) and spec.data.crop == 'random'


def test_every_recipe_can_hold_photographs_out():
  """By flags alone: tiles are as large as training images if none say."""
  for name in {*NAMES} - SMALL:
    config = importlib.import_module(f'configs.{name}').get_config()
    assert config_lib.read_config(config).eval is None
    config.eval.update(source='photos', every=1000)
    spec = config_lib.read_config(config)
    assert (spec.eval.source, spec.eval.every) == ('photos', 1000)
    assert spec.eval.tile == config.data.image_size
