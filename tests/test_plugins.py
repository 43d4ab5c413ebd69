"""Code of another package: `examples/plugins/own_parts`, from outside."""

import functools
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import vqrae_jax
from tests import runs, tiny
from tests.quantizers import test_round_trip as round_trip
from vqrae_jax import cli, export, plugins, quantizers, sharding
from vqrae_jax.errors import UserError
from vqrae_jax.models.encoder import EncoderModule
from vqrae_jax.models.tokenizer import describe
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import export as run_export
from vqrae_jax.train import initialize, loop

FOLDER = runs.ROOT / 'examples' / 'plugins'
ENCODER, LFQ = 'own_parts.convnext:ConvNeXt', 'own_parts.lfq:LFQ'
PACKAGE = ('own_parts',)
SECTION = dict(name=ENCODER, depths=(1, 1), widths=(16, 32))

pytestmark = pytest.mark.usefixtures('one_device', 'own_parts')


@pytest.fixture(scope='module')
def own_parts():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'path', [str(FOLDER), *sys.path])
    yield


def model(**sections):
  """Of the example's parts, tokens of 8 pixels."""
  vit = tiny.VIT | tiny.DECODER | dict(depth=1, patch_size=8, grid=(2, 2))
  parts = dict(encoder=SECTION, quantizer=dict(name=LFQ, bits=6))
  return parts | dict(decoder=dict(vit=vit)) | sections


def mean_square(x):
  """A loss on latents, of this module."""
  return jnp.mean(x.out.latents.astype(jnp.float32) ** 2)


def a_pair(x):
  """No loss: it has more than one value."""
  return x.reconstruction.mean(), {}


def a_row(x):
  """No loss: a value an image."""
  return x.reconstruction.mean((1, 2, 3))


HERE = __name__
INIT = config_lib.InitSpec()
LOSSES = dict(
  l2=1.0,
  commit=0.25,
  entropy=0.02,
  edge=dict(weight=0.1, fn='own_parts.edge:edge'),
  small=dict(weight=0.01, fn=f'{HERE}:mean_square', on='latents', ramp=2),
)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The workdir of two steps, and the run's config."""
  root = tmp_path_factory.mktemp('plugins')
  config = runs.plain(
    runs.images(root / 'photos'),
    model=model(),
    losses=LOSSES,
    duration=2,
    batch_size=4,
    eval=dict(source=str(root / 'photos'), tile=16, batch_size=2),
  )
  loop.train(config, root / 'run')
  return root / 'run', config


def test_a_run_of_all_three(run):
  workdir, config = run
  rows = runs.rows(workdir)
  assert len(rows) == 2
  for name in config['losses']:
    assert np.isfinite([row[f'loss/{name}'] for row in rows]).all()
    assert f'weight/{name}' in rows[0]
  assert rows[0]['loss/edge'] > 0 < rows[0]['loss/small']
  saved = json.loads((workdir / 'tokenizer' / 'config.json').read_text())
  assert saved['model']['encoder']['name'] == ENCODER
  assert saved['model']['quantizer']['name'] == LFQ
  assert not {'dtype', 'remat', 'scan'} & saved['model']['encoder'].keys()


def test_only_the_trusted_are_imported(run, tmp_path):
  """In a process that does not have it yet, and with the same indices."""
  path = run[0] / 'tokenizer'
  for trusted in ((), ('own',), ('own_parts.lfq',), None):
    with pytest.raises(UserError, match=r'trusted=\("own_parts",\)'):
      vqrae_jax.load_tokenizer(path, trusted=trusted)
  with pytest.raises(UserError, match=r"\('own_parts',\)"):
    vqrae_jax.load_tokenizer(path, trusted='own_parts')
  tokenizer, variables = vqrae_jax.load_tokenizer(path, trusted=PACKAGE)
  images = tiny.images(2)
  indices = jax.jit(vqrae_jax.encode_to_indices, static_argnums=0)(
    tokenizer, variables, images
  )
  np.savez(tmp_path / 'x.npz', images=images, indices=indices)
  code = """
import sys, jax, numpy as np, vqrae_jax
path, data, folder = sys.argv[1:]
sys.path.insert(0, folder)
try:
  vqrae_jax.load_tokenizer(path)
  sys.exit('it was imported')
except vqrae_jax.UserError:
  assert not any(name.startswith('own_parts') for name in sys.modules)
tokenizer, variables = vqrae_jax.load_tokenizer(path, trusted=('own_parts',))
data = np.load(data)
encode = jax.jit(vqrae_jax.encode_to_indices, static_argnums=0)
found = encode(tokenizer, variables, data['images'])
np.testing.assert_array_equal(found, data['indices'])
"""
  runs.finished(runs.python(code, 1, path, tmp_path / 'x.npz', FOLDER))


def test_what_is_opened_is_what_was_saved(run, tmp_path):
  path = run[0] / 'tokenizer'
  tokenizer, variables = vqrae_jax.load_tokenizer(
    path, trusted=PACKAGE, dtype='bfloat16', remat=True
  )
  assert tokenizer.encoder_spec.dtype == 'bfloat16'
  assert tokenizer.encoder_spec.remat
  export.save_tokenizer(tokenizer, variables, tmp_path / 'again')
  for name in (export.CONFIG, export.WEIGHTS):
    again = tmp_path / 'again' / name
    assert again.read_bytes() == (path / name).read_bytes()
  for precision, dtype in (('default', 'bfloat16'), ('canonical', 'float32')):
    latents = jax.eval_shape(
      functools.partial(vqrae_jax.encode, tokenizer, precision=precision),
      variables,
      jax.ShapeDtypeStruct((2, 16, 24, 3), 'uint8'),
    )
    assert latents.shape == (2, 2, 3, 32) and latents.dtype == dtype


def test_decoding_indices_is_reconstruct(run):
  """The tokenizer's round trip, bitwise."""
  tokenizer, variables = vqrae_jax.load_tokenizer(
    run[0] / 'tokenizer', trusted=PACKAGE
  )
  jitted = functools.partial(
    jax.jit, static_argnums=0, compiler_options=tiny.AS_USERS
  )
  images = tiny.images(2, 16, 24)
  recon = jitted(vqrae_jax.reconstruct)(tokenizer, variables, images)
  indices = jitted(vqrae_jax.encode_to_indices)(tokenizer, variables, images)
  np.testing.assert_array_equal(recon.quantizer.indices, indices)
  decoded = jitted(vqrae_jax.decode_from_indices)(tokenizer, variables, indices)
  assert decoded.tobytes() == np.clip(recon.images, 0, 1).tobytes()


@pytest.mark.parametrize(
  'row',
  [round_trip.F32, pytest.param(round_trip.BF16, marks=pytest.mark.slow)],
)
def test_the_quantizers_round_trip(row, monkeypatch):
  monkeypatch.setitem(tiny.FORMS, 'own', dict(name=LFQ, bits=8))
  round_trip.check_round_trip('own', *row)


def test_the_example_is_lfq():
  """Codes, indices and gradients of `quantizers/lfq.py`."""
  z = jax.random.normal(jax.random.key(0), (2, 3, 32))
  ours = quantizers.build(dict(name='lfq', bits=8), 32, 'float32')
  own = quantizers.build(dict(name=LFQ, bits=8), 32, 'float32')
  variables = jax.jit(ours.init)(jax.random.key(1), z)

  def value(z, q):
    out = q.apply(variables, z, train=True)
    return (out.z_q**2).sum() + out.losses['commit'], out

  grad = jax.jit(jax.value_and_grad(value, has_aux=True), static_argnums=1)
  (_, a), da = grad(z, ours)
  (_, b), db = grad(z, own)
  np.testing.assert_array_equal(a.indices, b.indices)
  np.testing.assert_array_equal(a.codes, b.codes)
  np.testing.assert_array_equal(da, db)


def test_starting_from_a_run(run, tmp_path):
  """A run opens others' code only if its own config names the package."""
  workdir, _ = run
  own, ours = map(vqrae_jax.build_tokenizer, (model(), tiny.model('lfq')))
  for folder in (workdir, workdir / 'tokenizer'):
    weights = initialize.tokenizer_weights(own, str(folder), INIT)
    assert 'params/encoder/down0/kernel' in weights.leaves
    with pytest.raises(UserError, match='own_parts'):
      initialize.tokenizer_weights(ours, str(folder), INIT)
  encoder = initialize.encoder_from(own, str(workdir))
  assert all(name.startswith('params/encoder/') for name in encoder.leaves)
  with pytest.raises(UserError, match='ConvNeXt'):
    initialize.encoder_from(own, 'siglip-large-patch16-384')
  with pytest.raises(UserError, match='own_parts'):
    run_export.export_run(workdir, tmp_path / 'out')
  mark = run_export.export_run(workdir, tmp_path / 'out', PACKAGE)
  saved = json.loads((workdir / 'tokenizer' / 'config.json').read_text())
  assert mark == saved['fingerprint']


def test_the_examples_config():
  """As the command line reads it."""
  config = cli.load_config(str(FOLDER / 'config.py'))
  assert config.losses.edge.fn == 'own_parts.edge:edge'
  config.data.examples = 100
  spec = config_lib.read_config(config)
  assert spec.terms()['edge'].load('edge').__name__ == 'edge'
  tokenizer = vqrae_jax.build_tokenizer(config.model)
  assert tokenizer.index_shape(64, 64) == (4, 4)
  mesh = sharding.make_mesh('fsdp')
  for name in ('params/encoder/mystery', 'codebook/quantizer/mystery'):
    sharding.spec_for(name, (4, 4), mesh)


# -- what is wrong, where, what would be right ---------------------------------
@pytest.mark.parametrize(
  'name, words',
  [
    ('own_parts.lfq:', 'must be "package.module:Class"'),
    ('own_parts.lfq:LFQ.bits', 'must be "package.module:Class"'),
    ('own_parts lfq:LFQ', 'must be "package.module:Class"'),
    ('own_parts.lfk:LFQ', r'cannot be imported .*own_parts\.lfk.*PYTHONPATH'),
    ('own_parts.lfq:LFK', 'did you mean "LFQ"'),
    ('own_parts.lfq:entropy', 'must be a subclass of .*Quantizer'),
    ('own_parts.lfq:Quantizer', r'name it "vqrae_jax\.quantizers\.base:Q'),
    (ENCODER, 'must be a subclass of .*Quantizer'),
  ],
)
def test_a_name_that_is_wrong(name, words):
  with pytest.raises(UserError, match=f'model.quantizer.name=.*{words}'):
    quantizers.build(dict(name=name), 8, 'float32')


@pytest.mark.parametrize(
  'sections, words',
  [
    (dict(encoder=SECTION | dict(dtype='float32')), 'set model.dtype'),
    (
      dict(encoder=SECTION | dict(depth=(1, 1))),
      '"model.encoder.depth".*depths',
    ),
    (dict(encoder=SECTION | dict(depths=(1,))), 'a number for each level'),
    (dict(encoder=SECTION | dict(resize='near')), 'encoder.resize'),
    (dict(encoder=dict(name=LFQ)), 'subclass of .*EncoderModule'),
    (dict(quantizer=dict(name=LFQ, bits=0)), 'quantizer.bits=0'),
    (dict(decoder=dict(name='symmetric')), 'symmetric'),
    (
      dict(quantizer=dict(name='residual', quantizer=dict(name=LFQ))),
      'model.quantizer.quantizer.name "own_parts',
    ),
  ],
)
def test_a_section_that_is_wrong(sections, words):
  with pytest.raises(UserError, match=words):
    vqrae_jax.build_tokenizer(model(**sections))


@pytest.mark.parametrize(
  'losses, words',
  [
    (dict(edge=1.0), 'unknown "losses.edge"'),
    (
      dict(edge=dict(weight=1.0, fn='edge')),
      'losses.edge.fn=.*module:function',
    ),
    (dict(l2=dict(weight=1.0, fn='own_parts.edge:edge')), '"losses.l2.fn"'),
    (dict(edge=dict(LOSSES['edge'], on='pixels')), 'losses.edge.on=.*images'),
    (dict(edge=dict(LOSSES['edge'], fn='own_parts.edge:edges')), '"edge"'),
    (dict(edge=dict(weight=1.0, fn=f'{HERE}:HERE')), 'is no function'),
    (dict(edge=dict(weight=1.0, fn=f'{HERE}:Transposed')), 'is no function'),
    (dict(row=dict(weight=1.0, fn=f'{HERE}:a_row')), r'losses.row .*\[4\]'),
    (dict(pair=dict(weight=1.0, fn=f'{HERE}:a_pair')), 'losses.pair .*tuple'),
  ],
)
def test_a_loss_that_is_wrong(losses, words, tmp_path):
  folder = runs.images(tmp_path / 'photos')
  config = runs.plain(folder, model=tiny.model('fsq-cosmos', depth=1))
  with pytest.raises(UserError, match=words):
    runs.setup(config | dict(losses=losses, batch_size=4))


class Transposed(EncoderModule):
  patch_size: int = 8
  latent_dim: int = 4

  def __call__(self, images):
    return jnp.zeros(
      (len(images), images.shape[2] // 8, images.shape[1] // 8, 4)
    )


class NoPatch(EncoderModule):
  latent_dim: int = 4


class BatchNormed(Transposed):
  @nn.compact
  def __call__(self, images):
    self.variable('batch_stats', 'mean', jnp.zeros, ())
    return jnp.zeros(
      (len(images), images.shape[1] // 8, images.shape[2] // 8, 4)
    )


class Uncounted(quantizers.LFQ):
  def _stats(self, z, indices, train):
    return {}


class Beyond(quantizers.LFQ):
  def _assign(self, z, train, random):
    z, indices = super()._assign(z, train, random)
    return z, 2 * indices


class Moved(quantizers.LFQ):
  """A default of its own, of a field that older tokenizers lack."""

  entropy_gamma: float = 2.0


class Rounded(quantizers.FSQ):
  """With FSQ's own defaults."""


@pytest.mark.parametrize(
  'section, words',
  [
    (
      dict(encoder='Transposed'),
      r'float32\[2, 3, 2, 4\].*float32\[2, 2, 3, 4\]',
    ),
    (dict(encoder='NoPatch'), 'NoPatch.patch_size'),
    (dict(encoder='BatchNormed'), 'batch_stats'),
    (
      dict(quantizer='Uncounted'),
      r'nothing as call.*counts.*int32\[1, 16384\]',
    ),
  ],
)
def test_a_class_that_does_something_else(section, words):
  named = {k: dict(name=f'{HERE}:{v}') for k, v in section.items()}
  with pytest.raises(UserError, match=words):
    vqrae_jax.build_tokenizer(model(**named))


def test_indices_beyond_the_codebook_are_refused_before_training(run):
  _, config = run
  config = config | dict(model=model(quantizer=dict(name=f'{HERE}:Beyond')))
  with pytest.raises(UserError, match=r'indices from \d+ to \d+.*is 16384'):
    loop.dry_run(config)


@pytest.mark.parametrize('kind', tiny.FORMS)
def test_ours_pass_the_check_of_others(kind):
  quantizer = quantizers.build(tiny.quantizer(kind), 32, 'bfloat16')
  quantizers.check_quantizer(quantizer, 'model.quantizer')


def test_a_default_of_its_own_is_recorded():
  for gamma in (1.0, 2.0):  # as older tokenizers have it, and its own
    section = dict(name=f'{HERE}:Moved', entropy_gamma=gamma)
    tokenizer = vqrae_jax.build_tokenizer(model(quantizer=section))
    assert vqrae_jax.build_tokenizer(describe(tokenizer)) == tokenizer
  section = dict(name=f'{HERE}:Rounded', levels=(8, 5, 4))
  tokenizer = vqrae_jax.build_tokenizer(model(quantizer=section))
  assert 'entropy_temperature' not in describe(tokenizer)['quantizer']


def test_packages_are_told_apart():
  """ "own" is no prefix of "own_parts", and a module may be trusted alone."""
  assert plugins.load(LFQ, 'key', ('own_parts.lfq',)).__name__ == 'LFQ'
  with pytest.raises(UserError, match='"own_parts"'):
    plugins.load(LFQ, 'key', ('own', 'own_parts.lf', 'parts'))
  with pytest.raises(UserError, match='is code of the package "os"'):
    plugins.load('os:system', 'key', ())
  assert isinstance(plugins.load('os:path', 'key', ('os',)), types.ModuleType)
