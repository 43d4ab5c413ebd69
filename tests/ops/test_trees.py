"""Leaf names, first matches, and reports of misfits."""

import jax.numpy as jnp
import pytest

from vqrae_jax.errors import UserError
from vqrae_jax.ops import trees

TREE = {'a': {'b': jnp.ones(2), 'c': jnp.zeros(3)}, 'd': jnp.ones(1)}


def test_names_round_trip():
  flat = trees.flatten(TREE)
  assert list(flat) == ['a/b', 'a/c', 'd']
  assert trees.unflatten(flat)['a']['c'] is TREE['a']['c']


def test_merge_nests_flat_parts():
  rest = trees.flatten(TREE)
  kept = {name: rest.pop(name) for name in ('a/b', 'a/c')}
  assert set(trees.merge(kept, rest)) == {'a', 'd'}


def test_the_first_row_that_matches_whole_claims():
  rows = [('a/b', 1), ('a/.*', 2), ('.*', 3)]
  found = trees.first_match(rows, list(trees.flatten(TREE)), 'rows')
  assert found == {'a/b': 1, 'a/c': 2, 'd': 3}


@pytest.mark.parametrize(
  'rows, words',
  [
    ([('a/.*', 1)], r'no row of rows claims 1 leaves: d; add a row'),
    ([('a/q', 1), ('.*', 2)], '"a/q" matches no leaf; did you mean'),
    ([('a/(', 1)], 'is no regex'),
    ([('.*', 1), ('a/b', 2)], 'earlier rows claim all that "a/b"'),
    ([('a', 1), ('.*', 2)], '"a" matches no leaf'),
  ],
)
def test_rows_that_cannot_be_right(rows, words):
  with pytest.raises(UserError, match=words):
    trees.first_match(rows, list(trees.flatten(TREE)), 'rows')


def test_a_misfit_shows_both_sides():
  trees.check_same(TREE, {**TREE}, 'file')
  source = {'a': {'b': jnp.ones(4), 'x': jnp.ones(1)}, 'd': jnp.ones(1)}
  with pytest.raises(UserError) as error:
    trees.check_same(TREE, source, 'file F')
  for word in ('file F', 'a/b is (4,), not (2,)', 'missing a/c', 'unknown a/x'):
    assert word in str(error.value)
