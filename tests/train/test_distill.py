"""The second stage: the encoder opens, and a frozen copy keeps its meaning."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vqrae_jax.losses.latent import distill
from vqrae_jax.ops import trees
from vqrae_jax.train import config as terms
from vqrae_jax.train import loop
from vqrae_jax.train.checkpoint import Checkpoints
from vqrae_jax.train.run import Run
from vqrae_jax.types import LatentInputs, QuantizerOutput, TokenizerOutput

pytestmark = pytest.mark.usefixtures('one_device')

FROZEN = (('encoder/.*', None), ('.*', dict(lr=3e-3)))
OPEN = (('.*', dict(lr=3e-3)),)
TERMS = dict(l2=1.0, commit=0.25, codebook=1.0)
TAUGHT = TERMS | dict(distill=dict(weight=1.0, target='teacher'))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('photos')
  for i in range(6):
    Image.fromarray(tiny.images(1, 20, 20, seed=i)[0]).save(folder / f'{i}.png')
  return folder


def config(photos, **keys):
  data = dict(source=str(photos), image_size=16)
  log = dict(every=4, images_every=0, usage_window=2, tensorboard=False)
  return tiny.run(
    'simvq-l2',
    **dict(data=data, log=log, duration=12, ema=0.0, losses=TERMS) | keys,
  )


@pytest.fixture(scope='module')
def first(photos, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'first'
  loop.train(config(photos, schedules=FROZEN), workdir)
  return workdir


def encoder_of(photos, workdir):
  """{leaf: array} of the encoder at a run's end."""
  from vqrae_jax import export

  _, variables = export.load_tokenizer(workdir / 'tokenizer')
  leaves = trees.flatten(variables['params']['encoder'])
  return {n: np.asarray(x) for n, x in leaves.items()}


def drift(workdir, begun):
  """Mean squared distance of the latents from those the run began with."""
  from vqrae_jax import export

  tokenizer, variables = export.load_tokenizer(workdir / 'tokenizer')
  images = tiny.images(8)
  now = tokenizer.apply(variables, images, method='encode')
  before = tokenizer.apply(begun, images, method='encode')
  return float(np.mean((np.asarray(now) - np.asarray(before)) ** 2))


def test_the_encoder_moves_and_the_teacher_holds_it(
  first, photos, tmp_path, capsys
):
  from vqrae_jax import export

  seeded = Run(config(photos, schedules=FROZEN))
  with jax.set_mesh(seeded.mesh):
    _, frozen, _ = seeded.start()
  still = encoder_of(photos, first)
  for name, leaf in still.items():  # the first stage leaves every bit
    held = np.asarray(frozen.params[f'encoder/{name}'])
    assert held.tobytes() == leaf.tobytes(), name
  second = dict(schedules=OPEN, init_from=str(first))
  loop.train(config(photos, **second), tmp_path / 'free')
  taught = config(photos, **second, losses=TAUGHT, teacher='init')
  loop.train(taught, tmp_path / 'taught')
  moved = encoder_of(photos, tmp_path / 'taught')
  assert all((moved[n] != x).any() for n, x in still.items())
  _, begun = export.load_tokenizer(first / 'tokenizer')
  free, held = (drift(tmp_path / n, begun) for n in ('free', 'taught'))
  with capsys.disabled():
    print(
      f'\nlatents drift by {free:.2e} without a teacher, {held:.2e} with one'
    )
  assert held < free / 2
  rows = (tmp_path / 'taught' / 'metrics.jsonl').read_text()
  assert 'loss/distill' in rows
  manifest = Checkpoints(tmp_path / 'taught' / 'checkpoints').latest()
  assert manifest['frozen']['teacher']['source'] == str(first)


def test_the_teacher_is_the_encoder_that_init_from_brings(first, photos):
  run = Run(
    config(
      photos,
      schedules=OPEN,
      init_from=str(first),
      losses=TAUGHT,
      teacher='init',
    )
  )
  with jax.set_mesh(run.mesh):
    state, frozen, step = run.start()
    params = state.tokenizer.params
    teacher = trees.flatten(frozen.teacher)
    assert set(teacher) == {n for n in params if n.startswith('encoder')}
    for name, leaf in teacher.items():
      np.testing.assert_array_equal(leaf, params[name])
    before = jax.device_get(teacher)
    batch = run.place(run.batches.batch(0))
    state, metrics = step(state, frozen, batch)
    # The first step's latents are the teacher's.
    assert float(metrics['loss/distill']) < 1e-10
    state, metrics = step(state, frozen, batch)
    assert float(metrics['loss/distill']) > 1e-10
  for name, leaf in trees.flatten(frozen.teacher).items():
    np.testing.assert_array_equal(leaf, before[name])


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
    given = variables | {'params': params}
    return distill(LatentInputs(tokenizer.apply(given, images, train=True)))

  found = jax.jit(jax.grad(loss))(variables['params'])
  moved = {n for n, g in trees.flatten(found).items() if np.asarray(g).any()}
  assert moved and all(n.startswith('quantizer/') for n in moved)
  assert not any(n.startswith('quantizer/project_in') for n in moved)
  if kind == 'simvq-l2':
    assert {'quantizer/kernel', 'quantizer/project_out/kernel'} <= moved


def test_a_ramp_is_linear_from_the_start():
  term = terms.LossTerm(2.0, start=10, ramp=3)
  at = term.weight_at(None)
  found = [float(at(step)) for step in (9, 10, 11, 12, 13, 99)]
  assert found == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
  epochs = dataclasses.replace(term, start=1, ramp=0, unit='epochs')
  assert [float(epochs.weight_at(5.0)(s)) for s in (4, 5)] == [0.0, 2.0]
