"""Where a new run's weights come from, when not from its seed alone.

`init_from` names a tokenizer's directory or another run's workdir: of a run,
the averaged weights and the live codebook of its newest checkpoint, with the
leaves it kept frozen made again as that run made them and held against their
hash. What `init` brings part by part is in `parts.py`. No tokenizer is loaded
in part: both sides have the same model and the same leaves, or the run stops
and says where they differ.

Learning rates, optimizer, averages, the discriminator and the step count begin
anew, and the log names what was left behind.
"""

import dataclasses
import json
import pathlib
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax import export
from vqrae_jax.errors import UserError
from vqrae_jax.models.tokenizer import (
  Tokenizer,
  build_tokenizer,
  describe,
)
from vqrae_jax.ops import trees
from vqrae_jax.train import config as config_lib
from vqrae_jax.train.checkpoint import Checkpoints
from vqrae_jax.train.frozen import check_frozen, hash_frozen
from vqrae_jax.train.parts import (
  Given,
  Leaves,
  decoder_from,
  encoder_from,
  latents_from,
  together,
)
from vqrae_jax.types import Frozen


def seed_keys(seed: Any) -> tuple[jax.Array, jax.Array]:
  """(the key of a run's random weights, the key of its steps)."""
  init_key, run_key = jax.random.split(jax.random.key(seed))
  return init_key, run_key


def from_seed(tokenizer: Tokenizer, seed: Any) -> Any:
  """The random variables of a run that begins with this seed; pure."""
  image = jnp.zeros((1, tokenizer.patch_size, tokenizer.patch_size, 3))
  return tokenizer.init(seed_keys(seed)[0], image)


def given_leaves(
  tokenizer: Tokenizer, init_from: str | None, init: config_lib.InitSpec
) -> Given:
  """The leaves that a config brings, on the host.

  Args:
    tokenizer: the new run's.
    init_from, init: the config's keys.

  Raises:
    UserError: nothing to open there, or leaves of another tokenizer.
  """
  if init_from is None:
    parts = []
    if init.encoder is not None:
      parts.append(encoder_from(tokenizer, init.encoder))
    if init.decoder is not None:
      leaves, says = decoder_from(tokenizer, init.decoder)
      parts.append(Given(leaves, says, init.decoder))
    if init.latents is not None:
      parts.append(latents_from(tokenizer, init.latents))
    return together(parts)
  path = pathlib.Path(init_from).expanduser()
  if (path / 'checkpoints').is_dir():
    given = _of_run(tokenizer, path)
  elif (path / 'tokenizer').is_dir() and not (path / export.WEIGHTS).exists():
    given = _of_tokenizer(tokenizer, path / 'tokenizer')
  elif path.is_dir():
    given = _of_tokenizer(tokenizer, path)
  else:
    raise UserError(
      f"init_from={init_from}: there is no such folder; name a run's workdir "
      "or a tokenizer's directory"
    )
  want = trees.flatten(jax.eval_shape(lambda: from_seed(tokenizer, 0)))
  trees.check_same(want, given.leaves, f'init_from={init_from}')
  return given


def still_needed(
  spec: config_lib.RunSpec, parts: Collection[str]
) -> tuple[config_lib.InitSpec, str | None]:
  """`init` and `init_from` of a config without what brings none of `parts`.

  What a checkpoint holds needs no file that may be gone by now.

  Args:
    parts: "encoder", "decoder", … that are to be brought again.
  """
  init = dataclasses.replace(
    spec.init,
    latents=None,
    encoder=spec.init.encoder if 'encoder' in parts else None,
    decoder=spec.init.decoder if 'decoder' in parts else None,
  )
  return init, spec.init_from if parts else None


def _check_model(have: Tokenizer, want: Tokenizer, where: str) -> None:
  """Both compute the same: equal shapes do not say so.

  What only training reads, of the quantizer, may differ.

  Raises:
    UserError: with the first key that differs.
  """
  only = want.quantizer.training_fields
  sides = [trees.flatten(describe(t)) for t in (have, want)]
  names = sides[0].keys() | sides[1].keys()
  # Another quantizer's name says more than its fields.
  for name in sorted(names, key=lambda n: (n != 'quantizer/name', n)):
    one, other = (side.get(name) for side in sides)
    if one != other and name.removeprefix('quantizer/') not in only:
      key = name.replace('/', '.')
      raise UserError(
        f'{where}: that tokenizer has {key}={one}, model.{key} is {other}; '
        'make the two equal'
      )


def with_teacher(
  given: Given, tokenizer: Tokenizer, word: str | None, begins: str | None
) -> Given:
  """`given` with the encoder that teaches, if the config has one.

  Args:
    given: what the run begins with.
    tokenizer: the run's; the teacher is an encoder like its own.
    word: the config's `teacher`.
    begins: the word that the run's own encoder came from, for "init".

  Raises:
    UserError: no such encoder, or another than the tokenizer's.
  """
  if word is None:
    return given
  if word == config_lib.INIT:
    brought, says, source = given, f'the encoder of {begins}', begins
  else:
    brought = encoder_from(tokenizer, word, 'teacher')
    says, source = brought.says, brought.source
  teacher = {
    f'teacher/{name.removeprefix("params/")}': leaf
    for name, leaf in brought.leaves.items()
    if name.startswith('params/encoder/')
  }
  return dataclasses.replace(
    given,
    leaves=given.leaves | teacher,
    says='; '.join(filter(None, (given.says, f'the teacher is {says}'))),
    teacher=(source, brought.revision),
  )


def _of_tokenizer(want: Tokenizer, path: pathlib.Path) -> Given:
  tokenizer, variables = export.load_tokenizer(path)
  _check_model(tokenizer, want, f'init_from={path}')
  leaves = trees.flatten({'params': variables['params']})
  codebook = dict(variables.get('codebook', {}))
  tables = dict(codebook.pop('quantizer', {}))
  tables = tokenizer.quantizer.training_codebook(tables)
  leaves |= trees.flatten({'codebook': codebook | {'quantizer': tables}})
  leaves = jax.tree.map(np.asarray, leaves)
  says = f'all {len(leaves)} leaves of the tokenizer {path}'
  return Given(leaves, says, str(path))


def _of_run(want: Tokenizer, workdir: pathlib.Path) -> Given:
  """The newest checkpoint's averaged weights, live codebook, frozen leaves."""
  path = workdir / 'config.json'
  try:
    spec = config_lib.read_config(json.loads(path.read_bytes()))
  except (OSError, ValueError, TypeError) as e:
    raise UserError(
      f'init_from={workdir}: {path} cannot be used: {e}'
    ) from None
  kept = Checkpoints(workdir / 'checkpoints')
  try:
    manifest = kept.latest()
  except UserError:  # each fault is in the log; its advice is for that run
    raise UserError(
      f'init_from={workdir}: no checkpoint of that run is whole; if it has '
      f'ended, init_from={workdir}/tokenizer'
    ) from None
  if manifest is None:
    raise UserError(
      f'init_from={workdir}: the run has no checkpoint yet; wait for its '
      'first one'
    )
  tokenizer = build_tokenizer(spec.model)
  _check_model(tokenizer, want, f'init_from={workdir}')
  # To the host: a device may not hold the whole. No memory behind these.
  shapes = {
    name: np.broadcast_to(np.zeros((), dtype), shape)
    for name, (shape, dtype) in manifest['leaves'].items()
  }
  averaged = any(n.startswith('ema/') for n in shapes)
  prefixes = {
    'ema/' if averaged else 'tokenizer/params/': 'params/',
    'codebook/': 'codebook/',
  }
  wanted = {n: x for n, x in shapes.items() if n.startswith(tuple(prefixes))}
  found = kept.restore(manifest, wanted, part=True)
  leaves: Leaves = {}
  for name, leaf in found.items():
    old = next(p for p in prefixes if name.startswith(p))
    leaves[prefixes[old] + name.removeprefix(old)] = np.asarray(leaf)
  frozen = _kept_frozen(tokenizer, spec, leaves, workdir)
  held = Frozen({n.removeprefix('params/'): x for n, x in frozen.items()})
  # The run's other frozen trees (a teacher, loss networks) stay behind.
  recorded = {n: x for n, x in manifest['frozen'].items() if n == 'params'}
  check_frozen(hash_frozen(held), recorded, f'init_from={workdir}')
  kind = 'averaged' if averaged else 'last'
  says = (
    f'{len(leaves)} leaves of step {manifest["step"]} of {workdir} ({kind} '
    f'weights, live codebook) and the {len(frozen)} it kept frozen'
  )
  warning = ''
  if not _is_finished(workdir, manifest['step']):
    warning = (
      f'init_from={workdir}: that run is not finished; this one begins at its '
      f'step {manifest["step"]}'
    )
  return Given(
    leaves=leaves | frozen,
    says=says,
    source=str(workdir),
    revision=f'step {manifest["step"]}',
    left=_left_behind(shapes.keys() - wanted.keys()),
    warning=warning,
  )


def _is_finished(workdir: pathlib.Path, step: int) -> bool:
  """Its summary is of this step: a run may have been lengthened since."""
  try:
    figures = json.loads((workdir / 'summary.json').read_bytes())
    return bool(figures['steps'] == step)
  except (OSError, ValueError, TypeError, KeyError):
    return False


def _left_behind(names: Iterable[str]) -> str:
  """In words, what of a checkpoint is not taken."""
  parts = {
    'discriminator/': 'the discriminator',
    'tokenizer/opt_state/': 'the optimizer',
    'tokenizer/params/': 'the weights before averaging',
    'usage': 'the usage window',
    'ema/': 'their average',
  }
  found = {
    words: sum(name.startswith(prefix) for name in names)
    for prefix, words in parts.items()
  }
  listed = ', '.join(f'{w} ({n} leaves)' for w, n in found.items() if n)
  return f'{listed}, the step count'


def _kept_frozen(tokenizer, spec, leaves: Leaves, workdir) -> Leaves:
  """A run's weights that are not in its checkpoints, made again, if any."""
  names = trees.flatten(jax.eval_shape(lambda: from_seed(tokenizer, 0)))
  missing = {n for n in names if n.startswith('params/')} - leaves.keys()
  if not missing:
    return {}
  init, init_from = still_needed(spec, {n.split('/')[1] for n in missing})
  try:
    given = given_leaves(tokenizer, init_from, init).leaves
  except UserError as e:
    raise UserError(
      f'init_from={workdir}: what it kept frozen is not in its checkpoints: {e}'
    ) from None
  drawn = sorted(missing - given.keys())

  def draw():
    fresh = trees.flatten(from_seed(tokenizer, spec.seed))
    return {name: fresh[name] for name in drawn}

  fresh = jax.device_get(jax.jit(draw)()) if drawn else {}
  return {n: given[n] if n in given else fresh[n] for n in missing}
