"""A step that is no number moves nothing; many in a row stop the run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from PIL import Image

from tests import tiny
from tests.train import pieces
from tests.train.test_player_updates import DINO
from vqrae_jax.train import loop
from vqrae_jax.train import run as run_lib
from vqrae_jax.train import step as finite

pytestmark = pytest.mark.usefixtures('one_device')


def images(seed=0, spoilt=False):
  x = tiny.images(8, seed=seed).astype(np.float32) / 255
  if spoilt:
    x[3, 5, 7, 1] = np.nan
  return x


@pytest.fixture(scope='module')
def begun():
  plan = pieces.planned(
    'vq-ema',
    losses=dict(l2=1.0, commit=0.25, gan=dict(weight=0.5)),
    discriminator=DINO | dict(schedule=dict(lr=1e-3, warmup=3)),
  )
  state, frozen = pieces.started(plan)
  step = pieces.jitted(plan)
  state, _ = step(state, frozen, images())  # every average has begun
  return step, state, frozen


def bits(state):
  return {n: x.tobytes() for n, x in pieces.host(state).items() if n != 'step'}


def test_one_bad_pixel_moves_nothing_but_the_count(begun):
  step, state, frozen = begun
  after, metrics = step(state, frozen, images(1, spoilt=True))
  assert metrics['nonfinite'] == 1 and np.isnan(metrics['loss/l2'])
  assert after.step == state.step + 1
  assert bits(after) == bits(state)
  # What a state holds that could have been spoilt is all there.
  for part in (
    'ema/', 'codebook/', 'discriminator/params/', 'discriminator/opt',
    'discriminator/stats/spectral/', 'discriminator/stats/lecam/',
    'tokenizer/opt', 'usage',
  ):  # fmt: skip
    assert any(n.startswith(part) for n in bits(state)), part
  rate = metrics['lr/discriminator']
  after, metrics = step(after, frozen, images(1))
  assert metrics['lr/discriminator'] == rate > 0  # no update was made
  assert metrics['nonfinite'] == 0 and np.isfinite(metrics['loss/l2'])
  assert bits(after) != bits(state)


def test_the_other_player_counts_too(begun):
  """A discriminator that breaks leaves the tokenizer's step out as well."""
  step, state, frozen = begun
  player = state.discriminator
  opt_state = jax.tree.map(
    lambda x: jnp.full_like(x, jnp.nan) if x.ndim else x, player.opt_state
  )
  broken = state.replace(discriminator=player.replace(opt_state=opt_state))
  after, metrics = step(broken, frozen, images(1))
  assert np.isfinite(metrics['grad_norm'])
  assert not np.isfinite(metrics['discriminator/update_norm'])
  assert metrics['nonfinite'] == 1 and bits(after) == bits(broken)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('photos')
  for i in range(4):
    Image.fromarray(tiny.images(1, 20, 20, seed=i)[0]).save(folder / f'{i}.png')
  return folder


@pytest.fixture
def spoil(monkeypatch):
  """Sets the steps whose images hold a NaN."""
  place, count = run_lib.Run.place, iter(range(10**6))

  def begin(*steps):
    def placed(run, batch):
      batch = dict(batch, images=np.float32(batch['images']) / 255)
      if len(batch['index']) and next(count) in steps:
        batch['images'][0, 0, 0, 0] = np.nan
      return place(run, batch)

    monkeypatch.setattr(run_lib.Run, 'place', placed)

  return begin


def config(photos, **keys):
  base = dict(
    data=dict(source=str(photos), image_size=16),
    log=dict(every=1, images_every=0, usage_window=2, tensorboard=False),
    eval=dict(source=str(photos), tile=16),
    checkpoint=dict(every=1, keep=1),
    duration=6,
  )
  return tiny.run('vq-ema', **base | keys)


def test_a_run_leaves_them_out_and_says_so(photos, tmp_path, spoil, caplog):
  spoil(2, 3)
  logging.use_absl_handler()
  loop.train(config(photos), tmp_path)
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert 'NaN' not in text  # what is no number is null
  rows = [json.loads(line) for line in text.splitlines()]
  assert [r['nonfinite'] for r in rows] == [0, 0, 1, 2, 2, 2]
  assert rows[2]['loss/l2'] is None and rows[4]['loss/l2'] is not None
  said = [r.getMessage() for r in caplog.records]
  lines = [line for line in said if 'is left out' in line]
  assert len(lines) == 2
  assert 'at step 3' in lines[0] and '1 in a row' in lines[0]
  assert 'at step 4' in lines[1] and '2 in a row' in lines[1]


def test_too_many_in_a_row_stop_it(photos, tmp_path, spoil):
  """The checkpoint before them stays, though each step would save one."""
  spoil(2, 3, 4)
  words = (
    r'at step 5 .*, 3 steps in a row; lower .* goes on from step 2: '
    r'.*00000002'
  )
  with pytest.raises(finite.NonFinite, match=words):
    loop.train(config(photos, max_nonfinite=2), tmp_path)
  assert not (tmp_path / 'tokenizer').exists()


def test_a_run_of_nothing_else_is_no_run(photos, tmp_path, spoil):
  spoil(*range(6))
  with pytest.raises(finite.NonFinite, match='at step 6 .*, 6 steps in a row'):
    loop.train(config(photos), tmp_path)
