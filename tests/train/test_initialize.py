"""A run starts from another's weights, all of them, or says why not."""

import json
import shutil

import jax
import numpy as np
import pytest

import vqrae_jax
from tests import tiny
from vqrae_jax import sharding
from vqrae_jax.errors import UserError
from vqrae_jax.losses.latent import distill
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import rae
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import initialize, loop
from vqrae_jax.train import setup as setup_lib
from vqrae_jax.types import LatentInputs, QuantizerOutput, TokenizerOutput

pytestmark = pytest.mark.usefixtures('one_device')

OPEN = (('.*', dict(lr=1e-3)),)
FAST = (('.*', dict(lr=3e-3)),)
TERMS = tiny.LOSSES['simvq-l2']
TAUGHT = TERMS | dict(distill=dict(weight=1.0, target='teacher'))


def setup(config, mesh=None):
  return setup_lib.setup(config_lib.read_config(config), mesh)


def started(config, mesh=None):
  """The run's state at step 0 (`initialize.Started`)."""
  made = setup(config, mesh)
  with jax.set_mesh(made.mesh):
    return initialize.initialize(made)


def leaves(start):
  """{leaf name: numpy} of the tokenizer's variables."""
  params = start.state.tokenizer.params | start.frozen.params
  tables = trees.flatten(start.state.codebook)
  return {n: np.array(x) for n, x in {**params, **tables}.items()}


def exported(workdir):
  """{leaf name: numpy} of a run's tokenizer."""
  _, variables = vqrae_jax.load_tokenizer(workdir / 'tokenizer')
  found = trees.flatten(variables['params'])
  found |= trees.flatten(variables.get('codebook', {}))
  return {n: np.asarray(x) for n, x in found.items()}


def same(found, want, names=None):
  for name in want if names is None else names:
    np.testing.assert_array_equal(found[name], want[name], err_msg=name)


@pytest.mark.parametrize('what', ('run', 'tokenizer'))
@pytest.mark.parametrize('kind', ('vq-ema', 'simvq-l2'))
def test_all_leaves_are_loaded(
  kind, what, vq_run, simvq_run, run_config, simvq_config
):
  workdir = vq_run if kind == 'vq-ema' else simvq_run
  path = workdir if what == 'run' else workdir / 'tokenizer'
  make = run_config if kind == 'vq-ema' else simvq_config
  start = started(make(init_from=str(path)))
  found, want = leaves(start), exported(workdir)
  same(found, want, [n for n in found if not n.endswith(('counts', 'sums'))])
  same(start.state.ema, want, start.state.ema)
  assert int(start.state.step) == 0
  if kind == 'vq-ema':
    fresh = (found['quantizer/counts'] == 1).all()
    assert fresh == (what == 'tokenizer')


def test_an_unfinished_run_will_do_and_the_log_says_so(
  simvq_run, simvq_config, tmp_path, log
):
  want = leaves(started(simvq_config(init_from=str(simvq_run))))
  assert not any('not finished' in line for line in log['warning'])
  (line,) = [s for s in log['info'] if s.startswith('initialized with')]
  assert f'step 2 of {simvq_run}' in line
  run = shutil.copytree(simvq_run, tmp_path / 'run')
  shutil.rmtree(run / 'tokenizer')
  for figures in (None, dict(steps=1)):  # as a lengthened run has it
    (run / 'summary.json').unlink()
    if figures:
      (run / 'summary.json').write_text(json.dumps(figures))
    same(leaves(started(simvq_config(init_from=str(run)))), want)
    assert 'not finished' in log['warning'][-1]
    (run / 'summary.json').touch()
  with pytest.raises(UserError, match='init.encoder=.*tokenizer/'):
    started(simvq_config(init=dict(encoder=str(run))))


def test_runs_that_froze_nothing_need_none_before_them(
  vq_run, run_config, tmp_path
):
  """A run that trained all of itself stands alone; one that did not says
  what it misses."""
  first = shutil.copytree(vq_run, tmp_path / 'first')
  again = dict(init_from=str(first))
  loop.train(run_config(schedules=OPEN, **again), tmp_path / 'open')
  loop.train(run_config(**again), tmp_path / 'frozen')
  loop.train(run_config(**again, duration=3), tmp_path / 'frozen')  # resumes
  same(
    leaves(started(run_config(init_from=str(tmp_path / 'frozen')))),
    exported(tmp_path / 'frozen'),
    ['decoder/head/kernel', 'encoder/embed/positions', 'quantizer/codes'],
  )
  first.rename(tmp_path / 'gone')
  started(run_config(init_from=str(tmp_path / 'open')))
  with pytest.raises(UserError, match='init_from=.*frozen.*first'):
    started(run_config(init_from=str(tmp_path / 'frozen')))


def test_by_schedules_alone_everything_but_the_decoder_keeps_its_bits(
  vq_run, run_config, tmp_path
):
  rows = (('decoder/.*', dict(lr=1e-3)), ('.*', None))
  child = run_config(schedules=rows, init_from=str(vq_run), losses=dict(l2=1.0))
  before = leaves(started(child))
  loop.train(child, tmp_path)
  after = exported(tmp_path)
  for name in before.keys() & after.keys():
    moved = before[name].tobytes() != after[name].tobytes()
    assert moved == name.startswith('decoder/'), name


def test_a_published_decoder(run_config, tmp_path):
  """`rae:FILE` fills the decoder and nothing else."""
  torch = pytest.importorskip('torch')
  tokenizer, variables = tiny.built(tiny.model('vq-ema'), seed=7)
  want = jax.tree.map(np.asarray, variables['params']['decoder'])
  state = rae.export_rae_decoder(want, tokenizer.decoder_spec)
  state = {k: torch.from_numpy(np.array(v)) for k, v in state.items()}
  torch.save(state, tmp_path / 'model.pt')
  init = dict(decoder=f'rae:{tmp_path}/model.pt')
  found, plain = (
    leaves(started(run_config(init=init))),
    leaves(started(run_config())),
  )
  for name, leaf in found.items():
    if name.startswith('decoder/'):
      theirs = trees.flatten(want)[name.removeprefix('decoder/')]
      np.testing.assert_array_equal(leaf, theirs, err_msg=name)
    elif not name.startswith('quantizer/'):  # its codes start at the data
      np.testing.assert_array_equal(leaf, plain[name], err_msg=name)
  wide = tiny.model('vq-ema')
  wide['decoder'] = dict(vit=tiny.VIT | tiny.DECODER | dict(width=64))
  with pytest.raises(UserError, match='model'):
    started(run_config(init=init, model=wide))


def test_the_encoder_of_another_run(vq_run, simvq_config, tmp_path):
  """Whatever its quantizer; a run that started so is one to start from."""
  want = {n: x for n, x in exported(vq_run).items() if n.startswith('encoder/')}
  fresh = leaves(started(simvq_config()))
  rows = (('encoder/.*', None), *OPEN)
  for place in (vq_run, vq_run / 'tokenizer'):
    child = simvq_config(init=dict(encoder=str(place)), schedules=rows)
    found = leaves(started(child))
    same(found, want)
    same(found, fresh, ['decoder/head/kernel'])
  loop.train(child, tmp_path / 'second')
  grandchild = simvq_config(init_from=str(tmp_path / 'second'))
  same(leaves(started(grandchild)), want)
  model = tiny.model('simvq-l2')
  model['encoder'] = dict(vit=tiny.VIT | dict(act='gelu_tanh'))
  with pytest.raises(UserError, match=r'init.encoder=.*vit\.act'):
    started(child | dict(model=model))


def test_a_published_encoder(run_config, tmp_path):
  """A folder fills the encoder; manifests name it; the run resumes; another
  encoder in its place is noticed."""
  pytest.importorskip('torch')
  from tests.encoders import references

  sizes = dict(width=32, depth=2, heads=4, mlp=48, pixels=16, patch=4)
  folder = tmp_path / 'siglip'
  references.make('siglip', **sizes).save_pretrained(folder)
  model = tiny.model('vq-ema')
  vit = tiny.VIT | dict(act='gelu_tanh')
  model['encoder'] = dict(vit=vit, output_norm='plain')
  child = run_config(init=dict(encoder=str(folder)), model=model)
  _, variables = vqrae_jax.load_encoder(str(folder), 'plain')
  want = {
    f'encoder/{n}': x for n, x in trees.flatten(variables['params']).items()
  }
  start = started(child)
  same(leaves(start), want)
  assert start.record['params']['source'] == str(folder)
  loop.train(child, tmp_path / 'run')
  loop.train(child | dict(duration=3), tmp_path / 'run')
  grandchild = run_config(model=model, init_from=str(tmp_path / 'run'))
  same(leaves(started(grandchild)), want)
  other = dict(model, encoder=dict(vit=tiny.VIT))
  with pytest.raises(UserError, match='vit.act'):
    started(run_config(init=dict(encoder=str(folder)), model=other))
  references.make('siglip', 1, **sizes).save_pretrained(folder)
  with pytest.raises(UserError, match='"params".*siglip'):
    loop.train(child | dict(duration=4), tmp_path / 'run')


@pytest.mark.parametrize(
  'model, key',
  [
    (tiny.model('simvq-cosine'), 'quantizer.distance'),
    (tiny.model('simvq-l2', depth=3), 'decoder.vit.depth'),
    (tiny.model('vq-ema'), 'quantizer.name'),
  ],
)
def test_another_model_is_refused_before_a_program_compiles(
  model, key, simvq_config, simvq_run, programs
):
  """Equal shapes do not make it the same: codes would be chosen otherwise."""
  losses = dict(l2=1.0, commit=0.25)
  if model['quantizer']['name'] == 'simvq':
    losses['codebook'] = 1.0
  for path in (simvq_run, simvq_run / 'tokenizer'):
    made = setup(simvq_config(model=model, losses=losses, init_from=str(path)))
    known = programs()
    with jax.set_mesh(made.mesh), pytest.raises(UserError, match=key) as e:
      initialize.initialize(made)
    assert str(path) in str(e.value) and '\n' not in str(e.value)
    assert programs() == known
  only_training = tiny.model('simvq-l2', basis_init='normal')
  started(simvq_config(model=only_training, init_from=str(simvq_run)))


def test_a_run_needs_the_files_of_its_frozen_parts_only(
  simvq_run, simvq_config, tmp_path
):
  """It resumes, and others start from it, without the encoder that it started
  from and trains."""
  encoder = shutil.copytree(simvq_run / 'tokenizer', tmp_path / 'encoder')
  config = simvq_config(
    init=dict(encoder=str(encoder)),
    schedules=(('decoder/.*', None), *OPEN),
  )
  loop.train(config, tmp_path / 'run')
  shutil.rmtree(encoder)
  loop.train(config | dict(duration=3), tmp_path / 'run')
  assert leaves(started(simvq_config(init_from=str(tmp_path / 'run'))))


def test_a_child_resumes_without_its_parent(
  simvq_run, simvq_config, tmp_path, log
):
  """Unless a frozen tree came from there; then the line says what is gone."""
  parent = shutil.copytree(simvq_run, tmp_path / 'parent')
  free = simvq_config(init_from=str(parent))
  held = simvq_config(init_from=str(parent), teacher='init', losses=TAUGHT)
  for name, config in (('free', free), ('held', held)):
    loop.train(config, tmp_path / name)
  (line,) = [s for s in log['info'] if 'the teacher is' in s]
  assert f'the teacher is the encoder of {parent}' in line
  shutil.rmtree(parent)
  figures = loop.train(free | dict(duration=4), tmp_path / 'free')
  assert figures['steps'] == 4
  with pytest.raises(UserError, match='parent'):
    loop.train(held | dict(duration=4), tmp_path / 'held')


@pytest.mark.parametrize('layout, devices', (('fsdp', 8), ('fsdp+tp', 4)))
def test_onto_any_mesh(layout, devices, simvq_run, simvq_config):
  """A run on one device starts another on many, its teacher laid over them;
  the manifest says which step the teacher is of."""
  mesh = sharding.make_mesh(
    layout, jax.devices()[:devices], 2 if layout == 'fsdp+tp' else 1
  )
  start = started(
    simvq_config(init_from=str(simvq_run), teacher='init', losses=TAUGHT),
    mesh,
  )
  want, teacher = exported(simvq_run), trees.flatten(start.frozen.teacher)
  for name, leaf in start.state.tokenizer.params.items():
    np.testing.assert_array_equal(leaf, want[name], err_msg=name)
    assert start.state.ema[name].sharding == leaf.sharding
    if name.startswith('encoder/'):
      assert teacher[name].sharding == leaf.sharding, name
      np.testing.assert_array_equal(teacher[name], leaf, err_msg=name)
  spread = [n for n, x in teacher.items() if not x.sharding.is_fully_replicated]
  assert any('transformer' in name for name in spread)
  assert start.record['teacher']['source'] == str(simvq_run)
  assert start.record['teacher']['revision'] == 'step 2'


# -- distillation ------------------------------------------------------------
def drift(workdir, parent):
  """Mean squared distance of the latents from those of the parent."""
  images = tiny.images(8)
  sides = []
  for folder in (workdir, parent):
    tokenizer, variables = vqrae_jax.load_tokenizer(folder / 'tokenizer')
    sides.append(tokenizer.apply(variables, images, method='encode'))
  return float(np.mean((np.asarray(sides[0]) - np.asarray(sides[1])) ** 2))


def test_the_encoder_moves_and_the_teacher_holds_it(
  simvq_run, simvq_config, tmp_path
):
  second = dict(
    init_from=str(simvq_run), duration=12, ema=1e-9, schedules=FAST,
    checkpoint=dict(every=12),
  )  # fmt: skip
  free = simvq_config(**second)
  taught = simvq_config(**second, losses=TAUGHT, teacher='init')
  loop.train(free, tmp_path / 'free')
  loop.train(taught, tmp_path / 'taught')
  before, after = exported(simvq_run), exported(tmp_path / 'taught')
  names = [n for n in before if n.startswith('encoder/')]
  assert all((after[n] != before[n]).any() for n in names)
  free, held = (drift(tmp_path / n, simvq_run) for n in ('free', 'taught'))
  assert held < free / 2, (held, free)
  assert 'loss/distill' in (tmp_path / 'taught/metrics.jsonl').read_text()


def test_the_teacher_is_the_encoder_that_init_from_gives(
  simvq_run, simvq_config
):
  config = simvq_config(
    init_from=str(simvq_run), losses=TAUGHT, teacher='init', duration=12
  )
  made = setup(config)
  with jax.set_mesh(made.mesh):
    start = initialize.initialize(made)
    params = start.state.tokenizer.params
    teacher = trees.flatten(start.frozen.teacher)
    assert set(teacher) == {n for n in params if n.startswith('encoder')}
    before = jax.device_get(teacher)
    same(params, before)
    state, losses = start.state, []
    for _ in range(2):
      batch = made.place(made.batches.batch(0))
      state, metrics = made.train_step()(
        state, start.frozen, setup_lib.f32(made.hparams), batch
      )
      losses.append(float(metrics['loss/distill']))
  # The first step's latents are the teacher's.
  assert losses[0] < 1e-10 < losses[1]
  same(trees.flatten(start.frozen.teacher), before)


def test_both_targets_by_hand():
  rng = np.random.default_rng(0)
  latents, z_q, teacher = rng.normal(size=(3, 2, 4, 4, 5)).astype(np.float32)
  quantized = QuantizerOutput(z_q, z_q, None, {}, {}, quantized=z_q)
  images = np.zeros((2, 16, 16, 3), np.float32)
  out = TokenizerOutput(images, latents, quantized, images[:, :, 0])
  want = ((latents - teacher) ** 2).mean()
  np.testing.assert_allclose(distill(LatentInputs(out, teacher)), want, 1e-6)
  want = ((z_q - latents) ** 2).mean()
  np.testing.assert_allclose(distill(LatentInputs(out)), want, 1e-6)
  # "self" pulls the codes to the latents, not the latents to the codes.
  pull = jax.grad(lambda x: distill(LatentInputs(out.replace(latents=x))))
  assert not np.asarray(pull(latents)).any()


@pytest.mark.parametrize('kind', ('simvq-l2', 'vq-gradient', 'fsq-cosmos'))
def test_self_moves_codes_and_the_way_back_from_them_alone(kind):
  """Straight through it would push tokens from their codes."""
  tokenizer, variables = tiny.built(tiny.model(kind))
  images = tiny.images(2)

  def loss(params):
    out = tokenizer.apply(variables | {'params': params}, images, train=True)
    return distill(LatentInputs(out))

  found = jax.jit(jax.grad(loss))(variables['params'])
  moved = {n for n, g in trees.flatten(found).items() if np.asarray(g).any()}
  assert moved and all(n.startswith('quantizer/') for n in moved)
  assert not any(n.startswith('quantizer/project_in') for n in moved)
  if kind == 'simvq-l2':
    assert {'quantizer/kernel', 'quantizer/project_out/kernel'} <= moved


# -- statistics of latents ---------------------------------------------------
NORMS = {
  'channel': (dict(norm='channel'), (32,)),
  'position': (dict(norm='position', grid=(4, 4)), (32, 4, 4)),
}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """{norm: a file of statistics}, by position in RAE's layout."""
  folder = tmp_path_factory.mktemp('stats')
  rng = np.random.default_rng(0)
  for norm, (_, shape) in NORMS.items():
    stats = dict(mean=rng.normal(size=shape), var=rng.uniform(0.5, 2, shape))
    np.savez(folder / f'{norm}.npz', **stats)
  return {norm: str(folder / f'{norm}.npz') for norm in NORMS}


def normed(run_config, norm, **keys):
  model = tiny.model('vq-ema') | dict(latents=NORMS[norm][0])
  return run_config(model=model, **keys)


def statistics(path):
  with np.load(path) as stats:
    mean, std = stats['mean'], np.sqrt(stats['var'] + 1e-5)
  if mean.ndim == 3:
    mean, std = np.moveaxis(mean, 0, -1), np.moveaxis(std, 0, -1)
  return {'latents/mean': mean.astype('f4'), 'latents/std': std.astype('f4')}


def test_statistics_stay_through_runs(run_config, files, tmp_path):
  """Training leaves them; `init_from` and checkpoints bring them along,
  whether or not their file is still there."""
  path = shutil.copy(files['channel'], tmp_path / 'stats.npz')
  want = statistics(path)
  config = normed(run_config, 'channel', init=dict(latents=str(path)))
  run = tmp_path / 'run'
  loop.train(config | dict(duration=1), run)
  same(exported(run), want)
  path.unlink()
  with pytest.raises(UserError, match='init.latents=.*stats.npz'):
    loop.train(config, tmp_path / 'new')
  loop.train(config, run)
  same(exported(run), want)
  for source in (run, run / 'tokenizer'):
    child = normed(run_config, 'channel', init_from=str(source))
    same(leaves(started(child)), want)


def test_statistics_by_position(files):
  model = tiny.model('vq-ema') | dict(latents=NORMS['position'][0])
  tokenizer = vqrae_jax.build_tokenizer(model)
  found = initialize.latents_from(tokenizer, files['position']).leaves
  want = statistics(files['position'])
  same(found, {f'codebook/{name}': x for name, x in want.items()})


def test_a_codebook_starts_at_normalised_tokens(run_config, files):
  """`init.latents` is no codebook: the quantizer's starts at the data."""
  config = normed(run_config, 'channel', init=dict(latents=files['channel']))
  start, made = started(config), setup(config)
  stats = statistics(files['channel'])
  assert start.record['params']['source'] == 'seed 0'
  params = trees.merge(start.state.tokenizer.params, start.frozen.params)
  latents = made.tokenizer.apply(
    {'params': params}, made.batches.batch(0)['images'], method='encode'
  )
  normal = (np.asarray(latents) - stats['latents/mean']) / stats['latents/std']
  normal = normal.reshape(-1, 32)
  for code in np.asarray(start.state.codebook['quantizer']['codes']):
    assert np.abs(normal - code).max(1).min() < 1e-4


def test_distilling_from_itself_is_in_the_encoders_space():
  """What the decoder reads against the latents, in their own units."""
  tokenizer, variables = tiny.normalised('vq-ema', 'channel')
  out = vqrae_jax.reconstruct(tokenizer, variables, tiny.images(2))
  stats = variables['codebook']['latents']
  read = np.asarray(out.quantizer.codes) * stats['std'] + stats['mean']
  want = np.mean((read - np.asarray(out.latents)) ** 2)
  np.testing.assert_allclose(distill(LatentInputs(out)), want, rtol=1e-5)
  tokenizer, variables = tiny.normalised('none', 'channel')
  out = vqrae_jax.reconstruct(tokenizer, variables, tiny.images(2))
  assert distill(LatentInputs(out)) < 1e-10
