"""A value outside its usual range is said once, in one line, and used."""

import pytest

from tests import tiny
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import config as ranges
from vqrae_jax.train import run as run_lib


def said(kind, commit=0.25, **fields):
  config = tiny.run(kind, model=tiny.model(kind, **fields))
  config['losses'] = {
    k: commit if k == 'commit' else v for k, v in config['losses'].items()
  }
  spec = config_lib.read_config(config)
  return ranges.unusual(spec, build_tokenizer(spec.model))


@pytest.mark.parametrize(
  'kind, fields, words',
  [
    (
      'vq-ema',
      dict(decay=0.9),
      ['quantizer.decay=0.9 (usually 0.95 to 0.999)'],
    ),
    ('vq-ema', dict(num_codes=64), ['num_codes=64 (usually 512 to 65536)']),
    ('vq-ema', dict(epsilon=0.1), ['epsilon=0.1 (usually 1e-07 to 0.001)']),
    ('vq-ema', dict(commit=0.8), ['losses.commit=0.8 (usually 0.1 to 0.5)']),
    ('vq-ema', dict(commit=2.0, decay=0.5), ['commit=2', 'decay=0.5']),
    ('simvq-l2', dict(num_codes=100), ['num_codes=100']),
    ('fsq-centered', dict(commit=0.01), ['losses.commit=0.01']),
    ('simvq-l2', dict(commit=1e-4), ['=0.0001 (usually 0.001 to 0.5)']),
    ('fsq-cosmos', dict(epsilon=1e-6), ['epsilon=1e-06']),
  ],
)
def test_unusual_values_are_named(kind, fields, words):
  if 'num_codes' not in fields and not kind.startswith('fsq'):
    fields = dict(num_codes=512) | fields
  line = said(kind, **fields)
  assert line.startswith('unusual: ') and '\n' not in line
  assert line.count('usually') == len(words)
  assert all(w in line for w in words), line


def test_usual_values_are_not():
  for kind in ('vq-ema', 'vq-gradient', 'simvq-l2'):
    assert said(kind, num_codes=512) is None
  assert said('simvq-l2', commit=0.01, num_codes=512) is None
  assert said('fsq-cosmos') is said('fsq-centered') is said('none') is None


def test_noise_is_usual_for_continuous_latents_only():
  for kind, words in (
    ('none', None),
    ('fsq-cosmos', 'unusual: noise_tau=0.8 (usually 0)'),
  ):
    spec = config_lib.read_config(tiny.run(kind, noise_tau=0.8))
    assert ranges.unusual(spec, build_tokenizer(spec.model)) == words


def test_a_run_says_it_once(monkeypatch):
  lines = []
  monkeypatch.setattr(run_lib.logging, 'warning', lines.append)
  run_lib.Run(tiny.run('vq-ema'))
  assert len(lines) == 1 and 'num_codes=64' in lines[0]
