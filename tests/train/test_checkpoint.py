"""A checkpoint is whole or not used, and opens on any mesh."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vqrae_jax import sharding
from vqrae_jax.errors import UserError
from vqrae_jax.models.tokenizer import build_tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train.checkpoint import Checkpoints

KIND = 'vq-ema'


@pytest.fixture(scope='module')
def plan():
  spec = config_lib.read_config(tiny.run(KIND))
  return state_lib.make_plan(spec, build_tokenizer(spec.model), 1)


@pytest.fixture(scope='module')
def state(plan):
  mesh = sharding.make_mesh('fsdp+tp', tensor=2)
  with jax.set_mesh(mesh):
    state, _ = state_lib.init_state(plan, mesh, 3)
  # Every leaf distinct, the optimizer's zeros too.
  return jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, state)


def host(tree):
  leaves = trees.flatten(tree)
  leaves['rng'] = jax.random.key_data(leaves['rng'])
  return {n: np.asarray(x) for n, x in leaves.items()}


@pytest.fixture
def kept(tmp_path, state):
  kept = Checkpoints(tmp_path / 'checkpoints', keep=2)
  for step in (1, 2, 3):
    kept.save(step, state.replace(step=jnp.int32(step)), {'says': step})
  kept.close()
  return kept


def damaged(kept, step, how):
  """Does to a step's files what disks do."""
  folder = kept._folder
  files = [p for p in (folder / f'{step:08d}').rglob('*') if p.is_file()]
  data = max(files, key=lambda p: p.stat().st_size)
  manifest = folder / f'{step:08d}.json'
  match how:
    case 'a flipped bit':
      raw = bytearray(data.read_bytes())
      raw[len(raw) // 2] ^= 1
      data.write_bytes(raw)
    case 'a truncated file':
      data.write_bytes(data.read_bytes()[:-100])
    case 'a missing file':
      (folder / f'{step:08d}' / 'commit_success.txt').unlink()
    case 'an empty folder':
      for path in files:
        path.unlink()
    case 'no folder':
      shutil.rmtree(folder / f'{step:08d}')
    case 'a torn manifest':
      manifest.write_text(manifest.read_text()[:50])
    case 'a strange manifest':
      manifest.write_text('[1, 2]')
    case 'a manifest of tomorrow':
      told = json.loads(manifest.read_text()) | {'version': 99}
      manifest.write_text(json.dumps(told))
    case 'a flipped digit':
      told = json.loads(manifest.read_text()) | {'says': step + 8}
      manifest.write_text(json.dumps(told))
    case 'an empty manifest':
      manifest.write_text('')


DAMAGES = (
  'a flipped bit', 'a truncated file', 'a missing file', 'an empty folder',
  'no folder', 'a torn manifest', 'a strange manifest',
  'a manifest of tomorrow', 'an empty manifest',
  'a flipped digit',
)  # fmt: skip


def test_the_newest_two_are_kept(kept, tmp_path):
  assert kept.steps() == [2, 3]
  names = {p.name for p in (tmp_path / 'checkpoints').iterdir()}
  assert names == {'00000002', '00000002.json', '00000003', '00000003.json'}
  assert kept.latest()['says'] == 3


@pytest.mark.parametrize('how', DAMAGES)
def test_damage_falls_back_to_the_step_before(kept, how, caplog):
  damaged(kept, 3, how)
  assert kept.latest()['step'] == 2
  assert 'checkpoint 3 is not used' in caplog.text


def test_none_whole_is_an_error(kept):
  damaged(kept, 3, 'a flipped bit')
  damaged(kept, 2, 'an empty folder')
  with pytest.raises(UserError, match='is whole .*step 3: .*changed since'):
    kept.latest()


def test_a_folder_without_manifest_is_no_step(kept, tmp_path):
  (tmp_path / 'checkpoints' / '00000009').mkdir()
  (tmp_path / 'checkpoints' / '00000007.orbax-checkpoint-tmp-1').mkdir()
  assert kept.latest()['step'] == 3
  kept.begin_from(2)
  names = {p.name for p in (tmp_path / 'checkpoints').iterdir()}
  assert names == {'00000002', '00000002.json'}
  assert Checkpoints(tmp_path / 'nowhere').latest() is None


def test_folders_of_others_are_never_removed(kept, tmp_path):
  folder = tmp_path / 'checkpoints'
  for name in ('best', 'epoch-3', '3', '00000003.mine'):
    shutil.copytree(folder / '00000003', folder / name)
  shutil.copy(folder / '00000003.json', folder / '3.json')
  assert kept.steps() == [2, 3]
  kept.begin_from(2)
  left = {p.name for p in folder.iterdir()}
  assert left == {
    '00000002', '00000002.json', 'best', 'epoch-3', '3', '3.json',
    '00000003.mine',
  }  # fmt: skip


@pytest.mark.parametrize(
  'devices, layout, tensor',
  [(1, 'dp', 1), (2, 'fsdp', 1), (4, 'fsdp+tp', 2), (8, 'dp', 1)],
)
def test_a_state_of_8_devices_opens_on_fewer(
  kept, plan, state, devices, layout, tensor
):
  mesh = sharding.make_mesh(layout, jax.devices()[:devices], tensor)
  target, _ = state_lib.abstract_state(plan, mesh)
  found = kept.restore(kept.latest(), target)
  want = host(state.replace(step=jnp.int32(3)))
  for name, leaf in host(found).items():
    np.testing.assert_array_equal(leaf, want[name], err_msg=name)
  places = trees.flatten(sharding.shardings_for(target, mesh))
  for name, leaf in trees.flatten(found).items():
    assert leaf.sharding.is_equivalent_to(places[name], leaf.ndim), name


def test_another_model_is_named(kept):
  spec = config_lib.read_config(
    tiny.run(KIND, model=tiny.model(KIND, num_codes=32))
  )
  other = state_lib.make_plan(spec, build_tokenizer(spec.model), 1)
  target, _ = state_lib.abstract_state(other, sharding.make_mesh('dp'))
  with pytest.raises(
    UserError, match=r'does not fit the model: codebook/quantizer/codes is'
  ):
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


def test_a_disk_that_cannot_be_written_is_named(tmp_path, state, monkeypatch):
  kept = Checkpoints(tmp_path / 'checkpoints')

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('vqrae_jax.train.checkpoint._files', full)
  kept.save(1, {'w': jnp.ones(3)}, {})
  with pytest.raises(UserError, match='could not be written .*No space left'):
    kept.wait()
  assert kept.steps() == []
  kept.close()
