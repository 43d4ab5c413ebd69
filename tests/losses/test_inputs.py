"""Every image loss checks its inputs: types, shapes, ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.test_perceptual import pair, tiny
from vqrae_jax.errors import UserError
from vqrae_jax.losses import FROZEN_TERMS, IMAGE_TERMS
from vqrae_jax.types import LossInputs

TERMS = IMAGE_TERMS | FROZEN_TERMS


def inputs(term, reconstruction, targets):
  weights = {term: tiny(term)} if term in FROZEN_TERMS else None
  return LossInputs(reconstruction, targets, weights)


# What is done to an image in [0, 1], and what the error names.
WRONG = {
  'uint8': (lambda x: (255 * x).astype(np.uint8), 'uint8'),
  'int32': (lambda x: (255 * x).astype(np.int32), 'int32'),
  'bool': (lambda x: x > 0.5, 'bool'),
  '[-1, 1]': (lambda x: 2 * x - 1, r'\[-1, (1|0\.9+\d*)\]'),
  '[0, 255]': (lambda x: 255 * x, r'\[0, 255\]'),
  'normalized': (lambda x: (x - 0.45) / 0.22, r'\[-2.045, 2.5\]'),
  'NaN': (lambda x: x * np.nan, r'\[nan, nan\]'),
}


def images():
  """[0, 1] to its ends."""
  x = np.array(pair(32, 32, 1)[1])
  x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, 1
  return x


def refused(term, x, words):
  with pytest.raises(UserError, match=words) as e:
    TERMS[term](x)
  assert f'"{term}"' in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('as_array', (np.asarray, jnp.asarray))
@pytest.mark.parametrize('case', WRONG)
def test_wrong_values_are_refused(case, as_array):
  change, words = WRONG[case]
  right, wrong = as_array(images()), as_array(change(images()))
  refused('l1', LossInputs(right, wrong), f'targets .*{words}')
  refused('l1', LossInputs(wrong, right), f'reconstruction .*{words}')


@pytest.mark.parametrize('term', TERMS)
def test_every_term_checks(term):
  x = images()
  refused(term, inputs(term, x, WRONG['uint8'][0](x)), 'targets .*uint8')
  refused(term, inputs(term, x, x[:, :16]), 'of one shape')
  refused(term, inputs(term, x[0], x[0]), r'must be \[b h w 3\]')
  first = x.transpose(0, 3, 1, 2)
  refused(term, inputs(term, first, first), 'channels last')


@pytest.mark.parametrize('term', FROZEN_TERMS)
def test_a_term_without_its_weights_is_named(term):
  for weights in (None, {'other': {}}):
    refused(term, LossInputs(images(), images(), weights), 'weights')


def test_images_too_small_for_lpips():
  x = images()[:, :, :15]
  refused('lpips', inputs('lpips', x, x), '16 pixels a side')


@pytest.mark.parametrize('term', TERMS)
def test_under_a_trace_types_count_and_values_do_not(term):
  x = inputs(term, None, None)

  def loss(a, b):
    return TERMS[term](x.replace(reconstruction=a, targets=b))

  wrong = 255 * images()  # as a decoder, which is not clipped, may leave it
  assert np.isfinite(jax.jit(loss)(images(), wrong))
  with pytest.raises(UserError, match='uint8'):
    jax.jit(loss)(images(), WRONG['uint8'][0](images()))
  # Targets that a traced function closes over are at hand.
  for known in (wrong, jnp.asarray(wrong)):
    with pytest.raises(UserError, match=r'\[0, 255\]'):
      jax.jit(lambda a, b=known: loss(a, b))(images())


@pytest.mark.parametrize('term', TERMS)
def test_half_precision_is_computed_in_f32(term):
  half = jnp.asarray(images(), jnp.bfloat16)
  x = inputs(term, half + 0.1, half)
  assert jax.eval_shape(TERMS[term], x).dtype == jnp.float32
