"""Trees of arrays by leaf name: "encoder/blocks/mlp/fc1/kernel".

Names join the keys of nested dicts and the fields of struct dataclasses with
"/". A regex must match the full name (`re.fullmatch`), and the first row that
matches claims the leaf.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from vqrae_jax.errors import UserError, did_you_mean

_name = functools.partial(jax.tree_util.keystr, simple=True, separator='/')


def flatten(tree: Any) -> dict[str, Any]:
  """{leaf name: leaf}, in the tree's own order."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {_name(path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict:
  """Nested dicts from {leaf name: leaf}: `flatten`'s inverse for dicts."""
  return traverse_util.unflatten_dict(dict(leaves), sep='/')


def map_named(fn: Callable[[str, Any], Any], tree: Any) -> Any:
  """`jax.tree.map` with the leaf's name as first argument."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: fn(_name(path), leaf), tree
  )


def first_match(
  rows: Sequence[tuple[str, Any]], names: Sequence[str], what: str
) -> dict[str, Any]:
  """{name: value of the first row whose regex matches the full name}.

  Raises:
    UserError: a name that no row claims, an invalid regex, or a row other than
      ".*" that claims nothing: it matches no name, or earlier rows claim all
      that it matches.
  """
  compiled = []
  for pattern, value in rows:
    try:
      compiled.append((re.compile(pattern), value))
    except re.error as e:
      raise UserError(f'{what}: "{pattern}" is no regex ({e})') from None
  claimed, unclaimed, used = {}, [], set()
  for name in names:
    matching = [i for i, (r, _) in enumerate(compiled) if r.fullmatch(name)]
    if matching:
      claimed[name] = compiled[matching[0]][1]
      used.add(matching[0])
    else:
      unclaimed.append(name)
  if unclaimed:
    raise UserError(
      f'no row of {what} claims {len(unclaimed)} leaves: '
      f'{", ".join(unclaimed[:4])}{" …" if len(unclaimed) > 4 else ""}; '
      'add a row (".*" claims the rest)'
    )
  for i, (regex, _) in enumerate(compiled):
    if i in used or regex.pattern == '.*':
      continue
    if any(regex.fullmatch(name) for name in names):
      raise UserError(
        f'{what}: earlier rows claim all that "{regex.pattern}" matches; '
        'put it before them'
      )
    raise UserError(
      f'{what}: "{regex.pattern}" matches no leaf'
      f'{did_you_mean(regex.pattern, names)}'
    )
  return claimed


def merge(*parts: Mapping[str, Any]) -> dict:
  """Nested dicts from disjoint flat parts."""
  return unflatten({n: leaf for part in parts for n, leaf in part.items()})


def check_same(target: Any, source: Any, what: str) -> None:
  """Checks that both trees have the same leaf names and shapes.

  Args:
    target: the expected tree, of arrays or ShapeDtypeStructs.
    source: the tree to check.
    what: where `source` comes from, for the error.

  Raises:
    UserError: lists leaves that are missing, unknown or of another shape.
  """
  want, have = flatten(target), flatten(source)
  report = [f'missing {n} {want[n].shape}' for n in want.keys() - have.keys()]
  report += [f'unknown {n} {have[n].shape}' for n in have.keys() - want.keys()]
  report += [
    f'{n} is {have[n].shape}, not {want[n].shape}'
    for n in want.keys() & have.keys()
    if tuple(have[n].shape) != tuple(want[n].shape)
  ]
  if report:
    shown = '; '.join(sorted(report)[:6])
    more = f'; and {len(report) - 6} more' if len(report) > 6 else ''
    raise UserError(f'{what} does not fit the model: {shown}{more}')
