"""The trees that no step moves: the networks that losses look through, and
the hashes by which a run that goes on knows that all of them are the same.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vqrae_jax import export
from vqrae_jax.errors import UserError
from vqrae_jax.losses import dino_weights, networks
from vqrae_jax.ops import trees
from vqrae_jax.types import Frozen


def networks_of(
  terms: list[str], adversary: Any, kind: str
) -> tuple[dict[str, Any], str]:
  """({leaf name: array} of the networks of losses and discriminator, in words).

  Args:
    terms: the losses that have one.
    adversary: the second player, or None.
    kind: the config's `init.networks`; "random" leaves the seed's.

  Raises:
    UserError: a file that is not here (with the command that brings it, and
      the way out), or is another.
  """
  backbone = getattr(adversary and adversary.module, 'backbone', None)
  names = terms + ['discriminator'] * (backbone is not None)
  if not names:
    return {}, ''
  if kind == 'random':
    where = ', '.join(names)
    return {}, f'RANDOM networks in {where} (init.networks="random")'
  leaves = {}
  try:
    for term in terms:
      tree = {'losses': {term: networks.load(term)}}
      leaves |= trees.flatten(tree)
  except UserError as e:
    raise UserError(
      f'losses.{term}: {e}, or train on random features: '
      '--config.init.networks=random'
    ) from None
  if backbone is not None:
    try:
      tree = {'discriminator': dino_weights.load_backbone(backbone)}
    except UserError as e:
      raise UserError(
        f'discriminator: {e}, or take the one without a backbone: '
        '--config.discriminator.name=patch'
      ) from None
    leaves |= trees.flatten(tree)
  return leaves, f'published networks in {", ".join(names)}'


def hash_frozen(
  frozen: Frozen, read: Callable[[Any], np.ndarray] = np.asarray
) -> dict[str, str]:
  """{tree's name: SHA-256 by the fingerprint's recipe} of what is there.

  Args:
    frozen: the trees that no step moves.
    read: brings one array to the host.
  """
  named = {f.name: getattr(frozen, f.name) for f in dataclasses.fields(frozen)}
  return {
    name: export.fingerprint({}, trees.flatten(tree), read)
    for name, tree in named.items()
    if tree
  }


def check_frozen(
  hashes: Mapping[str, str], recorded: Mapping[str, Any], where: str
) -> None:
  """The frozen trees at hand are those that a checkpoint was made with.

  Args:
    hashes: from `hash_frozen`.
    recorded: the manifest's {name: {"sha256": …, "source": …}}.
    where: for the error.

  Raises:
    UserError: another hash, or other trees.
  """
  for name in sorted(hashes.keys() | recorded.keys()):
    have = hashes.get(name, 'absent')
    want = recorded.get(name, {'sha256': 'absent', 'source': 'nowhere'})
    if have != want['sha256']:
      at = f' at {want["revision"]}' if want.get('revision') else ''
      raise UserError(
        f'{where}: the frozen tree "{name}" is not the one that the '
        f'checkpoint was made with: SHA-256 {have[:12]}…, not '
        f'{want["sha256"][:12]}… from {want["source"]}{at}; bring that back, '
        'or begin a new run with init_from'
      )
