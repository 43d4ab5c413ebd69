"""What a config brings for one part of a run, out of published files or of
another tokenizer: `init.encoder`, `init.decoder`, and in `init.latents` the
statistics that latents are normalised by.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from vqrae_jax import export, pretrained
from vqrae_jax.errors import UserError
from vqrae_jax.models import latent_files, rae
from vqrae_jax.models.tokenizer import Tokenizer, describe
from vqrae_jax.ops import trees
from vqrae_jax.weights import parse_source

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
    found = pretrained.find_encoder(word)
    fit = pretrained.fit_encoder(found, tokenizer.encoder_spec)
    leaves = {f'params/encoder/{n}': x for n, x in fit.lazy().items()}
  except UserError as e:
    raise UserError(f'{key}={word}: {e}') from None
  at = f' at {found.revision[:12]}' if found.revision else ''
  skipped = f', without {len(fit.skipped)} others' if fit.skipped else ''
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
  skipped = f', without {len(fit.skipped)} others' if fit.skipped else ''
  note = f' ({fit.source.note})' if fit.source.note else ''
  return leaves, f'the decoder of {source.value}{note}{skipped}'


def latents_from(tokenizer: Tokenizer, path: str) -> Given:
  """Mean and std of latents out of a file of statistics."""
  try:
    leaves = latent_files.leaves_of(
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
