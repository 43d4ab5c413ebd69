"""A value outside its usual range is logged once, in one line, and used."""

import re

import pytest

from tests import tiny
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import loop


@pytest.mark.parametrize(
  'kind, keys, named',
  [
    ('vq-ema', dict(epsilon=0.1), ['epsilon']),
    ('vq-ema', dict(commit=2.0, decay=0.5), ['decay', 'commit']),
    ('simvq-l2', dict(num_codes=100), ['num_codes']),
    ('simvq-l2', dict(commit=1e-4), ['commit']),
    ('fsq-centered', dict(commit=0.01, lpips=1.0), ['commit']),
    ('fsq-centered', dict(commit=0.01), []),  # beside L2 alone
    ('fsq-centered', dict(commit=1e-4), ['commit']),
    ('fsq-cosmos', dict(epsilon=1e-6), ['epsilon']),
    ('fsq-cosmos', dict(noise_tau=0.8), ['noise_tau']),
    ('fsq-cosmos', dict(levels=(300, 2), dtype='bfloat16'), ['dtype']),
    ('none', dict(noise_tau=0.8), []),  # noise is for continuous latents
    ('simvq-l2', dict(commit=0.01), []),
    ('vq-ema', dict(accumulate=2), []),
    ('vq-ema', dict(accumulate=2, diversity=0.1), ['accumulate']),
    *((kind, {}, []) for kind in tiny.LOSSES),
  ],
)
def test_unusual_values_are_named(kind, keys, named):
  """Of a quantizer with 512 codes, if it has a table."""
  losses, fields = tiny.LOSSES[kind], dict(keys)
  if kind.startswith(('vq', 'simvq')):
    fields = dict(num_codes=512) | fields
  if kind in tiny.NESTED:
    of_each = tiny.NESTED[kind]['quantizer']
    fields = dict(quantizer=of_each | dict(num_codes=512))
  names = 'commit', 'lpips', 'diversity'
  losses = losses | {k: fields.pop(k) for k in names if k in fields}
  run = {k: fields.pop(k) for k in ('noise_tau', 'accumulate') if k in fields}
  dtype = dict(dtype=fields.pop('dtype', 'float32'))
  model = tiny.model(kind, **fields) | dtype
  spec = config_lib.read_config(
    tiny.run(kind, model=model, losses=losses, **run)
  )
  line = config_lib.config_warnings(spec, build_tokenizer(spec.model)) or ''
  assert re.findall(r'(\w+)=', line) == named and '\n' not in line


def test_a_run_logs_it_and_goes_on(caplog):
  with pytest.raises(ValueError, match='nowhere'):
    loop.dry_run(tiny.run('vq-ema', init_from='nowhere'))
  lines = [r.getMessage() for r in caplog.records if 'usual' in r.getMessage()]
  assert len(lines) == 1 and 'num_codes=64' in lines[0]
