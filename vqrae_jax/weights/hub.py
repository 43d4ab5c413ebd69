"""Where published weights are, and how they are downloaded.

`parse_source` parses a source, `snapshot` downloads a repository of the Hugging
Face hub (by `huggingface_hub`), and `download` a single file from the web (by
`pooch`); `FILES` lists those. Nothing that is downloaded is run. The hub's
encoders have their own table (`encoders.PUBLISHED`).
"""

import dataclasses
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterable

from vqrae_jax.errors import UserError, choose, did_you_mean
from vqrae_jax.files import digest
from vqrae_jax.paths import cache_folder
from vqrae_jax.weights.files import printable

_log = logging.getLogger(__name__)

# ----------------------------------------------------------------------------
# Weights that are single files on the web.
#
# A licence is the one that its authors state; read it there before relying on
# it.

_PYTORCH = 'https://download.pytorch.org/models'


@dataclasses.dataclass(frozen=True)
class PublishedFile:
  """A file of weights.

  Attributes:
    url: where it is published.
    licence: of the weights.
    used_by: what needs it, in words.
    sha256: of the file; None if its authors publish none: then the hash of the
      first use is recorded beside the file.
    saved_as: the name in the cache; '' for that of the URL.
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
    """Its path in the cache, whether it is there or not."""
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


_LENGTH = 'Content-Length'


def record(path: pathlib.Path) -> pathlib.Path:
  """The file beside `path` that holds its SHA-256, as sha256sum writes it."""
  return path.with_name(f'{path.name}.sha256')


def known_hash(path: pathlib.Path, sha256: str | None) -> str | None:
  """The SHA-256 that a file must have: the table's, else the recorded one."""
  if sha256 or not record(path).is_file():
    return sha256
  kept = re.match(r'[0-9a-f]{64}\b', record(path).read_text(errors='replace'))
  return kept and kept[0]


def command(*names: str) -> str:
  """The command that downloads rows of the table."""
  return f'python -m vqrae_jax.fetch_weights --names={",".join(names)}'


def need(*names: str) -> None:
  """Checks that the files of rows are there.

  Raises:
    UserError: an unknown row, or missing files, with the command that downloads
      all of them.
  """
  rows = {name: choose(FILES, name, 'file of weights') for name in names}
  missing = [name for name, row in rows.items() if not row.path.is_file()]
  if missing:
    lost = ', '.join(
      f'{name} ({rows[name].used_by}) is not at {rows[name].path}'
      for name in missing
    )
    raise UserError(f'{lost}; download with: {command(*missing)}')


def locate(name: str) -> pathlib.Path:
  """The path of a row's file, after checking its hash.

  Raises:
    UserError: an unknown row, or a file that is missing or damaged; with the
      command that downloads it.
  """
  need(name)
  row = FILES[name]
  want, have = known_hash(row.path, row.sha256), digest(row.path)
  if want not in (None, have):
    raise UserError(
      f'{row.path} has the SHA-256 {have[:16]}…, not {want[:16]}…: it is '
      f'damaged or another file; download it again with: {command(name)}'
    )
  _record(row.path, have, known=want is not None)
  return row.path


def _record(path: pathlib.Path, have: str, known: bool) -> None:
  """Writes a file's hash and size beside it; warns if the hash was unknown."""
  beside, size = record(path), path.stat().st_size
  text = f'{have}  {path.name}\n# {size} bytes\n'
  if not known:
    _log.warning(
      '%s: no SHA-256 is published for this file; %s (%d bytes) is recorded in '
      '%s and checked from now on', path, have, size, beside,
    )  # fmt: skip
  try:
    if not beside.is_file() or beside.read_text(errors='replace') != text:
      beside.write_text(text)
  except OSError as e:  # a read-only cache
    _log.warning('%s cannot be written: %s', beside, e.strerror)


def download(
  url: str,
  path: pathlib.Path,
  sha256: str | None = None,
  progress: bool = False,
) -> bool:
  """Downloads `url` to `path`; False if the file was there with its hash.

  The file is complete or absent: pooch verifies the hash of a temporary file,
  which then takes its place. An earlier file stays until then.

  Args:
    url: http or https.
    path: the file to write; its folder is created.
    sha256: what the file must hash to, if it is known.
    progress: whether to show a bar.

  Raises:
    UserError: no connection, a file of another hash, a response that may be
      truncated, or a folder that cannot be written.
  """
  import pooch  # slow to import, as is its `requests`
  import requests

  want = known_hash(path, sha256)
  before = path.is_file() and digest(path)
  pooch.get_logger().setLevel('WARNING')
  sizes: list[str | None] = []  # that the responses state, the file's last
  fetch = pooch.HTTPDownloader(
    progressbar=progress,
    chunk_size=1 << 20,
    hooks={'response': lambda r, **_: sizes.append(r.headers.get(_LENGTH))},
  )

  def complete(url: str, output: str, caller: object) -> None:
    fetch(url, output, caller)
    # A response shorter than its stated size is an error in `fetch`.
    if want is None and sizes[-1] is None:
      raise UserError(
        f'{url}: no SHA-256 is known and the server states no size, so it may '
        f'arrive truncated; download it by hand to {path}'
      )

  try:
    pooch.retrieve(url, want, path.name, path.parent, downloader=complete)
  except UserError:
    raise
  except requests.RequestException as e:
    raise UserError(
      f'Could not download {url}: {printable(e, 200)}; download it where there '
      f'is a network and copy it to {path}'
    ) from None
  except OSError as e:
    raise UserError(
      f'{path.parent} cannot be written ({printable(e.strerror or e)}); set '
      f'VQRAE_JAX_CACHE to a folder that can, or copy {url} there by hand'
    ) from None
  except ValueError:  # pooch's, five lines with two hashes
    raise UserError(
      f'{url} does not have the SHA-256 {want}: it is another file, or was '
      'damaged in transit; the download is discarded'
    ) from None
  have = digest(path)
  _record(path, have, known=want is not None)
  if before != have and record(path).is_file():
    shutil.copymode(record(path), path)  # pooch's temporary file is private
  return before != have


# ----------------------------------------------------------------------------
# A source of weights, one parser for every flag and config key.
#
#   hf:ORG/NAME[@REV]   a repository of the Hugging Face hub
#   rae:FILE            a published RAE decoder
#   vqrae_torch:FILE    a model of the PyTorch project
#   a/path  ./name      a file or directory
#   name                a row of a table
#
# Nothing is opened here.

SCHEMES = ('hf', 'rae', 'vqrae_torch')

_SCHEME = re.compile(r'([A-Za-z][A-Za-z0-9_+.-]*):(.*)', re.DOTALL)
_HUB = re.compile(r'([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?')


@dataclasses.dataclass(frozen=True)
class Source:
  """A parsed source: its kind and what the kind needs.

  `kind` is "hf", "rae", "vqrae_torch", "path" or "row"; `value` is the
  ORG/NAME, the path (with ~ expanded) or the row's name; `revision` is the
  hub's, None for its default.
  """

  kind: str
  value: str
  revision: str | None = None


def parse_source(text: str, rows: Iterable[str] = ()) -> Source:
  """Parses a source.

  Args:
    text: as a flag or a config has it.
    rows: the names that a bare name may be.

  Raises:
    UserError: an empty source, an unknown scheme or row, or a scheme without a
      valid value.
  """
  names = tuple(rows)
  if not text.strip():
    raise UserError(
      'an empty source of weights; give hf:ORG/NAME, rae:FILE, a path or a name'
    )
  if text in names:
    return Source('row', text)
  match = _SCHEME.fullmatch(text)
  if match is not None:
    return _with_scheme(text, *match.groups())
  path = pathlib.Path(os.path.expanduser(text))
  if '/' in text or text.startswith(('.', '~')) or path.exists():
    return Source('path', str(path))
  raise UserError(
    f'unknown source of weights "{text}"{did_you_mean(text, names)}; a path '
    'has a "/" in it, a hub id starts with hf:'
  )


def _with_scheme(text: str, scheme: str, value: str) -> Source:
  if scheme not in SCHEMES:
    raise UserError(
      f'unknown scheme "{scheme}:" in "{text}"{did_you_mean(scheme, SCHEMES)}'
    )
  if scheme != 'hf':
    if not value:
      raise UserError(f'"{text}" names no file; write {scheme}:FILE')
    return Source(scheme, str(pathlib.Path(os.path.expanduser(value))))
  match = _HUB.fullmatch(value)
  if match is None:
    raise UserError(f'"{text}" is not a hub id; write hf:ORG/NAME[@REV]')
  return Source('hf', *match.groups())


# ----------------------------------------------------------------------------
# A repository of the hub: the configs and one set of weights, safetensors if
# there are any. The cache is used if the hub cannot be reached or
# `HF_HUB_OFFLINE=1` is set.

CONFIGS = ('config.json', 'preprocessor_config.json')
_SAFE = tuple(
  f'{prefix}model.safetensors{ending}'
  for prefix in ('', 'diffusion_pytorch_')  # as diffusers names them
  for ending in ('', '.index.json')
)
_SAFE_SHARDS = ('*model-*-of-*.safetensors',)
_TORCH = ('pytorch_model.bin', 'pytorch_model.bin.index.json')
_TORCH_SHARDS = ('pytorch_model-*-of-*.bin',)


def fetch_command(hub: str, revision: str | None) -> str:
  """The shell command that downloads configs and safetensors to the cache."""
  at = f' --revision {revision}' if revision else ''
  return (
    f"hf download {hub}{at} --include '*config.json' --include "
    "'*model*.safetensors*'"
  )


def snapshot(
  hub: str, revision: str | None, files: tuple[str, ...] = ()
) -> tuple[pathlib.Path, str]:
  """(the folder, the commit that it holds) of ORG/NAME at a revision.

  Args:
    hub: ORG/NAME.
    revision: a branch, tag or commit; None for the default branch.
    files: names of the files to download, which the repository may lack; by
      default the configs and one set of weights.

  Raises:
    UserError: no such repository or revision, no connection, or no weights,
      with the command that downloads them.
  """
  if files:
    folder = _download(hub, revision, files)
    return folder, folder.name
  folder = _download(hub, revision, (*CONFIGS, *_SAFE, *_SAFE_SHARDS))
  if not any((folder / name).exists() for name in _SAFE):
    folder = _download(hub, folder.name, (*CONFIGS, *_TORCH, *_TORCH_SHARDS))
    if not any((folder / name).exists() for name in _TORCH):
      raise UserError(
        f'hf:{hub}: its folder {folder} holds no {_SAFE[0]}; download it with: '
        f'{fetch_command(hub, revision)}'
      )
  return folder, folder.name


def _download(
  hub: str, revision: str | None, files: tuple[str, ...]
) -> pathlib.Path:
  import huggingface_hub  # slow to import

  try:
    folder = huggingface_hub.snapshot_download(
      hub, revision=revision, allow_patterns=list(files)
    )
  # The client raises errors of three libraries; none is a fault of this one.
  except Exception as e:
    at = f'@{revision}' if revision else ''
    raise UserError(
      f'Could not download hf:{hub}{at} ({type(e).__name__}: '
      f'{printable(e, 160)}); where there is a network: '
      f'{fetch_command(hub, revision)}, or name a folder that has its files'
    ) from None
  return pathlib.Path(folder)
