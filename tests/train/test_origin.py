"""A run begins with another's weights, all of them, or says why not."""

import jax
import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from tests import tiny
from tests.train import pieces
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import rae
from vqrae_jax.train import loop
from vqrae_jax.train.checkpoint import Checkpoints
from vqrae_jax.train.run import Run

FROZEN = (('encoder/.*', None), ('.*', dict(lr=1e-3)))

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('photos')
  for i in range(3):
    pixels = tiny.images(1, 24, 24, seed=i)[0]
    Image.fromarray(pixels).save(folder / f'photo{i}.png')
  return folder


def config(photos, kind='vq-ema', **keys):
  base = dict(
    data=dict(source=str(photos), image_size=16),
    log=dict(every=1, images_every=0, tensorboard=False),
    schedules=FROZEN,
    duration=2,
    checkpoint=dict(every=1),
  )
  return tiny.run(kind, **(base | keys))


def begun(config):
  """{leaf name: numpy} of a run's variables at its first step."""
  run = Run(config)
  with jax.set_mesh(run.mesh):
    state, frozen, _ = run.start()
  params = state.tokenizer.params | frozen.params
  tables = trees.flatten(state.codebook)
  return {n: np.array(x) for n, x in {**params, **tables}.items()}, state


@pytest.fixture(scope='module', params=('vq-ema', 'simvq-l2', 'vq-gradient'))
def parent(request, photos, tmp_path_factory):
  workdir = tmp_path_factory.mktemp(request.param)
  loop.train(config(photos, request.param, seed=5), workdir)
  return request.param, workdir


@pytest.mark.parametrize('what', ('run', 'tokenizer'))
def test_all_leaves_come_along(parent, photos, what):
  kind, workdir = parent
  path = workdir if what == 'run' else workdir / 'tokenizer'
  found, state = begun(config(photos, kind, init_from=str(path)))
  _, variables = vqrae_jax.load_tokenizer(workdir / 'tokenizer')
  want = trees.flatten(variables['params'])
  want |= trees.flatten(variables.get('codebook', {}))
  for name, leaf in found.items():
    if name.endswith(('/counts', '/sums')):
      continue
    np.testing.assert_array_equal(leaf, want[name], err_msg=name)
  for name, leaf in state.ema.items():
    np.testing.assert_array_equal(leaf, want[name], err_msg=name)
  assert int(state.step) == 0
  if kind == 'vq-ema':
    counts = found['quantizer/counts']
    assert (counts == 1).all() == (what == 'tokenizer')


def test_what_froze_nothing_needs_none_before_it(photos, tmp_path):
  """A run that trained all of itself stands alone; one that did not says
  what it misses."""
  loop.train(config(photos), tmp_path / 'first')
  again = dict(init_from=str(tmp_path / 'first'))
  everything = (('.*', dict(lr=1e-3)),)
  loop.train(config(photos, schedules=everything, **again), tmp_path / 'open')
  loop.train(config(photos, **again), tmp_path / 'shut')
  (tmp_path / 'first').rename(tmp_path / 'gone')
  begun(config(photos, init_from=str(tmp_path / 'open')))
  (tmp_path / 'open/tokenizer').rename(tmp_path / 'not there yet')
  with pytest.raises(UserError, match='open: that run has no tokenizer/ yet'):
    begun(config(photos, init=dict(encoder=str(tmp_path / 'open'))))
  with pytest.raises(
    UserError, match='shut: what it kept frozen is not in its'
  ):
    begun(config(photos, init_from=str(tmp_path / 'shut')))


def test_an_unfinished_run_will_do(photos, tmp_path):
  loop.train(config(photos), tmp_path)
  found, _ = begun(config(photos, init_from=str(tmp_path)))
  for path in (tmp_path / 'tokenizer').iterdir():
    path.unlink()
  (tmp_path / 'tokenizer').rmdir()
  again, _ = begun(config(photos, init_from=str(tmp_path)))
  for name in found:
    np.testing.assert_array_equal(found[name], again[name])


def test_decoder_only_and_a_frozen_codebook(parent, photos, tmp_path):
  """By schedules alone: everything but the decoder keeps its bits."""
  kind, workdir = parent
  rows = (('decoder/.*', dict(lr=1e-3)), ('.*', None))
  child = config(photos, kind, schedules=rows, init_from=str(workdir))
  child['losses'] = dict(l2=1.0)
  before, _ = begun(child)
  loop.train(child, tmp_path)
  _, variables = vqrae_jax.load_tokenizer(tmp_path / 'tokenizer')
  after = trees.flatten(variables['params'])
  after |= trees.flatten(variables.get('codebook', {}))
  for name, leaf in before.items():
    if name in after:
      moved = leaf.tobytes() != np.asarray(after[name]).tobytes()
      assert moved == name.startswith('decoder/'), name


def test_a_child_of_a_child_resumes(parent, photos, tmp_path):
  """Frozen leaves are made again from init_from, and verified."""
  kind, workdir = parent
  child = config(photos, kind, init_from=str(workdir))
  first = loop.train(child, tmp_path)
  again = loop.train(child, tmp_path)
  assert again['fingerprint'] == first['fingerprint']
  grandchild = config(photos, kind, init_from=str(tmp_path))
  found, _ = begun(grandchild)
  _, variables = vqrae_jax.load_tokenizer(tmp_path / 'tokenizer')
  want = trees.flatten(variables['params'])
  for name in want:
    np.testing.assert_array_equal(found[name], want[name], err_msg=name)


def test_frozen_leaves_are_verified(photos, tmp_path):
  loop.train(config(photos), tmp_path)

  def another(manifest):
    assert manifest['frozen']['params']['source'] == 'seed 0'
    manifest['frozen']['params']['sha256'] = 64 * '0'

  pieces.edit_manifests(tmp_path, another)
  words = 'the frozen tree "params" is not the one .*from seed 0'
  with pytest.raises(UserError, match=words):
    loop.train(config(photos), tmp_path)
  with pytest.raises(UserError, match=words):
    begun(config(photos, init_from=str(tmp_path)))


def test_a_published_decoder(photos, tmp_path):
  """`rae:FILE` fills the decoder and nothing else."""
  torch = pytest.importorskip('torch')
  model = tiny.model('vq-ema')
  tokenizer, variables = tiny.built(model, seed=7)
  leaves = jax.tree.map(np.asarray, variables['params']['decoder'])
  told = rae.export_rae_decoder(leaves, tokenizer.decoder_spec)
  told = {k: torch.from_numpy(np.array(v)) for k, v in told.items()}
  torch.save(told, tmp_path / 'model.pt')
  given = dict(decoder=f'rae:{tmp_path}/model.pt')
  found, _ = begun(config(photos, init=given))
  want = trees.flatten(leaves)
  plain, _ = begun(config(photos))
  for name, leaf in found.items():
    if name.startswith('decoder/'):
      theirs = want[name.removeprefix('decoder/')]
      np.testing.assert_array_equal(leaf, theirs, err_msg=name)
    elif not name.startswith('quantizer/'):  # its codes start at the data
      np.testing.assert_array_equal(leaf, plain[name], err_msg=name)
  assert loop.dry_run(config(photos, init=given, duration=1))
  wide = tiny.model('vq-ema')
  wide['decoder'] = dict(vit=tiny.VIT | tiny.DECODER | dict(width=64))
  with pytest.raises(UserError, match='the model wants'):
    begun(config(photos, init=given, model=wide))


def test_the_encoder_of_another_run(photos, tmp_path):
  """Whatever its quantizer: a continuous run's, to begin discrete tokens."""
  first = config(photos, 'none', seed=5, schedules=(('.*', dict(lr=1e-3)),))
  loop.train(first, tmp_path / 'first')
  _, variables = vqrae_jax.load_tokenizer(tmp_path / 'first' / 'tokenizer')
  want = trees.flatten({'encoder': variables['params']['encoder']})
  for place in (tmp_path / 'first', tmp_path / 'first' / 'tokenizer'):
    child = config(photos, 'simvq-l2', init=dict(encoder=str(place)))
    found, _ = begun(child)
    for name, leaf in want.items():
      np.testing.assert_array_equal(found[name], leaf, err_msg=name)
  fresh, _ = begun(config(photos, 'simvq-l2'))
  assert (fresh['decoder/head/kernel'] == found['decoder/head/kernel']).all()
  # A run that began so is one that others can begin with.
  loop.train(child, tmp_path / 'second')
  grandchild = config(photos, 'simvq-l2', init_from=str(tmp_path / 'second'))
  again, _ = begun(grandchild)
  np.testing.assert_array_equal(again[name], leaf)
  model = tiny.model('simvq-l2')
  model['encoder'] = dict(vit=tiny.VIT | dict(act='gelu_tanh'))
  words = r'has vit\.act=gelu, model\.encoder has gelu_tanh; make the two equal'
  with pytest.raises(UserError, match=words):
    begun(child | dict(model=model))


def test_a_published_encoder(photos, tmp_path):
  """A folder fills the encoder; manifests name it; the run goes on."""
  pytest.importorskip('torch')
  from tests.encoders import references

  sizes = dict(width=32, depth=2, heads=4, mlp=48, pixels=16, patch=4)
  references.make('siglip', **sizes).save_pretrained(tmp_path / 'siglip')
  model = tiny.model('vq-ema')
  model['encoder'] = dict(
    vit=tiny.VIT | dict(act='gelu_tanh'), output_norm='plain'
  )
  given = dict(encoder=f'{tmp_path}/siglip')
  child = config(photos, init=given, model=model)
  found, _ = begun(child)
  _, variables = vqrae_jax.load_encoder(str(tmp_path / 'siglip'), 'plain')
  want = trees.flatten(variables['params'])
  have = {
    n.removeprefix('encoder/'): x
    for n, x in found.items()
    if n.startswith('encoder/')
  }
  assert have.keys() == want.keys()
  for name, leaf in want.items():
    np.testing.assert_array_equal(have[name], leaf, err_msg=name)

  loop.train(child, tmp_path / 'run')
  told = Checkpoints(tmp_path / 'run' / 'checkpoints').latest()
  assert told['frozen']['params']['source'] == str(tmp_path / 'siglip')
  loop.train(child | dict(duration=3), tmp_path / 'run')
  grandchild = config(photos, model=model, init_from=str(tmp_path / 'run'))
  again, _ = begun(grandchild)
  for name, leaf in want.items():
    np.testing.assert_array_equal(again[f'encoder/{name}'], leaf)

  other = dict(model, encoder=dict(vit=tiny.VIT))
  with pytest.raises(UserError, match='is not the model: it has vit.act'):
    begun(config(photos, init=given, model=other))
  # Another encoder in its place is noticed.
  references.make('siglip', 1, **sizes).save_pretrained(tmp_path / 'siglip')
  with pytest.raises(UserError, match='is not the one .*siglip; bring'):
    loop.train(child | dict(duration=4), tmp_path / 'run')


@pytest.mark.parametrize(
  'keys, words',
  [
    (dict(init_from='nowhere'), 'init_from=nowhere: there is no such folder'),
    (dict(init_from='{photos}'), 'is no tokenizer: it has no config.json'),
    (
      dict(init_from='{run}', model=tiny.model('fsq-cosmos')),
      'init_from=.*: that tokenizer has quantizer.name=vq, model.* is fsq;',
    ),
    (dict(init=dict(decoder='rae:nowhere.pt')), 'nowhere.pt'),
    (dict(init=dict(decoder='hf:a/b')), 'a decoder comes from "rae:FILE"'),
    (dict(init=dict(decoder='rea:x.pt')), 'did you mean "rae"'),
    (dict(init=dict(encoder='dinov2-bas')), 'did you mean "dinov2-base"'),
    (dict(init=dict(encoder='./no')), 'init.encoder=./no: no encoder at no'),
    (dict(init=dict(encoder='{photos}')), 'init.encoder=.*: no weights in'),
    (
      dict(init_from='{run}', init=dict(encoder='dinov2-base')),
      'init.encoder has no place',
    ),
    (
      dict(init_from='{run}', init=dict(decoder='rae:x.pt')),
      'give one of the two',
    ),
  ],
)
def test_what_does_not_fit_is_named(keys, words, photos, tmp_path):
  loop.train(config(photos), tmp_path)

  def named(v):
    if isinstance(v, dict):
      return {k: named(x) for k, x in v.items()}
    if not isinstance(v, str):
      return v
    return v.format(photos=photos, run=tmp_path)

  keys = {k: v if k == 'model' else named(v) for k, v in keys.items()}
  kind = 'fsq-cosmos' if 'model' in keys else 'vq-ema'
  with pytest.raises(UserError, match=words):
    begun(config(photos, kind, **keys))
