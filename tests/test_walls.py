"""Walls of docs/architecture.md that no other test file holds."""

import pathlib
import re

import jax
import numpy as np
import pytest

from tests import tiny
from vqrae_jax import export, sharding
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import run as run_lib
from vqrae_jax.train import state as state_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_plan_is_true_to_the_code():
  """Every test that docs/architecture.md names exists."""
  text = (ROOT / 'docs/architecture.md').read_text()
  names = re.findall(r'`(tests/[\w/]+\.py)?(?:::(\w+))?`', text)
  file = None
  assert sum(bool(test) for _, test in names) >= 9
  for path, test in names:
    file = path or file
    if test:
      assert f'def {test}(' in (ROOT / file).read_text(), (file, test)


def test_frozen_leaves_survive_the_step():
  """The step donates its state, never what is frozen."""
  keys = dict(schedules=(('encoder/.*', None), ('.*', dict(lr=1e-3))))
  started = run_lib.Run(tiny.run('fsq-cosmos', **keys))
  with jax.set_mesh(started.mesh):
    state, frozen, step = started.start()
    leaf = next(iter(state.tokenizer.params.values()))
    step(state, frozen, started.place(started.batches.batch(0)))
  assert leaf.is_deleted()
  assert not any(p.is_deleted() for p in frozen.params.values())


@pytest.mark.parametrize('kind', tiny.QUANTIZERS)
def test_counts_are_q_by_k(kind):
  tokenizer, variables = tiny.built(tiny.model(kind))
  out = tokenizer.apply(variables, tiny.images(2), train=True)
  q, k = tokenizer.quantizer.codes_per_token, tokenizer.codebook_size
  counts = out.quantizer.stats['counts']
  assert counts.shape == (q, k) and counts.dtype == np.int32
  assert counts.sum() == q * 2 * 16
  assert tokenizer.index_shape(16, 16) == (4, 4)


def test_frozen_trees_are_hashed_and_apart():
  """Frozen leaves are in no part of the state; equal trees hash equally."""
  keys = dict(schedules=(('encoder/.*', None), ('.*', dict(lr=1e-3))))
  spec = config_lib.read_config(tiny.run('vq-ema', **keys))
  plan = state_lib.make_plan(spec, build_tokenizer(spec.model), 1)
  mesh = sharding.make_mesh()
  states = [state_lib.init_state(plan, mesh, 0) for _ in range(2)]
  state, frozen = states[0]
  assert all(name.startswith('encoder/') for name in frozen.params)
  sizes = {leaf.shape for leaf in frozen.params.values()}
  assert not any(n.startswith('encoder/') for n in state.tokenizer.params)
  assert not any(n.startswith('encoder/') for n in state.ema)
  stacked = (2, 48, 32)  # the encoder's fc2, and the decoder's: once, not twice
  assert stacked in sizes
  held = [x.shape for x in jax.tree.leaves(state)].count(stacked)
  assert held == 4  # decoder: parameter, average, two moments
  hashes = [export.fingerprint({}, jax.device_get(f.params)) for _, f in states]
  assert hashes[0] == hashes[1] and len(hashes[0]) == 64
  name = next(iter(frozen.params))
  changed = {n: np.array(p) for n, p in frozen.params.items()}
  changed[name].flat[0] = np.nextafter(changed[name].flat[0], 2, dtype='f4')
  assert export.fingerprint({}, changed) != hashes[0]
