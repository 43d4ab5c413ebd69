"""Where encoders come from: words, folders, files, the hub's cache, misfits."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vqrae_jax
from tests.encoders import references
from tests.encoders.conftest import COMMIT, cached
from vqrae_jax import encoders, sharding
from vqrae_jax.encoders import published
from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import encoders as pretrained
from vqrae_jax.specs import EncoderSpec, build_spec

SIZES = dict(width=32, depth=2, heads=4, mlp=48, pixels=16, patch=4)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A tiny SigLIP as `save_pretrained` writes it."""
  path = tmp_path_factory.mktemp('siglip')
  references.make('siglip', **SIZES).save_pretrained(path)
  return path


@pytest.fixture
def copy(folder, tmp_path):
  """The same, to be spoiled."""
  for name in ('config.json', 'model.safetensors'):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  return tmp_path


def refused(*args, **kwargs):
  with pytest.raises(UserError) as caught:
    vqrae_jax.load_encoder(*args, **kwargs)
  message = str(caught.value)
  assert '\n' not in message
  return message


def test_every_row_was_published_somewhere():
  assert published.PUBLISHED.keys() == encoders.ENCODERS.keys()
  for name, p in published.PUBLISHED.items():
    assert p.hub.split('/')[1].lower() == name
    assert published.row_of(p.hub) == name
    assert p.licence and p.url.endswith(p.hub)
  assert published.PUBLISHED['internvit-300m-448px-v2_5'].hub == (
    'OpenGVLab/InternViT-300M-448px-V2_5'
  )


def test_config_json_says_what_the_rows_say():
  """Rows and readers were written apart; here they meet."""
  import transformers as t

  giant = dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24)
  six = dict(image_size=448, num_hidden_layers=45, layer_norm_eps=1e-6)
  configs = {
    'siglip-base-patch16-224': dict(
      model_type='siglip', vision_config=dict(model_type='siglip_vision_model')
    ),
    'siglip-so400m-patch14-384': t.SiglipVisionConfig(
      hidden_size=1152,
      num_hidden_layers=27,
      num_attention_heads=16,
      intermediate_size=4304,
      image_size=384,
      patch_size=14,
    ).to_dict(),
    'siglip2-base-patch16-naflex': dict(model_type='siglip2', vision_config={}),
    'dinov2-base': t.Dinov2Config(image_size=518).to_dict(),
    'dinov2-with-registers-giant': t.Dinov2WithRegistersConfig(
      **giant, image_size=518, patch_size=14, use_swiglu_ffn=True
    ).to_dict(),
    'vit-mae-base': t.ViTMAEConfig().to_dict(),
    'internvit-6b-448px-v2_5': dict(model_type='intern_vit_6b', **six),
    'internvit-300m-448px': t.InternVLVisionConfig(
      attention_bias=True, image_size=[448, 448]
    ).to_dict(),
  }
  for name, config in configs.items():
    told = encoders.fields_of(config, name)
    want = build_spec(EncoderSpec, encoders.ENCODERS[name], name)
    assert build_spec(EncoderSpec, told, name) == want, name


@pytest.mark.parametrize('revision', ('', '@main', f'@{COMMIT}'))
def test_a_hub_id_out_of_the_cache(cache, folder, revision):
  files = {p.name: p for p in folder.iterdir()}
  snapshot = cached(cache, 'someone/tiny-siglip', files)
  found = pretrained.find_encoder(f'hf:someone/tiny-siglip{revision}')
  assert (found.path, found.revision) == (snapshot.resolve(), COMMIT)
  encoder, _ = vqrae_jax.load_encoder(f'hf:someone/tiny-siglip{revision}')
  assert encoder.spec.vit.width == 32


def test_a_row_out_of_the_cache(cache, folder, monkeypatch):
  """Its repository's config.json is held to the row's numbers."""
  files = {p.name: p for p in folder.iterdir()}
  cached(cache, 'google/siglip-base-patch16-224', files)
  message = refused('siglip-base-patch16-224')
  assert 'is not the encoder siglip-base-patch16-224: it has' in message
  assert 'vit.width=32, not 768' in message


def test_what_the_cache_lacks_is_brought_by_a_command(cache, folder):
  for word, at in (('dinov2-base', ''), ('hf:facebook/dinov2-base@v1', ' --r')):
    message = refused(word)
    assert f'hf download facebook/dinov2-base{at}' in message
    assert 'where there is a network' in message
  cached(cache, 'a/b', {'config.json': folder / 'config.json'})
  message = refused('hf:a/b')
  assert 'hf download a/b' in message


def test_shards_and_torch_files(copy):
  state = load_file(copy / 'model.safetensors')
  want = trees.flatten(vqrae_jax.load_encoder(str(copy))[1])
  (copy / 'model.safetensors').unlink()
  torch.save(state, copy / 'pytorch_model.bin')
  from_torch = trees.flatten(vqrae_jax.load_encoder(str(copy))[1])
  keys = sorted(state)
  parts = {'a.safetensors': keys[:9], 'b.safetensors': keys[9:]}
  for name, part in parts.items():
    save_file({k: state[k] for k in part}, copy / name)
  where = {k: name for name, part in parts.items() for k in part}
  index = copy / 'model.safetensors.index.json'
  index.write_text(json.dumps(dict(weight_map=where)))
  from_shards = trees.flatten(vqrae_jax.load_encoder(str(copy))[1])
  for name, leaf in want.items():
    np.testing.assert_array_equal(leaf, from_torch[name])
    np.testing.assert_array_equal(leaf, from_shards[name])


@pytest.mark.parametrize('layout', ('dp', 'fsdp', 'fsdp+tp'))
def test_onto_a_mesh_and_into_another_type(folder, layout):
  mesh = sharding.make_mesh(layout, tensor=2 if layout == 'fsdp+tp' else 1)
  _, plain = vqrae_jax.load_encoder(str(folder))
  encoder, variables = vqrae_jax.load_encoder(
    str(folder), mesh=mesh, param_dtype='bfloat16', dtype='bfloat16', remat=True
  )
  assert encoder.spec.vit.dtype == 'bfloat16' and encoder.spec.vit.remat
  places = sharding.shardings_for({'encoder': variables['params']}, mesh)
  places = trees.flatten(places['encoder'])
  want = trees.flatten(plain['params'])
  for name, leaf in trees.flatten(variables['params']).items():
    assert leaf.sharding == places[name] and leaf.dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaf, want[name].astype(jnp.bfloat16))
  x = np.zeros((8, 16, 16, 3), np.float32)
  with jax.set_mesh(mesh):
    out = jax.jit(encoder.apply)(variables, x)
  assert out.shape == (8, 4, 4, 32) and np.isfinite(out).all()


def test_a_lone_encoder_floors_its_grid(folder):
  encoder, variables = vqrae_jax.load_encoder(str(folder))
  x = np.random.default_rng(0).random((1, 19, 23, 3), np.float32)
  out = encoder.apply(variables, x)
  assert out.shape == (1, 4, 5, 32)
  np.testing.assert_array_equal(out, encoder.apply(variables, x[:, :16, :20]))


def test_what_is_left_out_has_a_reason(folder):
  found = pretrained.find_encoder(str(folder))
  for output_norm, word in (('affine', 'head'), ('plain', 'post_layernorm')):
    spec = pretrained.spec_of(found, output_norm)
    skipped = pretrained.fit_encoder(found, spec).ignored
    assert all(skipped.values())
    assert any(key.startswith(word) for key in skipped)


def spoiled(copy, **changes):
  state = load_file(copy / 'model.safetensors')
  state |= {k.replace('__', '.'): v for k, v in changes.items()}
  state = {k: v for k, v in state.items() if v is not None}
  save_file(state, copy / 'model.safetensors')
  return refused(str(copy))


def test_files_that_do_not_fit(copy):
  whole = (copy / 'model.safetensors').read_bytes()
  nan = torch.full((32,), float('nan'))
  assert 'NaN' in spoiled(copy, post_layernorm__bias=nan)
  (copy / 'model.safetensors').write_bytes(whole)
  message = spoiled(copy, post_layernorm__bias=None)
  assert 'missing in it: post_layernorm.bias' in message
  (copy / 'model.safetensors').write_bytes(whole)
  message = spoiled(copy, post_layernorm__bias=torch.ones(9), more=nan)
  assert 'unknown to the model: more' in message
  assert 'post_layernorm.bias is (9,), the model wants (32,)' in message
  assert 'the file has the names of SigLIP' in message
  (copy / 'model.safetensors').write_bytes(whole[:-100])
  assert 'truncated or damaged' in refused(str(copy))
  (copy / 'model.safetensors').unlink()
  assert 'no weights in' in refused(str(copy))


@pytest.mark.parametrize(
  'config, words',
  [
    ('{', 'config.json is no JSON'),
    ('[]', 'no section of keys'),
    ('{"format_version": 1}', 'is a tokenizer; load_tokenizer opens it'),
    ('{"model_type": "dinov3"}', '\'dinov3\' is no encoder .*mean "dinov2"'),
    ('{}', 'model_type None is no encoder known here; there are'),
    ('{"model_type": "dinov2", "hidden_size": "x"}', 'cannot be read as a'),
    ('{"model_type": "dinov2", "hidden_size": 1.5}', 'width=1.5 must be'),
    ('{"model_type": "vit_mae", "image_size": [8, 9]}', 'is no square'),
    (
      '{"model_type": "vit_mae", "hidden_act": "gelo"}',
      'unknown hidden_act "gelo"; did you mean "gelu"',
    ),
    ('{"model_type": "dinov2", "patch_size": 4}', 'names of SigLIP'),
  ],
)
def test_configs_that_say_something_else(copy, config, words):
  (copy / 'config.json').write_text(config)
  assert re.search(words, refused(str(copy)))


def test_words_that_name_nothing(folder, copy):
  (copy / 'config.json').unlink()
  file = str(copy / 'model.safetensors')
  save_file({'x': torch.ones(2)}, copy / 'x.safetensors')
  for args, words in (
    (['siglip-large'], 'did you mean "siglip-large-patch16-'),
    (['./nowhere'], 'no encoder at nowhere: there is no such file'),
    (['rae:x.pt'], 'is no encoder; write hf:'),
    (['hf:x'], 'is no hub id'),
    ([''], 'an empty source'),
    ([str(copy)], 'has no config.json, so what it holds is unknown'),
    ([file], 'is a file, which does not say what it holds'),
  ):
    assert words in refused(*args)
  assert 'does not fit' in refused(file, row='siglip-base-patch16-224')
  assert 'did you mean' in refused(file, row='siglip-base')
  path = str(copy / 'x.safetensors')
  assert 'no key that tells' in refused(path, row='dinov2-base')
  assert 'did you mean "plain"' in refused(str(folder), 'plane')
  assert 'did you mean "dtype"' in refused(str(folder), dtyp='bfloat16')
  assert 'did you mean "float32"' in refused(str(folder), param_dtype='f32')
