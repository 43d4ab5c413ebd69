"""Where encoders come from: the table, folders, files, the hub's cache."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqrae_jax
from tests.encoders import references
from tests.encoders.conftest import COMMIT
from tests.encoders.references import saved
from tests.golden import make_encoder_params as golden
from vqrae_jax import encoders, sharding
from vqrae_jax.errors import UserError
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import encoders as pretrained
from vqrae_jax.specs import EncoderSpec, build_spec
from vqrae_jax.weights import hub
from vqrae_jax.weights.files import LazyArray, WeightFile, open_weights
from vqrae_jax.weights.load import Pretrained

torch = pytest.importorskip('torch')
safetensors_torch = pytest.importorskip('safetensors.torch')
load_file = safetensors_torch.load_file
save_file = safetensors_torch.save_file


def check_refused(words, *args, **kwargs):
  """`load_encoder` refuses in one line that has the words."""
  with pytest.raises(UserError) as caught:
    vqrae_jax.load_encoder(*args, **kwargs)
  message = str(caught.value)
  assert '\n' not in message
  for word in (words,) if isinstance(words, str) else words:
    assert word in message


def kind_of(name):
  """A row's reference; None where config.json does not tell a row from others:
  SigLIP2 of a fixed size from SigLIP, nor other pixel norms."""
  giant = '-swiglu' if name.endswith('giant') else ''
  kinds = {
    'siglip2.*naflex': 'naflex',
    'siglip2': None,
    'siglip': 'siglip',
    'dinov3.*sat493m|clip-vit-l-14-laion': None,
    'dinov3.*7b': 'dinov3-7b',
    'dinov3.*plus': 'dinov3-gated',
    'dinov3': 'dinov3',
    'dinov2-with': f'dinov2-registers{giant}',
    'dinov2': f'dinov2{giant}',
    'vit-mae': 'mae',
    'internvit-300m': 'internvit-300m',
    'internvit-6b': 'internvit-6b',
    'clip.*laion': 'clip-laion',
    'clip': 'clip',
  }
  return next(kind for words, kind in kinds.items() if re.match(words, name))


@pytest.mark.parametrize('name', filter(kind_of, encoders.ENCODERS))
def test_config_json_agrees_with_the_row(name):
  """As transformers writes it, its defaults left out; rows and readers are
  written separately. A remainder of the image's size belongs to no patch."""
  want = golden.spec_of(name)
  sizes = references.sizes_of(want.vit)
  sizes['pixels'] += 6 * ('naflex' not in name)
  config = references.config(kind_of(name), **sizes).to_diff_dict()
  have = encoders.fields_of(config, name)
  assert build_spec(EncoderSpec, have, name) == want
  around = config['model_type'].removesuffix('_vision_model')
  if around != config['model_type']:
    config = dict(model_type=around, vision_config=config)
  elif name == 'internvit-6b-448px-v2_5':  # as its authors wrote it
    config = dict(model_type='intern_vit_6b', num_hidden_layers=45)
    config |= dict(image_size=448)
  assert encoders.fields_of(config, name) == have


def _published(name):
  return name.startswith(('dinov3-', 'clip-')) and kind_of(name)


@pytest.mark.parametrize('name', filter(_published, encoders.ENCODERS))
def test_names_and_shapes_at_full_size(name):
  """Every array of transformers' model, but the mask token, is a leaf's, and
  the other way round."""
  spec, kind = golden.spec_of(name), kind_of(name)
  with torch.device('meta'):
    model = references.build(kind, **references.sizes_of(spec.vit))
  shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
  if kind.startswith('dinov3'):  # as its files have them
    shapes = {k.removeprefix('model.'): shape for k, shape in shapes.items()}
  arrays = {k: LazyArray(s, np.dtype('f4'), None) for k, s in shapes.items()}
  image = jnp.zeros((1, spec.vit.patch_size, spec.vit.patch_size, 3))
  target = jax.eval_shape(Encoder(spec).init, jax.random.key(0), image)
  table = encoders.key_format(shapes, name).table(spec, shapes)
  fit = Pretrained(WeightFile(name, arrays), table, target['params'])
  assert {*fit.ignored} <= {'embeddings.mask_token'}


@pytest.mark.parametrize(
  'change',
  (
    dict(key_bias=True, query_bias=False),
    dict(proj_bias=False),
    dict(rope_theta=1e4),
    dict(use_gated_mlp=True),
  ),
)
def test_a_dinov3_that_nobody_published(change):
  with pytest.raises(UserError, match='bias|rope_theta|hidden_act'):
    encoders.fields_of(dict(model_type='dinov3_vit') | change, 'x')


def test_a_config_with_infinity():
  config = dict(model_type='dinov2', mlp_ratio=float('inf'))
  with pytest.raises(UserError, match='x cannot be read .*infinity'):
    encoders.fields_of(config, 'x')


@pytest.mark.parametrize('revision', ('', '@main', f'@{COMMIT}'))
def test_a_hub_id_in_the_cache(cached, revision):
  snapshot = cached('someone/tiny', saved('siglip').iterdir())
  found = pretrained.find_encoder(f'hf:someone/tiny{revision}')
  assert (found.path, found.revision) == (snapshot.resolve(), COMMIT)


def test_what_diffusers_writes_in_the_cache(cached, tmp_path):
  file = tmp_path / 'diffusion_pytorch_model.safetensors'
  save_file({'a': torch.ones(2)}, file)
  cached('a/b', [file])
  folder, _ = hub.snapshot('a/b', None)
  assert open_weights(folder).keys() == {'a'}


def test_a_row_in_the_cache(cached):
  """Its repository's config.json is compared with the row's numbers."""
  name = 'siglip-base-patch16-224'
  cached(f'google/{name}', saved('siglip').iterdir())
  check_refused((name, 'vit.width=32, not 768'), name)


def test_a_command_downloads_what_the_cache_lacks(cached):
  command = 'hf download facebook/dinov2-base'
  check_refused(command, 'dinov2-base')
  check_refused(f'{command} --r', 'hf:facebook/dinov2-base@v1')
  cached('a/b', [saved('siglip') / 'config.json'])
  check_refused(('model.safetensors', 'hf download a/b'), 'hf:a/b')


def test_onto_a_mesh_and_into_another_type():
  mesh = sharding.make_mesh('fsdp+tp', tensor=2)
  folder = str(saved('siglip'))
  _, plain = vqrae_jax.load_encoder(folder)
  encoder, variables = vqrae_jax.load_encoder(
    folder, mesh=mesh, param_dtype='bfloat16', dtype='bfloat16', remat=True
  )
  assert encoder.spec.vit.dtype == 'bfloat16' and encoder.spec.vit.remat
  placed = sharding.shardings_for({'encoder': variables['params']}, mesh)
  placed = trees.flatten(placed['encoder'])
  want = trees.flatten(plain['params'])
  for name, leaf in trees.flatten(variables['params']).items():
    assert leaf.sharding == placed[name] and leaf.dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaf, want[name].astype(jnp.bfloat16))


def test_files_that_do_not_fit(copy):
  file = copy / 'model.safetensors'
  state = load_file(file)
  state |= {'post_layernorm.bias': torch.ones(9), 'more': torch.ones(1)}
  save_file(state, file)
  words = 'more', 'post_layernorm.bias', '(9,)', '(32,)', 'SigLIP'
  check_refused(words, str(copy))
  file.unlink()
  check_refused('no weights', str(copy))


@pytest.mark.parametrize(
  'config, words',
  [
    ('{', 'config.json'),
    ('[' * 100_000, 'config.json'),
    ('{"format_version": 1}', 'load_tokenizer'),
    # A list of the families, not the nearest name ("siglip_vision_model").
    ('{"model_type": "blip_vision_model"}', ('dinov2', 'vit_mae')),
    ('{}', ('model_type', 'siglip_vision_model')),
    ('{"_class_name": "AutoencoderRAE"}', ('AutoencoderRAE', 'dinov2')),
    ('{"model_type": "siglip", "vision_config": "x"}', 'config.json'),
    ('{"model_type": "dinov2", "hidden_size": "x"}', 'dinov2'),
    ('{"model_type": "dinov2", "hidden_size": 1.5}', 'width=1.5'),
    ('{"model_type": "vit_mae", "image_size": [8, 9]}', '[8, 9]'),
    ('{"model_type": "vit_mae", "hidden_act": "gelo"}', '"gelu"'),
    ('{"model_type": "dinov2", "patch_size": 4}', 'SigLIP'),
  ],
)  # fmt: skip
def test_wrong_configs(copy, config, words):
  (copy / 'config.json').write_text(config)
  check_refused(words, str(copy))


def test_sources_that_name_nothing(copy):
  (copy / 'config.json').unlink()
  file = str(copy / 'model.safetensors')
  save_file({'x': torch.ones(2)}, copy / 'x.safetensors')
  for source, words in (
    ('siglip-large', 'did you mean "siglip-large-patch16-'),
    ('./nowhere', 'nowhere'),
    ('rae:x.pt', 'hf:ORG/NAME'),
    (str(copy), ('config.json', 'row=')),
    (file, ('config.json', 'row=')),
  ):
    check_refused(words, source)
  check_refused('does not fit', file, row='siglip-base-patch16-224')
  check_refused('did you mean', file, row='siglip-base')
  check_refused('not "vit-mae-base"', 'dinov2-base', row='vit-mae-base')
  check_refused('InternViT', str(copy / 'x.safetensors'), row='dinov2-base')
  folder = str(saved('siglip'))
  check_refused('did you mean "plain"', folder, 'plane')
  check_refused('did you mean "dtype"', folder, dtyp='bfloat16')
  check_refused('did you mean "float32"', folder, param_dtype='f32')
