"""Whole runs with LPIPS, a discriminator and a teacher: stopped, gone on."""

import json

import jax
import numpy as np
import pytest
from absl import logging
from PIL import Image

from tests import tiny
from tests.train.test_adversary import PATCH
from vqrae_jax import sharding
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.train import loop
from vqrae_jax.train import loop as alarms
from vqrae_jax.train.run import Run

LOSSES = dict(l2=1.0, lpips=0.5, gan=dict(weight=0.5, start=1))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('photos')
  for i in range(6):
    Image.fromarray(tiny.images(1, 20, 20, seed=i)[0]).save(folder / f'{i}.png')
  return folder


def config(photos, **keys):
  base = dict(
    data=dict(source=str(photos), image_size=16),
    log=dict(every=1, images_every=0, usage_window=2, tensorboard=False),
    losses=LOSSES,
    discriminator=PATCH,
    init=dict(networks='random'),
    checkpoint=dict(every=2, keep=2),
    duration=4,
  )
  return tiny.run('vq-ema', **base | keys)


def rows(workdir):
  clocks = ('seconds', 'images_per_second', 'data_wait')
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return [{k: v for k, v in r.items() if k not in clocks} for r in found]


def test_a_run_goes_on_with_both_players(
  photos, tmp_path, one_device, monkeypatch
):
  said, warned = [], []
  monkeypatch.setattr(logging, 'info', lambda *words: said.append(words))
  monkeypatch.setattr(logging, 'warning', lambda *words: warned.append(words))
  monkeypatch.setattr(alarms, 'WON', 2.0)  # a loss below twice of guessing
  loop.train(config(photos), tmp_path / 'whole')
  assert any('RANDOM networks in lpips' in str(words) for words in said)
  sounded = [words for words in warned if 'discriminator' in str(words)]
  assert len(sounded) == 1, 'an alarm is said once'
  whole = rows(tmp_path / 'whole')
  heard = {'loss/gan', 'gan_balance'}  # from the second step
  assert heard | {
    'loss/lpips', 'weight/gan', 'logits/real', 'loss/discriminator',
    'lr/discriminator', 'discriminator/grad_norm', 'discriminator/update_norm',
  } <= set(whole[-1])  # fmt: skip
  assert not heard & set(whole[0]) and heard <= set(whole[1])
  assert [r['weight/gan'] for r in whole] == [0, 0.5, 0.5, 0.5]
  assert all(r['lr/discriminator'] > 0 for r in whole)
  kept = tmp_path / 'whole' / 'checkpoints'
  again = tmp_path / 'again'
  (again / 'checkpoints').mkdir(parents=True)
  for path in kept.iterdir():
    if path.name.startswith('00000002'):
      path.rename(again / 'checkpoints' / path.name)
  (again / 'metrics.jsonl').write_bytes(
    (tmp_path / 'whole' / 'metrics.jsonl').read_bytes()
  )
  said.clear()
  loop.train(config(photos), again)
  assert any('RANDOM networks in lpips' in str(words) for words in said)
  assert rows(again) == whole


def test_one_device_and_eight_agree(photos):
  """Three steps of both players, on eight devices in two parts each.

  Adam divides a gradient by its own size, and with a small eps makes ±1 of
  rounding errors where the true gradient is zero (attention keys' bias): this
  one is above them."""
  optim = dict(b1=0.9, b2=0.95, eps=1e-3)
  found = []
  for devices, layout in ((1, 'dp'), (8, 'fsdp')):
    mesh = sharding.make_mesh(layout, jax.devices()[:devices])
    keys = dict(optim=optim, discriminator=PATCH | dict(optim=optim))
    parts = 2 if devices == 8 else 1
    run = Run(config(photos, batch_size=16, accumulate=parts, **keys), mesh)
    with jax.set_mesh(mesh):
      state, frozen, step = run.start()
      rows = []
      for i in range(3):
        batch = run.place(run.batches.batch(i))
        state, metrics = step(state, frozen, batch)
        rows.append({k: float(v) for k, v in metrics.items()})
      found.append(rows)
  for one, eight in zip(*found, strict=True):
    assert one['loss/gan'] != 0 or one is found[0][0]
    for name, value in one.items():
      np.testing.assert_allclose(
        eight[name], value, rtol=1e-5, atol=1e-6, err_msg=name
      )


def test_every_leaf_lies_somewhere(photos):
  dino = dict(
    name='dino',
    fields=dict(
      vit=dict(width=16, depth=3, mlp_dim=32, num_heads=2, grid=(4, 4)),
      taps=(2, 0),
      kernel=3,
    ),
  )
  losses = LOSSES | dict(convnext=0.1)
  run = Run(config(photos, discriminator=dino, losses=losses))
  from vqrae_jax.train import state as state_lib

  state, frozen = state_lib.abstract_state(run.plan, run.mesh)
  names = set(trees.flatten((state, frozen)))
  assert any('discriminator/stats/spectral' in n for n in names)
  assert any('discriminator/transformer' in n for n in names)
  assert any('losses/convnext' in n for n in names)


def test_networks_that_are_not_here_name_the_command(photos, monkeypatch):
  monkeypatch.setenv('VQRAE_JAX_CACHE', '/nowhere')
  published = dict(init=dict(networks='published'))
  with pytest.raises(UserError, match=r'losses.lpips: .*fetch_weights'):
    Run(config(photos, **published))._bring()
  dino = dict(losses=dict(l2=1.0, gan=1.0), discriminator=dict(name='dino'))
  with pytest.raises(UserError, match=r'discriminator: .*name=patch'):
    Run(config(photos, **published, **dino))._bring()
