"""Weights that are single files on the web, beside the encoders of the hub.

A row says where a file lies, what its SHA-256 must be, its licence and what
needs it; `NEEDS` says which words of a config ask for which rows. A licence is
the one its authors state; read it there before relying on it. Encoders have
their own table (`encoders/published.py`). Nothing here touches the network.
"""

import dataclasses
import hashlib
import pathlib
import re

from vqrae_jax.errors import UserError, choose
from vqrae_jax.paths import cache_folder

_PYTORCH = 'https://download.pytorch.org/models'


@dataclasses.dataclass(frozen=True)
class PublishedFile:
  """A file of weights.

  Attributes:
    url: where it lies.
    licence: of the weights.
    used_by: what needs it, in words.
    sha256: of the whole file; None where its authors publish none, and then
      the one of the first fetch is kept beside the file.
    saved_as: the name in the cache, by default that of the URL.
  """

  url: str
  licence: str
  used_by: str
  sha256: str | None = None
  saved_as: str = ''

  @property
  def file(self) -> str:
    return self.saved_as or self.url.rsplit('/', 1)[1]

  @property
  def path(self) -> pathlib.Path:
    """Where it lies, or would lie, on this machine."""
    return cache_folder() / 'weights' / self.file


FILES = {
  'vgg16': PublishedFile(
    f'{_PYTORCH}/vgg16-397923af.pth',
    'BSD-3-Clause (torchvision)',
    'LPIPS: its trunk',
    '397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0',
  ),
  'lpips-vgg': PublishedFile(
    'https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/'
    'lpips/weights/v0.1/vgg.pth',
    'BSD-2-Clause',
    'LPIPS: its heads, version 0.1',
    'a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868',
    'lpips-vgg-v0.1.pth',
  ),
  'convnext-small': PublishedFile(
    f'{_PYTORCH}/convnext_small-0c510722.pth',
    'BSD-3-Clause (torchvision)',
    "the perceptual term's logits",
    '0c510722adfd92966a2bd72b92f785ca05966bbac03cafe2f7a90b1f54bfab9a',
  ),
  'dino-s8': PublishedFile(
    'https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/'
    'dino_deitsmall8_pretrain.pth',
    'Apache-2.0',
    "the discriminator's features",
  ),
  'inception': PublishedFile(
    'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
    'pt_inception-2015-12-05-6726825d.pth',
    'Apache-2.0',
    'rFID',
    '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2',
  ),
}

# A key of a config's `losses` (or `eval`), or its discriminator's name: the
# rows that it needs.
NEEDS = {
  'lpips': ('vgg16', 'lpips-vgg'),
  'convnext': ('convnext-small',),
  'dino': ('dino-s8',),
  'rfid': ('inception',),
}


def digest(path: pathlib.Path) -> str:
  """The SHA-256 of a file, in hex."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def record(path: pathlib.Path) -> pathlib.Path:
  """The file beside `path` that holds its SHA-256, as sha256sum writes it."""
  return path.with_name(f'{path.name}.sha256')


def wanted(path: pathlib.Path, sha256: str | None) -> str:
  """The hex digits that a file's SHA-256 must begin with; '' for any.

  What the table says, or what the first fetch recorded, or the eight digits
  that PyTorch's files bear in their names.
  """
  if sha256:
    return sha256
  try:
    kept = record(path).read_text().split()[:1]
  except (OSError, UnicodeDecodeError):
    kept = []
  if kept and re.fullmatch(r'[0-9a-f]{64}', kept[0]):
    return kept[0]
  named = re.search(r'-([0-9a-f]{8})\.\w+$', path.name)
  return named.group(1) if named else ''


def command(*names: str) -> str:
  """The command that brings rows of the table."""
  return f'python -m vqrae_jax.fetch_weights --names={",".join(names)}'


def locate(name: str) -> pathlib.Path:
  """The path of a row's file, which is there and whole.

  Raises:
    UserError: it is not here, or damaged; with the command that brings it.
  """
  row = choose(FILES, name, 'file of weights')
  if not row.path.is_file():
    raise UserError(
      f'{name} ({row.used_by}) is not at {row.path}; bring it with: '
      f'{command(name)}'
    )
  want, have = wanted(row.path, row.sha256), digest(row.path)
  if not have.startswith(want):
    raise UserError(
      f'{row.path} has the SHA-256 {have[:16]}…, not {want[:16]}…: it is '
      f'damaged or another file; bring it anew with: {command(name)}'
    )
  return row.path
