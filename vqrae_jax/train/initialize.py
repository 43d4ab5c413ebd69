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
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax import export
from vqrae_jax.errors import UserError
from vqrae_jax.models import latents
from vqrae_jax.models.tokenizer import Tokenizer, build_tokenizer, describe
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import encoders, networks, rae
from vqrae_jax.train import config as config_lib
from vqrae_jax.train.checkpoint import Checkpoints
from vqrae_jax.types import Frozen
from vqrae_jax.weights import parse_source

# ----------------------------------------------------------------------------
# What a config brings for one part of a run, out of published files or of
# another tokenizer: `init.encoder`, `init.decoder`, and in `init.latents` the
# statistics that latents are normalised by.

Leaves = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Given:
  """What a config brings to a new run.

  Attributes:
    leaves: {"params/…" or "codebook/…": array on the host, or one that reads
      its file when it is sliced}, a subset of the tokenizer's variables as
      training has them; "teacher/…" where a frozen encoder teaches.
    says: what was taken, in a line.
    source: the words that weights came from; '' for none.
    revision: the commits of hub's snapshots among them, if any.
    teacher: (source, revision) of the encoder that teaches, or None.
    left: what of a run was not taken, in words.
    warning: what a run that begins so should say loudly; '' for nothing.
  """

  leaves: Leaves = dataclasses.field(default_factory=dict)
  says: str = ''
  source: str = ''
  revision: str | None = None
  teacher: tuple[str, str | None] | None = None
  left: str = ''
  warning: str = ''


def encoder_from(
  tokenizer: Tokenizer, word: str, key: str = 'init.encoder'
) -> Given:
  """The encoder's leaves out of a published encoder, or of a tokenizer."""
  folder = _tokenizer_at(pathlib.Path(word).expanduser())
  if folder is not None:
    return _encoder_of(tokenizer, word, folder, key)
  if pathlib.Path(word, 'metrics.jsonl').expanduser().exists():
    raise UserError(f'{key}={word}: that run has no tokenizer/ yet; finish it')
  try:
    found = encoders.find_encoder(word)
    fit = encoders.fit_encoder(found, tokenizer.encoder_spec)
    leaves = {f'params/encoder/{n}': x for n, x in fit.lazy().items()}
  except UserError as e:
    raise UserError(f'{key}={word}: {e}') from None
  at = f' at {found.revision[:12]}' if found.revision else ''
  skipped = f', without {len(fit.ignored)} others' if fit.ignored else ''
  says = f'the {len(leaves)} leaves of the encoder {word}{at}{skipped}'
  return Given(leaves, says, word, found.revision)


def _tokenizer_at(path: pathlib.Path) -> pathlib.Path | None:
  """The tokenizer's directory that `path` is, or that the run there left."""
  for folder in (path / 'tokenizer', path):
    if export.is_tokenizer(folder):
      return folder
  return None


def _encoder_of(
  tokenizer: Tokenizer, word: str, folder: pathlib.Path, key: str
) -> Given:
  other, variables = export.load_tokenizer(folder)
  have, want = (describe(t)['encoder'] for t in (other, tokenizer))
  have, want = trees.flatten(have), trees.flatten(want)
  for name in sorted(have.keys() | want.keys()):
    if have.get(name) != want.get(name):
      raise UserError(
        f'{key}={word}: that encoder has {name.replace("/", ".")}='
        f'{have.get(name)}, model.encoder has {want.get(name)}; make the two '
        'equal'
      )
  leaves = trees.flatten({'encoder': variables['params']['encoder']})
  leaves = {f'params/{n}': np.asarray(x) for n, x in leaves.items()}
  says = f'the {len(leaves)} leaves of the encoder of the tokenizer {folder}'
  return Given(leaves, says, word)


def decoder_from(tokenizer: Tokenizer, word: str) -> tuple[Leaves, str]:
  """The decoder's leaves out of "rae:FILE"."""
  source = parse_source(word)
  if source.kind != 'rae':
    raise UserError(
      f'init.decoder={word}: a decoder comes from "rae:FILE", a published RAE '
      'decoder; a whole tokenizer from init_from'
    )
  fit = rae.fit_rae_decoder(
    source.value, tokenizer.decoder_spec, tokenizer.latent_dim
  )
  leaves = {f'params/decoder/{n}': x for n, x in fit.load().items()}
  skipped = f', without {len(fit.ignored)} others' if fit.ignored else ''
  note = f' ({fit.source.note})' if fit.source.note else ''
  return leaves, f'the decoder of {source.value}{note}{skipped}'


def latents_from(tokenizer: Tokenizer, path: str) -> Given:
  """Mean and std of latents out of a file of statistics."""
  try:
    leaves = latents.leaves_of(
      path, tokenizer.latents_spec, tokenizer.latent_dim
    )
  except UserError as e:
    raise UserError(f'init.latents={path}: {e}') from None
  # No source of weights: manifests name those of frozen leaves.
  return Given(dict(leaves), f'the statistics of latents in {path}')


def together(parts: list[Given]) -> Given:
  """All that several parts bring."""
  leaves = {name: x for part in parts for name, x in part.leaves.items()}
  revisions = [part.revision for part in parts if part.revision]
  return Given(
    leaves,
    ' and '.join(part.says for part in parts),
    ' and '.join(part.source for part in parts if part.source),
    ' and '.join(revisions) or None,
  )


# ----------------------------------------------------------------------------
# The trees that no step moves: the networks that losses look through, and
# the hashes by which a run that goes on knows that all of them are the same.


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
      tree = {'discriminator': networks.load_backbone(backbone)}
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
