"""A checkpoint is whole or not used, and opens on any mesh."""

import hashlib
import json
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from tests import runs, tiny
from tests.train import pieces
from vqrae_jax import sharding
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.train import initialize
from vqrae_jax.train import state as state_lib
from vqrae_jax.train.checkpoint import Checkpoints, as_leaves, from_leaves

KIND = 'vq-ema'


@pytest.fixture(scope='module')
def plan():
  return pieces.planned(KIND).spec


@pytest.fixture(scope='module')
def state(plan):
  """Random numbers in every leaf, over 8 devices; nothing is compiled."""
  target, _ = state_lib.state_shapes(
    plan, sharding.make_mesh('fsdp+tp', tensor=2)
  )
  rng = np.random.default_rng(0)
  leaves = {
    name: jax.device_put(
      rng.integers(0, 99, leaf.shape).astype(leaf.dtype), leaf.sharding
    )
    for name, leaf in as_leaves(target).items()
  }
  return from_leaves(target, leaves)


@pytest.fixture(scope='module')
def saved(tmp_path_factory, state):
  """Three saves, of which two are kept."""
  kept = Checkpoints(tmp_path_factory.mktemp('saved') / 'checkpoints', keep=2)
  for step in (1, 2, 3):
    kept.save(step, state.replace(step=jnp.int32(step)), {'says': step})
  kept.close()
  return kept


def test_a_save_compiles_nothing(tmp_path, programs):
  """Small leaves that all devices hold are not cut into a part for each."""
  kept = Checkpoints(tmp_path / 'checkpoints')
  everywhere = sharding.NamedSharding(
    sharding.make_mesh(), sharding.PartitionSpec()
  )
  kept.save(1, {'a': jax.device_put(np.ones((24, 17)), everywhere)}, {})
  kept.close()
  assert not programs()


@pytest.fixture
def kept(saved, tmp_path):
  folder = tmp_path / 'checkpoints'
  shutil.copytree(saved._folder, folder)
  return Checkpoints(folder, keep=2)


HASHES, MANIFEST = 'sha256.0-of-1.json', '_CHECKPOINT_METADATA'
# What disks, people and kills do to a step: {how: (to which files, what they
# hold then, the line)}.
DAMAGES = {
  'a flipped bit': (
    'state/d/*', lambda b: b[:-1] + bytes([b[-1] ^ 1]), 'is changed',
  ),
  'a missing file': ('state/d/*', None, 'is missing'),
  'a file that was not hashed': (HASHES, lambda _: b'{}', 'is changed'),
  'an empty folder': ('**/*', None, 'is empty'),
  'a save killed before its hashes': (HASHES, None, 'was not completed'),
  'a changed manifest': (MANIFEST, lambda b: b + b' ', 'METADATA is changed'),
  'a flipped digit': (HASHES, lambda b: b[:-3] + b'x"}', 'is changed'),
  'a torn list of hashes': (HASHES, lambda _: b'{"x": ', 'cannot be read'),
  'a number': (HASHES, lambda _: b'5', 'cannot be read'),
  'a deep list': (HASHES, lambda _: 100_000 * b'[', 'cannot be read'),
}  # fmt: skip


def damage(folder, files, change=None):
  """Changes each such file's bytes; without `change` it is gone."""
  for path in folder.glob(files):
    if path.is_file() and change:
      path.write_bytes(change(path.read_bytes()))
    elif path.is_file():
      path.unlink()


@pytest.mark.parametrize('how', DAMAGES)
def test_damage_falls_back_to_the_step_before(kept, tmp_path, how, caplog):
  files, change, words = DAMAGES[how]
  damage(tmp_path / 'checkpoints' / '00000003', files, change)
  assert kept.latest()['says'] == 2
  (line,) = [r.message for r in caplog.records if r.levelname == 'WARNING']
  assert 'checkpoint 3 is not used' in line and words in line


def test_a_disk_that_does_not_answer_costs_no_checkpoint(kept, monkeypatch):
  """Falling back would remove the newest step."""
  with monkeypatch.context() as patch:
    fails = mock.Mock(side_effect=OSError('no answer'))
    patch.setattr('vqrae_jax.train.checkpoint.digest', fails)
    with pytest.raises(OSError, match='no answer'):
      kept.latest()
  with monkeypatch.context() as patch:  # of another host, which says why
    patch.setattr(
      multihost_utils, 'process_allgather', lambda x: np.array([x, 3])
    )
    with pytest.raises(OSError, match='another host .* checkpoint 3'):
      kept.latest()
  assert kept.latest()['says'] == 3


def test_a_manifest_of_another_version_is_refused(kept, tmp_path):
  pieces.edit_manifests(tmp_path, lambda m: m.update(vqrae_jax=99))
  with pytest.raises(UserError, match='step 3: .*version 99'):
    kept.latest()


def test_none_intact_is_an_error_and_a_killed_first_save_is_not(kept, tmp_path):
  folder = tmp_path / 'checkpoints'
  damage(folder / '00000002', '**/*')
  damage(folder / '00000003', HASHES)
  with pytest.raises(UserError, match='step 2: it is empty'):
    kept.latest()
  (folder / '00000002.json').touch()  # beside steps of an older form
  with pytest.raises(UserError, match='step 2: .*0d4c29b'):
    kept.latest()
  shutil.rmtree(folder / '00000002')
  assert kept.latest() is None and kept.steps() == []
  assert Checkpoints(tmp_path / 'nowhere').latest() is None


def test_retention_and_what_is_never_removed(kept, tmp_path, state):
  """Through links too: only what `save` has made goes."""
  folder = tmp_path / 'checkpoints'
  users = ('best', '3', '00000003.mine', '20240101', '00000000')
  for name in users:
    (folder / name).mkdir()
    (folder / name / 'notes').write_text('mine')
  (folder / '20240101' / MANIFEST).write_text('{"custom_metadata": {}}')
  (tmp_path / 'link').symlink_to(folder)
  kept = Checkpoints(tmp_path / 'link', keep=2)
  (folder / '00000009').mkdir()
  (folder / '00000007.orbax-checkpoint-tmp').mkdir()
  assert kept.latest()['step'] == 3
  kept.begin_from(2)
  assert {p.name for p in folder.iterdir()} == {*users, '00000002'}
  for step in (3, 4):
    kept.save(step, {'w': jnp.ones(3)}, {})
  kept.close()
  left = {p.name for p in folder.iterdir()}
  assert left == {*users, '00000003', '00000004'}
  (folder / '00000005').mkdir()
  with pytest.raises(UserError, match='00000005 is in the way'):
    kept.save(5, {'w': jnp.ones(3)}, {})


@pytest.mark.parametrize(
  'devices, layout, tensor',
  [(1, 'dp', 1), (2, 'fsdp', 1), (4, 'fsdp+tp', 2), (8, 'dp', 1)],
)
def test_a_state_of_8_devices_opens_on_fewer(
  kept, plan, state, devices, layout, tensor
):
  mesh = sharding.make_mesh(layout, jax.devices()[:devices], tensor)
  target, _ = state_lib.state_shapes(plan, mesh)
  found = kept.restore(kept.latest(), target)
  want = as_leaves(state.replace(step=jnp.int32(3)))
  for name, leaf in as_leaves(found).items():
    np.testing.assert_array_equal(leaf, want[name], err_msg=name)
  places = trees.flatten(sharding.shardings_for(target, mesh))
  for name, leaf in trees.flatten(found).items():
    assert leaf.sharding.is_equivalent_to(places[name], leaf.ndim), name


def test_arrays_are_as_they_are_and_compressed_steps_open(tmp_path):
  """Compressing costs more than the disk; steps of before have it."""
  state = {'w': jnp.zeros((512, 512))}
  kept = Checkpoints(tmp_path)
  kept.save(1, state, {})
  kept.close()
  folder = tmp_path / '00000001'

  def files():
    return [p for p in folder.rglob('*') if p.is_file()]

  def size():
    return sum(p.stat().st_size for p in files())

  assert size() > state['w'].nbytes
  (folder / HASHES).unlink()
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
    arrays = ocp.args.PyTreeSave(state)
    writer.save(folder / 'state', args=arrays, force=True)
  assert size() < state['w'].nbytes / 9
  hashes = {
    str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
    for p in files()
  }
  (folder / HASHES).write_text(json.dumps(hashes))
  place = state['w'].sharding
  target = {'w': jax.ShapeDtypeStruct((512, 512), 'float32', sharding=place)}
  assert not np.asarray(kept.restore(kept.latest(), target)['w']).any()


def test_another_model_is_named(kept):
  other = pieces.planned(KIND, model=tiny.model(KIND, num_codes=32)).spec
  target, _ = state_lib.state_shapes(other, sharding.make_mesh('dp'))
  with pytest.raises(UserError, match='fit the model: codebook/quantizer'):
    kept.restore(kept.latest(), target)


def test_saving_does_not_wait_and_does_not_see_later_steps(tmp_path):
  """The copy is of the moment, though the state is donated right after."""
  kept = Checkpoints(tmp_path / 'checkpoints')
  values = {'w': jnp.zeros((512, 512))}
  add = jax.jit(lambda t: {'w': t['w'] + 1}, donate_argnums=0)
  for step in range(3):
    kept.save(step, values, {})
    for _ in range(20):
      values = add(values)
    jax.block_until_ready(values)
    kept.wait()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {'w': jax.ShapeDtypeStruct((512, 512), 'float32', sharding=place)}
    found = kept.restore(kept.latest(), target)
    assert (np.asarray(found['w']) == 20 * step).all()
  kept.close()


FULL_DISK = """
import resource
import jax.numpy as jnp, numpy as np
from vqrae_jax import cli
from vqrae_jax.train.checkpoint import Checkpoints

def main(argv):
  kept = Checkpoints(argv[0])
  state = {'w': jnp.asarray(np.random.default_rng(0).random((99, 99)))}
  kept.save(1, state, {})
  kept.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
  try:
    kept.save(2, state, {})
    kept.wait()
  finally:
    kept.close()

cli.run(main)
"""


def test_a_full_disk_is_one_line(tmp_path):
  process = runs.python(FULL_DISK, 1, tmp_path / 'x')
  info, error = process.communicate(timeout=900)[1].splitlines()
  assert process.returncode == 1  # a scheduler may start it again
  assert 'checkpoint 1 is written' in info
  assert error.startswith('error: a checkpoint could not be written')
  assert 'too large' in error


def test_a_url_without_its_library_is_one_line():
  # Not gs://: etils keeps the stand-in that another test registers for the
  # rest of the process, also where fsspec's registry is put back.
  with pytest.raises(UserError, match='s3://.*s3fs'):
    initialize.reachable('s3://bucket/run', '--workdir')
