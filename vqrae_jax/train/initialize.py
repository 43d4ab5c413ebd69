"""Stage 3 of a run: its first state, from weights or from a checkpoint.

`initialize(setup)` returns the state at step 0: random weights from the seed,
replaced where the config names other weights. `init_from` is a tokenizer's
directory or another run's workdir. From a run it takes the EMA weights and the
live codebook of the latest checkpoint; leaves that the run kept frozen are
made again as that run made them and compared with their hash. `init` names an
encoder, a decoder or latent statistics. A tokenizer is never loaded in part: if
the two models or their leaves differ, an error names the difference. The
optimizer state, the EMA weights, the discriminator and the step count are
re-initialized, and the log lists what was not loaded.

`restore(setup, checkpoints, manifest)` returns the state of a checkpoint.
Frozen trees are in no checkpoint: they are loaded again and compared with their
hash.
"""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from vqrae_jax import export, sharding
from vqrae_jax.errors import UserError
from vqrae_jax.files import Path, is_url, to_path
from vqrae_jax.models import latents
from vqrae_jax.models.tokenizer import (
  Tokenizer,
  build_tokenizer,
  describe,
  packages_of,
)
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import encoders, networks, rae
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import state as state_lib
from vqrae_jax.train.checkpoint import Checkpoints, check_same_run
from vqrae_jax.train.reporting import read_summary
from vqrae_jax.train.setup import Setup, with_rules
from vqrae_jax.train.state import random_variables
from vqrae_jax.types import Frozen, TrainState
from vqrae_jax.weights.files import open_weights
from vqrae_jax.weights.hub import parse_source

_CODEBOOK = 'codebook/quantizer/'

Leaves = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class InitialWeights:
  """Weights that a config brings to a run.

  Attributes:
    leaves: {"params/…" or "codebook/…": array on the host, or one that reads
      its file when it is sliced}, a subset of the tokenizer's variables as
      training has them; the frozen trees' as "teacher/…" and so on.
    summary: what was loaded, in a line.
    source: where the weights came from; '' for nowhere.
    revision: the commits of hub snapshots among them, if any.
    ignored: what of a run was not loaded.
    warning: what the log should warn of.
  """

  leaves: Leaves = dataclasses.field(default_factory=dict)
  summary: str = ''
  source: str = ''
  revision: str | None = None
  ignored: str = ''
  warning: str = ''


@dataclasses.dataclass(frozen=True)
class Started:
  """A run's state at its start, and what its checkpoints say of the frozen
  trees: {tree: {"sha256", "source", "revision"}}."""

  state: TrainState
  frozen: Frozen
  record: dict[str, dict[str, Any]]


def initialize(setup: Setup) -> Started:
  """The state at step 0 on the mesh, and the frozen trees.

  Raises:
    UserError: weights that are not there or do not fit the model.
  """
  config = setup.config
  first = setup.batches.batch(0)  # or an error, before anything is written
  weights = tokenizer_weights(setup.tokenizer, config.init_from, config.init)
  weights = _at_this_batch(setup, weights)
  weights, sources = _with_frozen(setup, weights)
  logging.info('initialized with %s', weights.summary or 'random weights')
  if weights.warning:
    logging.warning(weights.warning)
  if weights.ignored:
    logging.info('re-initialized (not loaded): %s', weights.ignored)
  state, frozen = state_lib.sharded_state(
    setup.step, setup.mesh, config.seed, weights.leaves
  )
  brought = any(n.startswith(_CODEBOOK) for n in weights.leaves)
  if state_lib.inits_codebook(setup.step, state) and not brought:
    images = setup.place(first)['images']
    variables = state_lib.variables_of(state, frozen)
    init_codebook = _jitted_codebook(setup.tokenizer, setup.mesh)
    state = state.replace(codebook=init_codebook(variables, state.rng, images))
  return Started(state, frozen, _record(setup, frozen, sources))


def _at_this_batch(setup: Setup, weights: InitialWeights) -> InitialWeights:
  """A loaded codebook's averages as steps of this run's batch would have made
  them: by those of a smaller one all codes would be idle."""
  leaves, tokenizer = dict(weights.leaves), setup.tokenizer
  codebook = {
    name.removeprefix(_CODEBOOK): leaf
    for name, leaf in leaves.items()
    if name.startswith(_CODEBOOK)
  }
  if not codebook:
    return weights
  sizes = setup.config.data.sizes
  indices = sum(math.prod(tokenizer.index_shape(*size)) for size in sizes)
  scaled = tokenizer.quantizer.rescale_average(
    trees.unflatten(codebook), setup.config.batch_size * indices / len(sizes)
  )
  for name, leaf in trees.flatten(scaled).items():
    leaves[_CODEBOOK + name] = np.asarray(leaf)
  return dataclasses.replace(weights, leaves=leaves)


def restore(
  setup: Setup, checkpoints: Checkpoints, manifest: Mapping[str, Any]
) -> Started:
  """The state of a checkpoint on the mesh, and the frozen trees.

  Raises:
    UserError: the checkpoint is of another run, or frozen trees differ.
  """
  # Checkpoints from before 2026-11-26 name no decoder: there was one.
  check_same_run({'decoder': 'pil'} | manifest['run'], setup.identity())
  shapes, frozen = state_lib.state_shapes(setup.step, setup.mesh)
  state = checkpoints.restore(manifest, shapes)
  started = Started(state, frozen, {})
  if jax.tree.leaves(frozen):
    parts = {name.split('/')[0] for name in frozen.params}
    if setup.config.teacher == config_lib.INIT:
      parts.add('encoder')
    weights = _weights_of_parts(setup.tokenizer, setup.config, parts)
    weights, sources = _with_frozen(setup, weights)
    if weights.summary:
      logging.info('loaded beside the checkpoint: %s', weights.summary)
    _, frozen = state_lib.sharded_state(
      setup.step, setup.mesh, setup.config.seed, weights.leaves, (None, frozen)
    )
    started = Started(state, frozen, _record(setup, frozen, sources))
  check_frozen(
    {name: entry['sha256'] for name, entry in started.record.items()},
    manifest['frozen'],
    f'checkpoint {manifest["step"]}',
  )
  return started


def _record(
  setup: Setup, frozen: Frozen, sources: Mapping[str, dict]
) -> dict[str, dict[str, Any]]:
  """What checkpoints say of the frozen trees; every host takes part."""
  hashes = hash_frozen(frozen, lambda x: sharding.host_copy(x, setup.mesh))
  return {n: dict(sha256=x, **sources[n]) for n, x in hashes.items()}


@functools.lru_cache(maxsize=16)
def _jitted_codebook(tokenizer: Any, mesh: jax.sharding.Mesh) -> Callable:
  shapes = jax.eval_shape(lambda: state_lib.random_variables(tokenizer, 0))
  return jax.jit(
    with_rules(functools.partial(state_lib.init_codebook, tokenizer)),
    out_shardings=sharding.shardings_for(shapes, mesh)['codebook'],
  )


# -- the frozen trees --------------------------------------------------------
def _with_frozen(
  setup: Setup, weights: InitialWeights
) -> tuple[InitialWeights, dict[str, dict[str, Any]]]:
  """The weights with those of the frozen trees, and {tree: {"source",
  "revision"}}.

  Raises:
    UserError: a teacher that is not there or not like the tokenizer's encoder;
      a network's file that is not here.
  """
  config = setup.config
  leaves, summary = dict(weights.leaves), [weights.summary]
  source = weights.source or f'seed {config.seed}'
  published = dict(source=f'{config.init.networks} weights', revision=None)
  sources = dict(
    params=dict(source=source, revision=weights.revision),
    losses=published,
    discriminator=published,
  )
  if config.teacher is not None:
    if config.teacher == config_lib.INIT:
      teacher, source = weights, config.init_from or config.init.encoder
      summary.append(f'the teacher is the encoder of {source}')
    else:
      teacher = encoder_from(setup.tokenizer, config.teacher, 'teacher')
      source = teacher.source
      summary.append(f'the teacher is {teacher.summary}')
    sources['teacher'] = dict(source=source, revision=teacher.revision)
    leaves |= {
      f'teacher/{name.removeprefix("params/")}': leaf
      for name, leaf in teacher.leaves.items()
      if name.startswith('params/encoder/')
    }
  found, words = _networks(setup.step, config.init.networks)
  summary.append(words)
  weights = dataclasses.replace(
    weights, leaves=leaves | found, summary='; '.join(filter(None, summary))
  )
  return weights, sources


def _networks(step: state_lib.StepSpec, kind: str) -> tuple[Leaves, str]:
  """({leaf name: array} of the networks of losses and discriminator, a
  summary); `kind` is the config's `init.networks`, "random" leaves the seed's.

  Raises:
    UserError: a file that is not here (with the command that fetches it).
  """
  backbone = getattr(step.gan and step.gan.module, 'backbone', None)
  names = step.networks + ['discriminator'] * (backbone is not None)
  where, leaves = ', '.join(names), {}
  if not names:
    return {}, ''
  if kind == 'random':
    return {}, f'RANDOM networks in {where} (init.networks="random")'
  for name in names:
    try:
      if name == 'discriminator':
        hint = 'use one without a backbone: --config.discriminator.name=patch'
        tree = {name: networks.load_backbone(backbone)}
      else:
        hint = 'train on random features: --config.init.networks=random'
        tree = {'losses': {name: networks.load(name)}}
    except UserError as e:
      key = name if name == 'discriminator' else f'losses.{name}'
      raise UserError(f'{key}: {e}, or {hint}') from None
    leaves |= trees.flatten(tree)
  return leaves, f'published networks in {where}'


def hash_frozen(
  frozen: Frozen, read: Callable[[Any], np.ndarray] = np.asarray
) -> dict[str, str]:
  """{tree's name: SHA-256 by the fingerprint's recipe} of what is there.

  Args:
    frozen: the trees that no step moves.
    read: brings one array to the host.
  """
  return {
    name: export.fingerprint({}, trees.flatten(tree), read)
    for name, tree in vars(frozen).items()
    if tree
  }


def check_frozen(
  hashes: Mapping[str, str], recorded: Mapping[str, Any], where: str
) -> None:
  """Checks that the frozen trees are those that a checkpoint was made with.

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
        f'{want["sha256"][:12]}… from {want["source"]}{at}; restore that, or '
        'start a new run with init_from'
      )


# -- the tokenizer's weights -------------------------------------------------


def reachable(path: str | os.PathLike, key: str) -> Path:
  """`to_path`, in a bucket that can be opened.

  Raises:
    UserError: its library is missing, or does not let us in.
  """
  if not is_url(path):
    return to_path(path)
  try:
    to_path(path).exists()
  except Exception as e:  # each bucket's own library raises its own
    raise UserError(
      f'{key}={path} cannot be reached: {" ".join(str(e).split())}; install '
      'its backend (pip install etils[epath-gcs] for gs://, etils[epath-s3] '
      'for s3://) and sign in, or name a mounted folder'
    ) from None
  return to_path(path)


def tokenizer_weights(
  tokenizer: Tokenizer, init_from: str | None, init: config_lib.InitSpec
) -> InitialWeights:
  """The leaves that a config brings, on the host.

  Args:
    tokenizer: the new run's.
    init_from, init: the config's keys.

  Raises:
    UserError: nothing to open there, or leaves of another tokenizer.
  """
  if init_from is None:
    makers = encoder_from, decoder_from, latents_from
    given = init.encoder, init.decoder, init.latents
    parts = [
      make(tokenizer, source)
      for make, source in zip(makers, given, strict=True)
      if source is not None
    ]
    return InitialWeights(
      {name: x for part in parts for name, x in part.leaves.items()},
      ' and '.join(part.summary for part in parts),
      ' and '.join(part.source for part in parts if part.source),
      ' and '.join(part.revision for part in parts if part.revision) or None,
    )
  path = reachable(init_from, 'init_from')
  folder, kept = _tokenizer_at(path), path / 'checkpoints'
  if kept.is_dir() and (folder is None or Checkpoints(kept).steps()):
    _, weights = of_run(path, tokenizer)
  elif folder is not None or path.is_dir():
    weights = _of_tokenizer(tokenizer, folder or path)
  else:
    raise UserError(
      f"init_from={init_from}: there is no such folder; name a run's workdir "
      "or a tokenizer's directory"
    )
  want = trees.flatten(jax.eval_shape(lambda: random_variables(tokenizer, 0)))
  trees.check_same(want, weights.leaves, f'init_from={init_from}')
  return weights


def encoder_from(
  tokenizer: Tokenizer, word: str, key: str = 'init.encoder'
) -> InitialWeights:
  """The encoder's leaves out of a published encoder, or of a tokenizer."""
  path = reachable(word, key)
  if (folder := _tokenizer_at(path)) is not None:
    other, variables = export.load_tokenizer(
      folder, trusted=packages_of(tokenizer)
    )
    _check_model(other, tokenizer, f'{key}={word}', 'encoder.')
    params = {'encoder': variables['params']['encoder']}
    leaves = jax.tree.map(np.asarray, trees.flatten({'params': params}))
    source = f'the encoder of the tokenizer {folder}'
    return InitialWeights(leaves, f'the {len(leaves)} leaves of {source}', word)
  if (path / 'metrics.jsonl').exists():
    raise UserError(f'{key}={word}: that run has no tokenizer/ yet; finish it')
  if not isinstance(tokenizer.encoder_spec, EncoderSpec):
    raise UserError(
      f'{key}={word} is not a tokenizer, and a published encoder does not fit '
      f'model.encoder, {type(tokenizer.encoder_spec).__name__} of another '
      "package; name a tokenizer's directory"
    )
  try:
    found = encoders.find_encoder(word)
    fit = encoders.fit_encoder(found, tokenizer.encoder_spec)
    leaves = {f'params/encoder/{n}': x for n, x in fit.lazy().items()}
  except UserError as e:
    raise UserError(f'{key}={word}: {e}') from None
  at = f' at {found.revision[:12]}' if found.revision else ''
  skipped = f', without {len(fit.ignored)} others' if fit.ignored else ''
  summary = f'the {len(leaves)} leaves of the encoder {word}{at}{skipped}'
  return InitialWeights(leaves, summary, word, found.revision)


def _tokenizer_at(path: Path) -> Path | None:
  """The tokenizer's directory that `path` is, or that the run there left."""
  return next(filter(export.is_tokenizer, (path / 'tokenizer', path)), None)


def decoder_from(tokenizer: Tokenizer, word: str) -> InitialWeights:
  """The decoder's leaves out of "rae:FILE"."""
  source = parse_source(word)
  if source.kind != 'rae':
    raise UserError(
      f'init.decoder={word} must be "rae:FILE", a published RAE decoder; to '
      'load a full tokenizer, set init_from'
    )
  fit = rae.fit_decoder(
    open_weights(source.value), tokenizer.decoder_spec, tokenizer.latent_dim
  )
  leaves = {f'params/decoder/{n}': x for n, x in fit.load().items()}
  skipped = f', without {len(fit.ignored)} others' if fit.ignored else ''
  note = f' ({fit.source.note})' if fit.source.note else ''
  summary = f'the decoder of {source.value}{note}{skipped}'
  return InitialWeights(leaves, summary, word)


def latents_from(tokenizer: Tokenizer, path: str) -> InitialWeights:
  """Mean and std of latents out of a file of statistics."""
  try:
    leaves = latents.leaves_of(
      path, tokenizer.latents_spec, tokenizer.latent_dim
    )
  except UserError as e:
    raise UserError(f'init.latents={path}: {e}') from None
  # No source of weights: manifests name those of frozen leaves.
  return InitialWeights(dict(leaves), f'the statistics of latents in {path}')


def _weights_of_parts(
  tokenizer: Tokenizer, config: config_lib.RunConfig, parts: Collection[str]
) -> InitialWeights:
  """`tokenizer_weights` without what gives none of `parts` ("encoder", …).

  What a checkpoint holds needs no file that may be gone by now.
  """
  unused = {p: None for p in config_lib.INIT_PARTS if p not in parts}
  init = dataclasses.replace(config.init, **unused)
  init_from = config.init_from if parts else None
  return tokenizer_weights(tokenizer, init_from, init)


def _check_model(
  have: Tokenizer, want: Tokenizer, where: str, part: str = ''
) -> None:
  """Checks that both compute the same, which equal shapes do not guarantee.

  The quantizer's training-only fields may differ. `part` is where the keys
  that are compared begin.

  Raises:
    UserError: names the first key that differs.
  """
  ignored = {f'quantizer.{n}' for n in want.quantizer.training_fields}
  different = config_lib.differences(describe(have), describe(want))
  # Another quantizer's name says more than its fields.
  for key in sorted(different, key=lambda key: key != 'quantizer.name'):
    if key.startswith(part) and key not in ignored:
      one, other = different[key]
      raise UserError(
        f'{where}: that tokenizer has {key}={one}, model.{key} is {other}; '
        'make the two equal'
      )


def _of_tokenizer(want: Tokenizer, path: Path) -> InitialWeights:
  tokenizer, variables = export.load_tokenizer(path, trusted=packages_of(want))
  _check_model(tokenizer, want, f'init_from={path}')
  codebook = variables.get('codebook', {})
  tables = dict(codebook.get('quantizer', {}))
  tables = tokenizer.quantizer.training_codebook(tables)
  codebook = codebook | {'quantizer': tables}
  leaves = trees.flatten({'params': variables['params'], 'codebook': codebook})
  leaves = jax.tree.map(np.asarray, leaves)
  summary = f'all {len(leaves)} leaves of the tokenizer {path}'
  return InitialWeights(leaves, summary, str(path))


def of_run(
  run: str | os.PathLike,
  want: Tokenizer | None = None,
  key: str = 'init_from',
  trusted: Collection[str] = (),
) -> tuple[Tokenizer, InitialWeights]:
  """(a run's tokenizer, the EMA weights, live codebook and frozen leaves of
  its latest checkpoint).

  Args:
    run: its workdir.
    want: the tokenizer that it must be, if any.
    key: what names the run, for errors.
    trusted: packages whose code it may be made of, beside those of `want`.

  Raises:
    UserError: no checkpoint there that verifies, or another tokenizer.
  """
  workdir = reachable(run, key)
  if not (workdir / 'checkpoints').is_dir():
    raise UserError(f"{key}={run} has no checkpoints; name a run's workdir")
  where, path = f'{key}={workdir}', workdir / 'config.json'
  try:
    config = config_lib.read_config(json.loads(path.read_bytes()))
  except (OSError, ValueError, TypeError) as e:
    raise UserError(f'{where}: {path} cannot be used: {e}') from None
  kept = Checkpoints(workdir / 'checkpoints')
  try:
    manifest = kept.latest()
  except UserError:  # each fault is in the log; its advice is for that run
    raise UserError(
      f'{where}: no checkpoint of that run is intact; if it has finished, use '
      f'{workdir}/tokenizer'
    ) from None
  if manifest is None:
    raise UserError(f'{where}: that run has no checkpoint yet; wait for one')
  if want is not None:
    trusted = *trusted, *packages_of(want)
  step = manifest['step']
  tokenizer = build_tokenizer(config.model, trusted=trusted)
  if want is not None:
    _check_model(tokenizer, want, where)
  # To the host: one device may not hold all. No memory behind these.
  shapes = {
    name: np.broadcast_to(np.zeros((), dtype), shape)
    for name, (shape, dtype) in manifest['leaves'].items()
  }
  has_ema = any(n.startswith('ema/') for n in shapes)
  params = 'ema/' if has_ema else 'tokenizer/params/'
  loaded = params, 'codebook/'
  wanted = {n: x for n, x in shapes.items() if n.startswith(loaded)}
  found = kept.restore(manifest, wanted, part=True)
  leaves = {
    re.sub(f'^{params}', 'params/', name): np.asarray(leaf)
    for name, leaf in found.items()
  }
  frozen = _kept_frozen(tokenizer, config, leaves, where)
  held = Frozen({n.removeprefix('params/'): x for n, x in frozen.items()})
  # The run's other frozen trees (a teacher, loss networks) are not loaded.
  recorded = {n: x for n, x in manifest['frozen'].items() if n == 'params'}
  check_frozen(hash_frozen(held), recorded, where)
  kind, warning = 'EMA' if has_ema else 'last', ''
  # A run may have been lengthened since its summary.
  if read_summary(workdir).get('steps') != step:
    warning = (
      f'{where}: that run is unfinished; its weights are those of step {step}'
    )
  return tokenizer, InitialWeights(
    leaves=leaves | frozen,
    summary=f'{len(leaves)} leaves of step {step} of {workdir} ({kind} '
    f'weights, live codebook) and the {len(frozen)} that it kept frozen',
    source=str(workdir),
    revision=f'step {step}',
    ignored=_not_loaded(shapes.keys() - wanted.keys()),
    warning=warning,
  )


def _not_loaded(names: Iterable[str]) -> str:
  """What of a checkpoint is not loaded, for the log."""
  parts = {
    'discriminator/': 'the discriminator',
    'tokenizer/opt_state/': 'the optimizer',
    'tokenizer/params/': 'the weights before averaging (not EMA)',
    'usage': 'the usage window',
  }
  found = {
    words: sum(name.startswith(prefix) for name in names)
    for prefix, words in parts.items()
  }
  listed = ', '.join(f'{w} ({n} leaves)' for w, n in found.items() if n)
  return f'{listed}, the step count'


def _kept_frozen(
  tokenizer: Tokenizer,
  config: config_lib.RunConfig,
  leaves: Leaves,
  where: str,
) -> Leaves:
  """A run's weights that are not in its checkpoints, made again."""
  names = trees.flatten(jax.eval_shape(lambda: random_variables(tokenizer, 0)))
  missing = {n for n in names if n.startswith('params/')} - leaves.keys()
  if not missing:
    return {}
  parts = {name.split('/')[1] for name in missing}
  try:
    loaded = _weights_of_parts(tokenizer, config, parts).leaves
  except UserError as e:
    raise UserError(
      f'{where}: its frozen parts are not in its checkpoints and cannot be '
      f'loaded: {e}'
    ) from None
  random = sorted(missing - loaded.keys())

  def draw():
    fresh = trees.flatten(random_variables(tokenizer, config.seed))
    return {name: fresh[name] for name in random}

  fresh = jax.device_get(jax.jit(draw)()) if random else {}
  return {n: loaded[n] if n in loaded else fresh[n] for n in missing}
