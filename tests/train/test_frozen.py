"""Frozen leaves: arguments of the step, outside the state, hashed."""

import jax
import numpy as np

from tests import tiny
from vqrae_jax import export, sharding
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import run as run_lib
from vqrae_jax.train import state as state_lib

SCHEDULES = (('encoder/.*', None), ('.*', dict(lr=1e-3)))


def test_frozen_leaves_survive_the_step():
  """The step donates its state, never what is frozen."""
  started = run_lib.Run(tiny.run('fsq-cosmos', schedules=SCHEDULES))
  with jax.set_mesh(started.mesh):
    state, frozen, step = started.start()
    leaf = next(iter(state.tokenizer.params.values()))
    step(state, frozen, started.place(started.batches.batch(0)))
  assert leaf.is_deleted()
  assert not any(p.is_deleted() for p in frozen.params.values())


def test_frozen_trees_are_hashed_and_apart():
  """Frozen leaves are in no part of the state; equal trees hash equally."""
  spec = config_lib.read_config(tiny.run('vq-ema', schedules=SCHEDULES))
  plan = state_lib.make_plan(spec, build_tokenizer(spec.model), 1)
  mesh = sharding.make_mesh()
  states = [state_lib.init_state(plan, mesh, 0) for _ in range(2)]
  state, frozen = states[0]
  assert all(name.startswith('encoder/') for name in frozen.params)
  assert not any(n.startswith('encoder/') for n in state.tokenizer.params)
  assert not any(n.startswith('encoder/') for n in state.ema)
  stacked = (2, 48, 32)  # the encoder's fc2, and the decoder's: once, not twice
  assert stacked in {leaf.shape for leaf in frozen.params.values()}
  held = [x.shape for x in jax.tree.leaves(state)].count(stacked)
  assert held == 4  # decoder: parameter, average, two moments
  hashes = [export.fingerprint({}, jax.device_get(f.params)) for _, f in states]
  assert hashes[0] == hashes[1] and len(hashes[0]) == 64
  name = next(iter(frozen.params))
  changed = {n: np.array(p) for n, p in frozen.params.items()}
  changed[name].flat[0] = np.nextafter(changed[name].flat[0], 2, dtype='f4')
  assert export.fingerprint({}, changed) != hashes[0]
