"""A run starts from another's weights, all of them, or says why not."""

import math
import shutil

import jax
import numpy as np
import pytest

import vqrae_jax
from tests import runs, tiny
from vqrae_jax import sharding
from vqrae_jax.errors import UserError
from vqrae_jax.losses.latent import distill
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import rae
from vqrae_jax.train import initialize, loop
from vqrae_jax.train.checkpoint import Checkpoints
from vqrae_jax.types import LatentInputs, QuantizerOutput, TokenizerOutput

pytestmark = pytest.mark.usefixtures('one_device')

TERMS = tiny.LOSSES['simvq-l2']


def leaves(start):
  """{leaf name: array} of the tokenizer's variables."""
  params = start.state.tokenizer.params | start.frozen.params
  return params | trees.flatten(start.state.codebook)


def first_leaves(config):
  """{leaf name: array} of the tokenizer that a run starts with."""
  return leaves(runs.begun(config))


def exported(workdir):
  """{leaf name: array} of a run's tokenizer."""
  _, variables = vqrae_jax.load_tokenizer(workdir / 'tokenizer')
  found = trees.flatten(variables['params'])
  return found | trees.flatten(variables.get('codebook', {}))


def same(found, want, names=None):
  for name in want if names is None else names:
    np.testing.assert_array_equal(found[name], want[name], err_msg=name)


@pytest.mark.parametrize('folder', ('', 'tokenizer'))
@pytest.mark.parametrize('kind', ('vq-ema', 'simvq-l2'))
def test_all_leaves_are_loaded(kind, folder, vq_run, simvq_run, run_config):
  workdir = vq_run if kind == 'vq-ema' else simvq_run
  config = run_config(kind, init_from=str(workdir / folder))
  start = runs.begun(config | dict(schedules=runs.OPEN))
  found, want = leaves(start), exported(workdir)
  same(found, want, [n for n in found if not n.endswith(('counts', 'sums'))])
  same(start.state.ema, want, start.state.ema)
  assert int(start.state.step) == 0
  if kind == 'vq-ema':
    counts = found['quantizer/counts']
    assert (np.ptp(counts) == 0) == (folder == 'tokenizer')
    # As after many steps of this run's batch.
    tokenizer, _ = vqrae_jax.load_tokenizer(workdir / 'tokenizer')
    tokens = config['batch_size'] * math.prod(tokenizer.index_shape(16, 16))
    np.testing.assert_allclose(counts.sum(), tokens, rtol=1e-5)


def test_a_run_without_checkpoints_has_its_tokenizer(
  simvq_run, simvq_config, tmp_path
):
  run = shutil.copytree(simvq_run, tmp_path / 'run')
  shutil.rmtree(run / 'checkpoints')
  (run / 'checkpoints').mkdir()
  found = first_leaves(simvq_config(init_from=str(run)))
  same(found, exported(simvq_run), found)


def test_an_unfinished_run_will_do_and_the_log_says_so(
  simvq_run, simvq_config, tmp_path, log
):
  want = first_leaves(simvq_config(init_from=str(simvq_run)))
  assert 'unfinished' not in log.text
  assert f'step 2 of {simvq_run}' in log.text
  run = shutil.copytree(simvq_run, tmp_path / 'run')
  shutil.rmtree(run / 'tokenizer')
  for figures in ('', '{"steps": 1}'):  # none, and as a lengthened run has it
    (run / 'summary.json').write_text(figures)
    log.clear()
    same(first_leaves(simvq_config(init_from=str(run))), want)
    assert 'unfinished' in log.text
  with pytest.raises(UserError, match='init.encoder=.*tokenizer/'):
    runs.begun(simvq_config(init=dict(encoder=str(run))))


def test_only_what_was_kept_frozen_needs_its_files(
  vq_run, run_config, tmp_path, log
):
  """A run that trained a part resumes, and others start from it, without the
  files which it started from; one that kept it frozen says what is gone."""
  first = shutil.copytree(vq_run, tmp_path / 'first')
  second = run_config(init_from=str(first))
  free = dict(schedules=runs.OPEN)
  distill = tiny.LOSSES['vq-ema'] | dict(distill=1.0)
  init = dict(encoder=str(first / 'tokenizer'))
  begun = {
    'frozen': second,
    'taught': second | free | dict(teacher='init', losses=distill),
    'open': second | free,
    'half': run_config(init=init, schedules=(('decoder/.*', None), *runs.OPEN)),
  }
  for name, config in begun.items():
    loop.train(config, tmp_path / name)

  def resume(name):
    return loop.train(begun[name] | dict(duration=3), tmp_path / name)

  def start_from(name):
    return first_leaves(run_config(init_from=str(tmp_path / name)))

  assert f'the teacher is the encoder of {first}' in log.text
  resume('frozen')
  same(
    start_from('frozen'),
    exported(tmp_path / 'frozen'),
    ['decoder/head/kernel', 'encoder/embed/positions', 'quantizer/codes'],
  )
  shutil.rmtree(first)
  for name in ('open', 'half'):
    assert resume(name)['steps'] == 3
    start_from(name)
  with pytest.raises(UserError, match='init_from=.*frozen.*first'):
    start_from('frozen')
  with pytest.raises(UserError, match='first'):
    resume('taught')


def test_only_what_nothing_brings_is_drawn(
  vq_run, run_config, tmp_path, request
):
  """Each network by a program of its own, and none for what lies in files."""
  encoder = dict(encoder=str(vq_run / 'tokenizer'))
  config = run_config(init=encoder, duration=1)
  loop.train(config, tmp_path)
  programs = request.getfixturevalue('programs')

  def drawn():
    return {n for n in programs() if 'draw_' in n}

  made = runs.setup(config, sharding.make_mesh('dp', jax.devices()[:2]))
  kept = Checkpoints(tmp_path / 'checkpoints')
  with jax.set_mesh(made.mesh):
    initialize.restore(made, kept, kept.latest())
  assert not drawn()
  # For a device that has drawn nothing yet.
  mesh = sharding.make_mesh('dp', jax.devices()[1:2])
  runs.begun(run_config(init_from=str(vq_run / 'tokenizer')), mesh)
  few = {'jit(draw_zeros)', 'jit(draw_codebook_quantizer)'}
  assert drawn() <= few
  runs.begun(run_config(init=encoder), mesh)
  assert drawn() <= few | {'jit(draw_params_decoder)'}
  runs.begun(run_config(), mesh)
  assert {'jit(draw_params_encoder)', *few} <= drawn()


def test_by_schedules_alone_everything_but_the_decoder_keeps_its_bits(
  vq_run, run_config, tmp_path
):
  rows = (('decoder/.*', dict(lr=1e-3)), ('.*', None))
  child = run_config(schedules=rows, init_from=str(vq_run), losses=dict(l2=1.0))
  before = first_leaves(child)
  loop.train(child, tmp_path)
  after = exported(tmp_path)
  for name in before.keys() & after.keys():
    moved = np.asarray(before[name]).tobytes() != after[name].tobytes()
    assert moved == name.startswith('decoder/'), name


def test_a_published_decoder(run_config, tmp_path):
  """`rae:FILE` fills the decoder and nothing else."""
  torch = pytest.importorskip('torch')
  tokenizer, variables = tiny.built(tiny.model('vq-ema'), seed=7)
  decoder = jax.tree.map(np.array, variables['params']['decoder'])
  state = rae.export_rae_decoder(decoder, tokenizer.decoder_spec)
  state = {k: torch.from_numpy(np.array(v)) for k, v in state.items()}
  torch.save(state, tmp_path / 'model.pt')
  init = dict(decoder=f'rae:{tmp_path}/model.pt')
  found, plain = first_leaves(run_config(init=init)), first_leaves(run_config())
  same(found, trees.flatten(dict(decoder=decoder)))
  same(found, plain, [n for n in found if n.startswith('encoder/')])


def test_the_encoder_of_another_run(vq_run, simvq_config, tmp_path):
  """Whatever its quantizer; a run that started so is one to start from."""
  want = {n: x for n, x in exported(vq_run).items() if n.startswith('encoder/')}
  fresh = first_leaves(simvq_config())
  rows = (('encoder/.*', None), *runs.OPEN)
  for place in (vq_run, vq_run / 'tokenizer'):
    child = simvq_config(init=dict(encoder=str(place)), schedules=rows)
    found = first_leaves(child)
    same(found, want)
    same(found, fresh, ['decoder/head/kernel'])
  loop.train(child, tmp_path / 'second')
  same(first_leaves(simvq_config(init_from=str(tmp_path / 'second'))), want)
  model = tiny.model('simvq-l2')
  model['encoder'] = dict(vit=tiny.VIT | dict(act='gelu_tanh'))
  with pytest.raises(UserError, match=r'init.encoder=.*vit\.act'):
    runs.begun(child | dict(model=model))


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
  want = trees.flatten(dict(encoder=variables['params']))
  start = runs.begun(child)
  same(leaves(start), want)
  assert start.record['params']['source'] == str(folder)
  loop.train(child, tmp_path / 'run')
  loop.train(child | dict(duration=3), tmp_path / 'run')
  grandchild = run_config(model=model, init_from=str(tmp_path / 'run'))
  same(first_leaves(grandchild), want)
  other = child | dict(model=tiny.model('vq-ema'))
  with pytest.raises(UserError, match='init.encoder=.*vit.act'):
    runs.begun(other)
  references.make('siglip', 1, **sizes).save_pretrained(folder)
  with pytest.raises(UserError, match='"params".*siglip'):
    loop.train(child | dict(duration=4), tmp_path / 'run')


@pytest.mark.parametrize(
  'model, key',
  [
    (tiny.model('simvq-cosine'), 'quantizer.distance'),
    (tiny.model('simvq-l2', depth=3), 'decoder.vit.depth'),
  ],
)
def test_another_model_is_refused_before_a_program_compiles(
  model, key, simvq_config, simvq_run, programs
):
  """Equal shapes do not make it the same: codes would be chosen otherwise."""
  for path in (simvq_run, simvq_run / 'tokenizer'):
    config = simvq_config(model=model, init_from=str(path))
    known = programs()
    with pytest.raises(UserError, match=f'{path}.*{key}'):
      runs.begun(config)
    assert programs() == known
  only_training = tiny.model('simvq-l2', basis_init='normal')
  runs.begun(simvq_config(model=only_training, init_from=str(simvq_run)))


@pytest.mark.parametrize(
  'layout, devices, tensor', (('fsdp', 8, 1), ('fsdp+tp', 4, 2))
)
def test_onto_any_mesh(layout, devices, tensor, simvq_run, simvq_config):
  """A run on one device starts another on many, its teacher laid over them;
  the manifest says which step the teacher is of."""
  config = simvq_config(
    init_from=str(simvq_run), teacher='init', losses=TERMS | dict(distill=1.0)
  )
  start = runs.begun(
    config, sharding.make_mesh(layout, jax.devices()[:devices], tensor)
  )
  params = start.state.tokenizer.params
  teacher = trees.flatten(start.frozen.teacher)
  same(params, exported(simvq_run), params)
  same(teacher, params, [n for n in params if n.startswith('encoder/')])
  for name, leaf in (start.state.ema | teacher).items():
    assert leaf.sharding == params[name].sharding, name
  spread = [n for n, x in teacher.items() if not x.sharding.is_fully_replicated]
  assert any('transformer' in name for name in spread)
  record = start.record['teacher']
  assert (record['source'], record['revision']) == (str(simvq_run), 'step 2')


# -- distillation ------------------------------------------------------------
def test_the_teacher_is_the_encoder_that_init_from_gives(
  simvq_run, simvq_config, tmp_path
):
  """The first latents are its own, and it holds those that follow."""
  drifts = []
  for weight in (1e-9, 1.0):
    config = simvq_config(
      init_from=str(simvq_run), teacher='init', duration=12,
      losses=TERMS | dict(distill=weight), checkpoint=dict(every=0),
      schedules=(('.*', dict(lr=3e-3)),),
    )  # fmt: skip
    loop.train(config, tmp_path / str(weight))
    rows = runs.rows(tmp_path / str(weight))
    first, *_, last = [row['loss/distill'] for row in rows]
    assert first < 1e-10
    drifts.append(last)
  free, held = drifts
  assert held < free / 2


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
NORMED = tiny.model('vq-ema') | dict(latents=dict(norm='channel'))


@pytest.fixture
def stats(tmp_path):
  """(a file of statistics, {leaf name: what a tokenizer holds of it})."""
  mean, var = np.random.default_rng(0).uniform(0.5, 2, (2, 32))
  np.savez(tmp_path / 'stats.npz', mean=mean, var=var)
  want = {'latents/mean': mean, 'latents/std': np.sqrt(var + 1e-5)}
  want = {name: x.astype('f4') for name, x in want.items()}
  return tmp_path / 'stats.npz', want


def test_statistics_stay_through_runs(run_config, stats, tmp_path):
  """Training leaves them; `init_from` and checkpoints bring them along,
  whether or not their file is still there."""
  path, want = stats
  config = run_config(model=NORMED, init=dict(latents=str(path)))
  run = tmp_path / 'run'
  loop.train(config | dict(duration=1), run)
  same(exported(run), want)
  path.unlink()
  with pytest.raises(UserError, match='init.latents=.*stats.npz'):
    loop.train(config, tmp_path / 'new')
  loop.train(config, run)
  same(exported(run), want)
  for source in (run, run / 'tokenizer'):
    same(first_leaves(run_config(model=NORMED, init_from=str(source))), want)


def test_a_codebook_starts_at_normalised_tokens(run_config, stats):
  """`init.latents` is no codebook: the quantizer's starts at the data."""
  path, want = stats
  config = run_config(model=NORMED, init=dict(latents=str(path)))
  start, made = runs.begun(config), runs.setup(config)
  assert start.record['params']['source'] == 'seed 0'
  params = trees.merge(start.state.tokenizer.params, start.frozen.params)
  latents = made.tokenizer.apply(
    {'params': params}, made.batches.batch(0)['images'], method='encode'
  )
  normal = (latents - want['latents/mean']) / want['latents/std']
  normal = np.asarray(normal).reshape(-1, 32)
  for code in np.asarray(start.state.codebook['quantizer']['codes']):
    assert np.abs(normal - code).max(1).min() < 1e-4


def test_distilling_from_itself_is_in_the_encoders_space():
  """What the decoder reads against the latents, in their own units."""
  tokenizer, variables = tiny.normalised('vq-ema', 'channel')
  run = jax.jit(vqrae_jax.reconstruct, static_argnums=0)
  out = run(tokenizer, variables, tiny.images(2))
  stats = variables['codebook']['latents']
  read = np.asarray(out.quantizer.codes) * stats['std'] + stats['mean']
  want = np.mean((read - np.asarray(out.latents)) ** 2)
  np.testing.assert_allclose(distill(LatentInputs(out)), want, rtol=1e-5)
  tokenizer, variables = tiny.normalised('none', 'channel')
  out = run(tokenizer, variables, tiny.images(2))
  assert distill(LatentInputs(out)) < 1e-10
