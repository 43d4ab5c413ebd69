"""What a run takes on devices that need not be there; nothing is run."""

import json
import math
import types

import jax
import pytest
from jax.experimental import topologies

from tests import runs, tiny
from tests.train import pieces
from vqrae_jax import preflight, programs, sharding
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.train import state as state_lib

SMALL = dict(batch_size=16, data=dict(source='FOLDER', image_size=16))
# Its discriminator computes in f32 where the run says bf16.
F32 = pieces.DINO | dict(
  fields=pieces.DINO['fields']
  | dict(vit=pieces.DINO['fields']['vit'] | dict(dtype='float32'))
)
CONFIG = SMALL | dict(
  model=tiny.model('simvq-l2', dtype='bfloat16'),
  mesh=dict(layout='fsdp'),
  losses=tiny.LOSSES['simvq-l2'] | dict(gan=dict(weight=0.5)),
  discriminator=F32,
  schedules=(('encoder/.*', None), ('.*', dict(lr=1e-3))),
  accumulate=2,
)


def write(folder, config):
  file = folder / 'mine.py'
  file.write_text(f'def get_config(): return {config!r}\n')
  return f'--config={file}'


@pytest.fixture(scope='module')
def planned(tmp_path_factory):
  """(the report in its file, what was printed) of `CONFIG` on 8 devices."""
  folder = tmp_path_factory.mktemp('preflight')
  out = folder / 'report.json'
  printed = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('builtins.print', lambda *words, **_: printed.append(words))
    argv = [write(folder, tiny.run('simvq-l2', **CONFIG)), '--mesh=8']
    preflight.main([*argv, f'--json={out}'])
  return json.loads(out.read_text()), printed


def test_the_file_is_the_report(planned):
  report, printed = planned
  assert (preflight.text_of(report),) in printed
  assert report['mesh'] == dict(data=1, fsdp=8, model=1)
  assert report['batch'] == dict(size=16, device=2, accumulate=2, microbatch=1)
  assert report['fits'] and 'stand in' in report['data']
  assert '--mesh=8' in report['command'] and report['versions']['jax']
  assert report['encode']['images'] == 8
  assert report['encode']['name'] == 'encode_to_indices'


def test_memory_by_kind_is_the_states_own(planned):
  """Each leaf whole, or an eighth of it where the mesh shards it."""
  memory = planned[0]['train_step']['memory']
  plan = pieces.planned('simvq-l2', **CONFIG)
  mesh = sharding.make_mesh('fsdp')

  def size(tree):
    total = 0
    for leaf in trees.flatten(tree).values():
      parts = 8 if 'fsdp' in leaf.sharding.spec else 1
      total += math.prod(leaf.shape) * leaf.dtype.itemsize // parts
    return total

  state, frozen = state_lib.state_shapes(plan.spec, mesh)
  assert memory['parameters'] == size(state.tokenizer.params)
  assert memory['moments'] == size(state.tokenizer.opt_state)
  assert memory['EMA weights'] == memory['parameters']
  assert memory['frozen'] == size(frozen.params)
  assert memory['codebook'] == size(state.codebook) > 0
  assert memory['discriminator'] == size(
    [state.discriminator, frozen.discriminator]
  )
  assert memory['usage window'] == size(state.usage)
  assert memory['batch'] == 2 * 16 * 16 * 3
  # The step's numbers, its counter, its key; nothing is padded on a CPU.
  assert 0 <= memory['padding, scalars'] < 1024
  assert memory['temporaries'] > 0
  step = planned[0]['train_step']
  assert step['needs'] == sum(memory.values())


def test_what_the_mesh_and_the_dtype_cost(planned):
  step = planned[0]['train_step']
  gathered = step['collectives']['all-gather']
  assert gathered['count'] > 0 and gathered['bytes'] > 8 * 1024
  assert step['collectives']['all-reduce']['count'] > 0
  assert step['buffers'][0]['bytes'] >= step['buffers'][-1]['bytes'] > 0
  f32 = step['f32_products']
  strays = {row['where'].split('/')[0] for row in f32 if not row['meant']}
  assert 'DinoDiscriminator' in strays
  assert {'quantizers/simvq.py', 'ops/nearest.py'} <= {
    row['file'] for row in f32 if row['meant']
  }
  whole = step['replicated']
  assert whole['leaves'] > 5 and len(whole['largest']) == 5
  assert step['flops'] > 10 * planned[0]['encode']['flops'] > 0


def test_the_accumulation_that_fits_is_found(tmp_path, monkeypatch, capsys):
  photos, out = runs.images(tmp_path / 'photos'), tmp_path / 'report.json'
  # Large enough for activations to outweigh the sum of gradients.
  data = dict(source=str(photos), image_size=64)
  model = tiny.model('fsq-centered', depth=1)
  config = tiny.run('fsq-centered', **SMALL | dict(data=data, model=model))
  argv = [write(tmp_path, config), '--mesh=8', '--search']
  monkeypatch.setitem(preflight.HBM, 'cpu', 1e-4)
  with pytest.raises(UserError, match=r'of 0\.00 GiB.*accumulate=2'):
    preflight.main([*argv, f'--json={out}'])
  printed = capsys.readouterr().out
  assert 'accumulate=1 needs' in printed and 'does not fit' in printed
  report = json.loads(out.read_text())
  tried = report['tried']
  assert not report['fits'] and tried['2'] < tried['1']
  assert '4 images' in report['data']
  between = (tried['1'] + tried['2']) / 2 / preflight.GIB
  monkeypatch.setitem(preflight.HBM, 'cpu', between)
  preflight.main(argv)
  printed = capsys.readouterr().out
  assert 'fits' in printed and 'accumulate=2, 1 images' in printed


@pytest.mark.parametrize(
  'keys, flags, words',
  [
    (dict(mesh=dict(layout='fsdq')), ['--mesh=8'], '"fsdp"'),
    (dict(batch_size=12), ['--mesh=8'], 'batch_size=12'),
    (dict(losses=dict(l3=1.0)), ['--mesh=8'], 'l3'),
    (dict(data=dict(source='nowhere', image_size=16)), [], 'data.examples'),
    (
      dict(
        data=dict(source='bundled:photos', image_size=16),
        eval=dict(source='nowhere'),
      ),
      [],
      r'"nowhere".*--config.eval.source, .include, .exclude\)$',
    ),
    ({}, ['--mesh=8', '--topology=v5e:2x2'], '--topology'),
    ({}, ['--mesh=9000'], '--mesh=9000'),
    ({}, ['--topology=h900:8'], 'h900:8 must be as v5e:8x8'),
    ({}, ['--topology=h100:0x8'], 'h100:4x8'),
    ({}, ['--json=report.txt'], '--json'),
  ],
)
def test_errors_are_lines(keys, flags, words, tmp_path):
  jax.devices()  # else as many as --mesh says are made
  flag = write(tmp_path, tiny.run(**SMALL | keys))
  with pytest.raises(UserError, match=words) as error:
    preflight.main([flag, *flags])
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'topology, raised, needed',
  [
    ('v5e:2x2', RuntimeError, 'pip install libtpu'),
    ('h100:4x8', NotImplementedError, 'cuda12'),
  ],
)
def test_a_missing_compiler_is_named(
  topology, raised, needed, tmp_path, monkeypatch
):
  def missing(*_, **__):
    raise raised('no such platform')

  monkeypatch.setattr(topologies, 'get_topology_desc', missing)
  with pytest.raises(UserError, match=needed):
    preflight.main([write(tmp_path, tiny.run(**SMALL)), '--topology', topology])


def test_data_may_be_elsewhere():
  """Its length is then the config's."""
  data = dict(source='nowhere', image_size=16, examples=64)
  config = tiny.run(data=data, model=tiny.model(depth=1), duration='1 epochs')
  found = preflight.preflight(config, jax.devices()[:1])['data']
  assert '64 images' in found and 'nowhere' in found
  config['data'] |= dict(source='bundled:photos')
  config['eval'] = dict(source='elsewhere')  # the held-out images alone
  found = preflight.preflight(config, jax.devices()[:1])['data']
  assert 'bundled:photos' in found and 'elsewhere' in found


def test_a_gpus_share_of_memory(monkeypatch):
  name, kind = 'XLA_CLIENT_MEM_FRACTION', preflight.GPUS['h100'][0]
  gpu = types.SimpleNamespace(
    platform='gpu', device_kind=kind, memory_stats=lambda: None
  )
  monkeypatch.setenv(name, '.5')
  half = preflight.memory_limit(gpu)
  monkeypatch.delenv(name)
  assert half == pytest.approx(preflight.memory_limit(gpu) / 1.5)
  for word in ('half', 'nan', 'inf', '-1'):
    monkeypatch.setenv(name, word)
    with pytest.raises(UserError, match=f'{name}={word}'):
      preflight.memory_limit(gpu)


@pytest.mark.slow
@pytest.mark.usefixtures('v5e')
def test_a_tpu_that_is_not_there(capsys):
  """The quick-start compiles for four chips, and the table of memory is the
  compiler's."""
  preflight.main(['--config=configs/quickstart.py', '--topology=v5e:2x2'])
  out = capsys.readouterr().out
  assert '4 × TPU v5 lite' in out and 'of 15.75 GiB' in out
  assert 'all-reduce' in out and 'libtpu' in out
  # Two devices side by side on a torus of 4x4x4.
  pod = topologies.get_topology_desc('v5p:4x4x4', 'tpu').devices
  mesh = sharding.make_mesh('fsdp+tp', pod, 2)
  sharding.check_batch(64, mesh)
  with pytest.raises(UserError, match='mesh.tensor=4'):
    sharding.check_batch(64, sharding.make_mesh('fsdp+tp', pod, 4))
  with pytest.raises(UserError, match='--topology=v5e:3x5'):
    preflight.main(['--config=configs/quickstart.py', '--topology=v5e:3x5'])


@pytest.mark.slow
@pytest.mark.usefixtures('h100')
def test_gpus_that_are_not_there(tmp_path, capsys, monkeypatch):
  """A step in bf16 for 16 GPUs of two hosts; attention is cuDNN's."""
  texts, executed = [], programs.executed
  monkeypatch.setattr(
    programs, 'executed', lambda text: texts.append(text) or executed(text)
  )
  config = tiny.run('simvq-l2', **CONFIG | dict(batch_size=32))
  preflight.main([write(tmp_path, config), '--topology=h100:2x8'])
  out = capsys.readouterr().out
  assert '16 × NVIDIA H100 80GB HBM3 of 2 host(s)' in out
  assert 'of 59.32 GiB' in out and 'all-gather' in out
  assert all('__cudnn$fmhaSoftmax' in text for text in texts) and texts
