"""What `init_from` takes of a run, what it leaves, and what it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest
from absl import logging
from PIL import Image

from tests import tiny
from tests.train.test_player_updates import DINO
from vqrae_jax import sharding
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.train import loop
from vqrae_jax.train import state as state_lib
from vqrae_jax.train.run import Run

KIND = 'simvq-l2'
LOSSES = tiny.LOSSES[KIND] | dict(gan=dict(weight=0.5))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('photos')
  for i in range(3):
    pixels = tiny.images(1, 24, 24, seed=i)[0]
    Image.fromarray(pixels).save(folder / f'{i}.png')
  return folder


def config(photos, kind=KIND, **keys):
  base = dict(
    data=dict(source=str(photos), image_size=16),
    log=dict(every=1, images_every=0, tensorboard=False),
    losses=LOSSES,
    discriminator=DINO,
    init=dict(networks='random'),
    duration=2,
    checkpoint=dict(every=1),
  )
  return tiny.run(kind, **(base | keys))


@pytest.fixture(scope='module')
def parent(photos, tmp_path_factory, one_device):
  """A finished run of both players that froze no part of the tokenizer."""
  workdir = tmp_path_factory.mktemp('parents') / 'parent'
  loop.train(config(photos), workdir)
  return workdir


@pytest.fixture
def said(monkeypatch):
  lines = {'info': [], 'warning': []}
  for level, found in lines.items():
    monkeypatch.setattr(
      logging, level, lambda words, *x, to=found: to.append(words % x)
    )
  return lines


@pytest.mark.parametrize('what', ('run', 'tokenizer'))
@pytest.mark.parametrize(
  'model, words',
  [
    (
      tiny.model('simvq-cosine'),
      'has quantizer.distance=l2, model.quantizer.distance is cosine; make',
    ),
    (tiny.model(KIND, depth=3), 'has decoder.vit.depth=2, model.decoder.* 3;'),
    (tiny.model('vq-ema'), 'has quantizer.name=simvq, model.* is vq;'),
  ],
)
def test_another_model_is_refused_before_a_program_compiles(
  model, words, what, photos, parent, programs
):
  """Equal shapes do not make it the same: codes would be chosen otherwise."""
  path = parent if what == 'run' else parent / 'tokenizer'
  kept = {k: x for k, x in LOSSES.items() if k != 'codebook'}
  losses = kept if model['quantizer']['name'] == 'vq' else LOSSES
  run = Run(config(photos, model=model, losses=losses, init_from=str(path)))
  programs()
  with jax.set_mesh(run.mesh), pytest.raises(UserError, match=words) as e:
    run.start()
  assert str(path) in str(e.value) and '\n' not in str(e.value)
  assert not programs()


def test_what_only_training_reads_may_differ(photos, parent):
  model = tiny.model(KIND, basis_init='normal')
  run = Run(config(photos, model=model, init_from=str(parent)))
  with jax.set_mesh(run.mesh):
    assert run._bring().leaves


def test_what_is_left_behind_is_said(photos, parent, said, tmp_path):
  loop.train(config(photos, init_from=str(parent)), tmp_path / 'child')
  (line,) = [s for s in said['info'] if s.startswith('begins with')]
  assert f'step 2 of {parent} (averaged weights, live codebook)' in line
  (left,) = [s for s in said['info'] if s.startswith('not taken')]
  for part in ('the discriminator (', 'the optimizer (', 'before averaging ('):
    assert part in left, part
  assert 'RANDOM networks in discriminator' in line
  assert not [s for s in said['warning'] if 'not finished' in s]
  unfinished = tmp_path / 'unfinished'
  shutil.copytree(parent, unfinished)
  (unfinished / 'summary.json').unlink()
  words = 'not finished; this one begins at its step 2'
  for figures in (None, dict(steps=1)):  # as a lengthened run has it
    if figures:
      (unfinished / 'summary.json').write_text(json.dumps(figures))
    run = Run(config(photos, init_from=str(unfinished)))
    with jax.set_mesh(run.mesh):
      assert words in run._bring().warning
  assert not any(words in s for s in said['warning'])
  with jax.set_mesh(run.mesh):
    run.start()
  assert words in said['warning'][-1]


def test_a_run_that_goes_on_does_not_say_random_weights(photos, parent):
  """All but its frozen networks is in the checkpoint."""
  for keys in (dict(), dict(init_from=str(parent))):
    run = Run(config(photos, **keys))
    with jax.set_mesh(run.mesh):
      again = run._bring(again=True).says
      assert again.startswith('RANDOM networks in discriminator')
      first = 'random weights' if not keys else 'leaves of step 2'
      assert first in run._bring().says


def test_a_parent_needs_the_files_of_its_frozen_parts_only(
  photos, parent, tmp_path
):
  """It goes on without the encoder that it began to train from; so its child
  begins without."""
  brought = tmp_path / 'encoder'
  shutil.copytree(parent / 'tokenizer', brought)
  keys = dict(
    init=dict(networks='random', encoder=str(brought)),
    schedules=(('decoder/.*', None), ('.*', dict(lr=1e-3))),
  )
  loop.train(config(photos, **keys), tmp_path / 'parent')
  shutil.rmtree(brought)
  run = Run(config(photos, init_from=str(tmp_path / 'parent')))
  with jax.set_mesh(run.mesh):
    given = run._bring()
  have, _ = state_lib.init_state(run.plan, run.mesh, 0, given.leaves)
  assert 'it kept frozen' in given.says and have


def test_a_child_goes_on_without_its_parent(photos, parent, tmp_path, said):
  """Unless a frozen tree came from there; then the line says what is gone."""
  gone = tmp_path / 'parent'
  shutil.copytree(parent, gone)
  free = config(photos, init_from=str(gone))
  held = config(
    photos,
    init_from=str(gone),
    losses=LOSSES | dict(distill=1.0),
    teacher='init',
  )
  for name, keys in (('free', free), ('held', held)):
    loop.train(keys, tmp_path / name)
  (line,) = [s for s in said['info'] if 'the teacher is' in s]
  assert f'the teacher is the encoder of {gone};' in line
  shutil.rmtree(gone)
  figures = loop.train(free | dict(duration=4), tmp_path / 'free')
  assert figures['steps'] == 4
  with pytest.raises(UserError, match='parent: there is no such folder'):
    loop.train(held | dict(duration=4), tmp_path / 'held')


@pytest.mark.parametrize('layout, devices', (('fsdp', 8), ('fsdp+tp', 4)))
def test_onto_any_mesh(layout, devices, photos, parent):
  """A run on one device begins another on many, its teacher laid over them."""
  mesh = sharding.make_mesh(
    layout, jax.devices()[:devices], 2 if layout == 'fsdp+tp' else 1
  )
  child = config(
    photos,
    init_from=str(parent),
    losses=LOSSES | dict(distill=1.0),
    teacher='init',
  )
  run = Run(child, mesh)
  with jax.set_mesh(mesh):
    state, frozen, _ = run.start()
  want = Run(config(photos, init_from=str(parent)))._bring().leaves
  teacher = trees.flatten(frozen.teacher)
  for name, leaf in state.tokenizer.params.items():
    np.testing.assert_array_equal(leaf, want[f'params/{name}'], err_msg=name)
    assert state.ema[name].sharding == leaf.sharding
    if name.startswith('encoder/'):
      assert teacher[name].sharding == leaf.sharding, name
      np.testing.assert_array_equal(teacher[name], leaf, err_msg=name)
  laid = [n for n, x in teacher.items() if not x.sharding.is_fully_replicated]
  assert any('transformer' in name for name in laid)


def test_a_manifest_says_which_step_a_teacher_is_of(photos, parent):
  child = config(
    photos,
    init_from=str(parent),
    losses=LOSSES | dict(distill=1.0),
    teacher='init',
  )
  run = Run(child)
  with jax.set_mesh(run.mesh):
    _, frozen, _ = run.start()
    record = run.frozen_record(frozen)
  assert record['teacher']['source'] == str(parent)
  assert record['teacher']['revision'] == 'step 2'
