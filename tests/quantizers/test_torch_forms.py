"""The law, for the forms that only checkpoints of the PyTorch project have."""

import functools

import jax
import numpy as np
import pytest

import vqrae_jax
from tests import tiny
from vqrae_jax import sharding
from vqrae_jax.errors import UserError
from vqrae_jax.models.tokenizer import build_tokenizer, describe
from vqrae_jax.ops import trees

LEVELS = dict(levels=(8, 5, 4), projection=True)
COSINE = dict(distance='cosine', projection=False, code_dim=32)
FORMS = {
  'mlp to fourier': (
    'fsq-centered',
    dict(adapter_in='mlp', adapter_out='fourier', bound='clip', **LEVELS),
  ),
  'clip': ('fsq-centered', dict(bound='clip', **LEVELS)),
  'rows': ('simvq-cosine', dict(code_scale='none', **COSINE)),
  'unit': ('simvq-cosine', dict(code_scale='unit', token_map=True, **COSINE)),
}


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
@pytest.mark.parametrize('form', FORMS)
def test_the_law(form, dtype):
  kind, fields = FORMS[form]
  tokenizer, variables = tiny.built(tiny.model(kind, 1, dtype=dtype, **fields))
  images = tiny.images(2)

  @functools.partial(jax.jit, compiler_options=tiny.AS_USERS)
  def all_of(variables, images):
    out = vqrae_jax.reconstruct(tokenizer, variables, images)
    indices = vqrae_jax.encode_to_indices(tokenizer, variables, images)
    look = tokenizer.apply(
      variables,
      method=lambda t: (
        t.quantizer.indices_to_codes(indices),
        t.quantizer.codes_to_indices(out.quantizer.codes),
      ),
    )
    return out, indices, *look

  out, indices, codes, again = all_of(variables, images)
  assert len(np.unique(indices)) > 2
  np.testing.assert_array_equal(out.quantizer.indices, indices)
  np.testing.assert_array_equal(again, indices)
  assert (
    np.asarray(codes).tobytes() == np.asarray(out.quantizer.codes).tobytes()
  )
  decode = jax.jit(
    vqrae_jax.decode_from_indices,
    static_argnums=0,
    compiler_options=tiny.AS_USERS,
  )
  painted = decode(tokenizer, variables, indices)
  rec = np.clip(np.asarray(out.images), 0, 1)
  assert rec.tobytes() == np.asarray(painted).tobytes()
  mesh = sharding.make_mesh('fsdp')
  for name, leaf in trees.flatten(variables).items():
    sharding.spec_for(name, leaf.shape, mesh)
  assert build_tokenizer(describe(tokenizer) | dict(dtype=dtype)) == tokenizer


def test_defaults_stay_out_of_a_config():
  found = describe(build_tokenizer(tiny.model('simvq-l2')))['quantizer']
  assert not {'code_scale', 'token_map'} & found.keys()


@pytest.mark.parametrize(
  'kind, fields, words',
  [
    ('fsq-centered', dict(bound='tan'), 'did you mean "tanh"'),
    ('fsq-centered', dict(adapter_in='mlp'), 'set quantizer.bound="clip"'),
    ('fsq-cosmos', dict(bound='clip'), 'convention="centered"'),
    (
      'fsq-centered',
      dict(adapter_out='fourier', projection=False),
      'set quantizer.projection=True',
    ),
    ('simvq-l2', dict(code_scale='unit'), 'distance="cosine"'),
    ('simvq-cosine', dict(code_scale='one'), 'code_scale='),
  ],
)
def test_what_cannot_go_together(kind, fields, words):
  with pytest.raises(UserError, match=words):
    build_tokenizer(tiny.model(kind, **fields))
