"""A repository of the Hugging Face hub as a folder, fetched or cached.

Only what an encoder needs is asked for: the configs and one set of weights,
safetensors if there are any. What the cache holds is used when the hub cannot
be reached or `HF_HUB_OFFLINE=1` forbids it. Nothing in a repository is run.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import os
import pathlib
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator

from vqrae_jax.errors import UserError, choose, did_you_mean
from vqrae_jax.paths import cache_folder

# ----------------------------------------------------------------------------
# Weights that are single files on the web, beside the encoders of the hub.
#
# A row says where a file lies, what its SHA-256 must be, its licence and what
# needs it; `NEEDS` says which words of a config ask for which rows. A licence is
# the one its authors state; read it there before relying on it. Encoders have
# their own table (`encoders/published.py`). Nothing here touches the network.

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


# ----------------------------------------------------------------------------
# One file from the web: resumed, verified, and there whole or not at all.
#
# Bytes gather in NAME.part, beside NAME.part.tag with the server's own mark of
# the file, so that a download that was cut goes on, and starts over where the
# file has changed or the server cannot resume. The SHA-256 stands in
# NAME.sha256 before NAME itself appears.

_CHUNK = 1 << 20
_SECONDS = 30.0  # without a byte
_TRIES = 3  # of a connection that is cut
_NETWORK = (OSError, http.client.HTTPException)

# (bytes so far, bytes in all or None)
Progress = Callable[[int, int | None], None]


def download(
  url: str,
  path: pathlib.Path,
  sha256: str | None = None,
  progress: Progress = lambda done, total: None,
) -> bool:
  """Brings `url` to `path`; False if the file was there already, and whole.

  Args:
    url: http or https.
    path: the file to make; its folder is made too.
    sha256: what the file must hash to, if it is known.
    progress: called now and then.

  Raises:
    UserError: no way to it, another file than it should be, or no place to
      write it; what was there before stays.
  """
  want = wanted(path, sha256)
  if path.is_file():
    have = digest(path)
    if have.startswith(want):
      _record(path, have)
      return False
  part = path.with_name(f'{path.name}.part')
  with _locked(part, url):
    for tries in range(_TRIES):
      resumed = _fetch(url, path, part, progress, last=tries == _TRIES - 1)
      if resumed is None:
        continue
      have = digest(part)
      if have.startswith(want):
        break
      _forget(part)
      if not resumed:
        raise UserError(
          f'{url} has the SHA-256 {have}, and {want} is wanted: it is another '
          'file than the table means, or was changed on its way; nothing is '
          'kept'
        )
    else:
      raise UserError(f'{url} does not come whole; run the command again')
    _record(path, have)
    os.replace(part, path)
    _forget(part)
  return True


def _record(path: pathlib.Path, digest: str) -> None:
  beside = record(path)
  line = f'{digest}  {path.name}\n'
  with contextlib.suppress(OSError, UnicodeDecodeError):
    if beside.read_text() == line:
      return
  try:
    new = beside.with_name(f'{beside.name}.part')
    new.write_text(line)
    os.replace(new, beside)
  except OSError:  # a cache that is only read
    if not path.exists():
      raise


@contextlib.contextmanager
def _locked(part: pathlib.Path, url: str) -> Iterator[None]:
  """Holds the part against other processes, and makes its folder."""
  try:
    part.parent.mkdir(parents=True, exist_ok=True)
    held = part.with_name(f'{part.name}.lock').open('w')
  except OSError as e:
    raise UserError(
      f'{part.parent} cannot be written ({e.strerror}); set VQRAE_JAX_CACHE to '
      f'a folder that can, or put {url} there by hand'
    ) from None
  with held:
    try:
      fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f'{part} is being fetched by another process; wait for it'
      ) from None
    except OSError:  # a file system without locks
      pass
    try:
      yield
    finally:
      pathlib.Path(held.name).unlink(missing_ok=True)


def _tag(part: pathlib.Path) -> pathlib.Path:
  return part.with_name(f'{part.name}.tag')


def _forget(part: pathlib.Path) -> None:
  part.unlink(missing_ok=True)
  _tag(part).unlink(missing_ok=True)


def _begun(part: pathlib.Path) -> tuple[int, str]:
  """(bytes that are here, the server's mark of their file)."""
  try:
    mark = _tag(part).read_text().strip()
    return (part.stat().st_size, mark) if mark else (0, '')
  except (OSError, UnicodeDecodeError):
    return 0, ''


def _fetch(
  url: str,
  path: pathlib.Path,
  part: pathlib.Path,
  progress: Progress,
  last: bool,
) -> bool | None:
  """Fills the part: whether it was resumed; None if the connection was cut.

  Raises:
    UserError: no way to it, or the last cut.
  """
  start, mark = _begun(part)
  request = urllib.request.Request(url, headers={'User-Agent': 'vqrae_jax'})
  if start:
    request.add_header('Range', f'bytes={start}-')
    request.add_header('If-Range', mark)
  try:
    answer = urllib.request.urlopen(request, timeout=_SECONDS)
  except urllib.error.HTTPError as e:
    if e.code == 416:  # more is here than there: another file
      _forget(part)
      return None
    raise _unreachable(url, path, f'{e.code} {e.reason}') from None
  except _NETWORK as e:
    raise _unreachable(url, path, str(getattr(e, 'reason', e))) from None
  with answer:
    goes_on = answer.status == 206 and answer.headers.get(
      'Content-Range', ''
    ).startswith(f'bytes {start}-')
    done = start if goes_on else 0
    length = answer.headers.get('Content-Length')
    total = None if length is None else done + int(length)
    _mark(part, answer.headers)
    with part.open('ab' if goes_on else 'wb') as file:
      while True:
        try:
          chunk = answer.read(_CHUNK)
        except _NETWORK:
          chunk = b''
        if not chunk:
          break
        file.write(chunk)
        done += len(chunk)
        progress(done, total)
  if total is not None and done != total:
    if last:
      raise UserError(
        f'{url} was cut after {done} of {total} bytes; run the command again '
        'to go on from there'
      )
    return None
  return bool(goes_on)


def _mark(part: pathlib.Path, headers: http.client.HTTPMessage) -> None:
  """Keeps what `If-Range` may name: a strong ETag, or a date."""
  mark = headers.get('ETag', '')
  if not mark or mark.startswith('W/'):
    mark = headers.get('Last-Modified', '')
  _tag(part).write_text(mark)


def _unreachable(url: str, path: pathlib.Path, reason: str) -> UserError:
  words = ' '.join(reason.split())[:120]
  return UserError(
    f'{url} cannot be had ({words}); fetch it where there is a network and '
    f'put it at {path}'
  )


# ----------------------------------------------------------------------------
# The word that says where weights come from, one parser for every door.
#
#   hf:ORG/NAME[@REV]   a repository of the Hugging Face hub
#   rae:FILE            a published RAE decoder
#   vqrae_torch:FILE    a model of the PyTorch project
#   a/path  ./name      a file or directory
#   name                a row of a table
#
# It reads a word; it opens nothing.

SCHEMES = ('hf', 'rae', 'vqrae_torch')

_SCHEME = re.compile(r'([A-Za-z][A-Za-z0-9_+.-]*):(.*)', re.DOTALL)
_HUB = re.compile(r'([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?')


@dataclasses.dataclass(frozen=True)
class SourceWord:
  """A parsed source: its kind and what the kind needs.

  `kind` is "hf", "rae", "vqrae_torch", "path" or "row"; `value` is the
  ORG/NAME, the path (home expanded) or the row's name; `revision` is the
  hub's, None for its default.
  """

  kind: str
  value: str
  revision: str | None = None


def parse_source(word: str, rows: Iterable[str] = ()) -> SourceWord:
  """Reads a source word.

  Args:
    word: as a flag or a config has it.
    rows: the names that a bare word may be.

  Raises:
    UserError: an unknown scheme or row, or a scheme without its value.
  """
  names = tuple(rows)
  if not word.strip():
    raise UserError(
      'an empty source of weights; give hf:ORG/NAME, rae:FILE, a path or a name'
    )
  if word in names:
    return SourceWord('row', word)
  match = _SCHEME.fullmatch(word)
  if match is not None:
    return _with_scheme(word, *match.groups())
  path = pathlib.Path(word).expanduser()
  if '/' in word or word.startswith(('.', '~')) or path.exists():
    return SourceWord('path', str(path))
  raise UserError(
    f'unknown source of weights "{word}"{did_you_mean(word, names)}; a path '
    'has a "/" in it, a hub id starts with hf:'
  )


def _with_scheme(word: str, scheme: str, value: str) -> SourceWord:
  if scheme not in SCHEMES:
    raise UserError(
      f'unknown scheme "{scheme}:" in "{word}"{did_you_mean(scheme, SCHEMES)}'
    )
  if scheme != 'hf':
    if not value:
      raise UserError(f'"{word}" names no file; write {scheme}:FILE')
    return SourceWord(scheme, str(pathlib.Path(value).expanduser()))
  match = _HUB.fullmatch(value)
  if match is None:
    raise UserError(f'"{word}" is no hub id; write hf:ORG/NAME[@REV]')
  return SourceWord('hf', *match.groups())


CONFIGS = ('config.json', 'preprocessor_config.json')
_SAFE = (
  'model.safetensors',
  'model.safetensors.index.json',
  'model-*-of-*.safetensors',
)
_TORCH = ('pytorch_model.bin', 'pytorch_model.bin.index.json')
_TORCH_SHARDS = ('pytorch_model-*-of-*.bin',)


def fetch_command(hub: str, revision: str | None) -> str:
  """The shell line that brings what is needed into the cache."""
  at = f' --revision {revision}' if revision else ''
  return (
    f"hf download {hub}{at} --include '*config.json' --include "
    "'model*.safetensors*'"
  )


def snapshot(hub: str, revision: str | None) -> tuple[pathlib.Path, str]:
  """(the folder, the commit that it holds) of ORG/NAME at a revision.

  Args:
    hub: ORG/NAME.
    revision: a branch, tag or commit; None for the default branch.

  Raises:
    UserError: no such repository or revision, or no way to it; with the
      command that brings it.
  """
  folder = _download(hub, revision, (*CONFIGS, *_SAFE))
  if not any((folder / name).exists() for name in _SAFE[:2]):
    folder = _download(hub, folder.name, (*CONFIGS, *_TORCH, *_TORCH_SHARDS))
    if not any((folder / name).exists() for name in _TORCH):
      raise UserError(
        f'hf:{hub}: its folder {folder} holds no {_SAFE[0]}; bring it with: '
        f'{fetch_command(hub, revision)}'
      )
  return folder, folder.name


def _download(
  hub: str, revision: str | None, files: tuple[str, ...]
) -> pathlib.Path:
  import huggingface_hub  # heavy, and only here

  try:
    folder = huggingface_hub.snapshot_download(
      hub, revision=revision, allow_patterns=list(files)
    )
  # The client raises a dozen kinds of three libraries; none is our fault.
  except Exception as e:
    words = ' '.join(str(e).split())[:140] or type(e).__name__
    at = f'@{revision}' if revision else ''
    raise UserError(
      f'hf:{hub}{at} cannot be had ({type(e).__name__}: {words}); where there '
      f'is a network: {fetch_command(hub, revision)}, or name a folder that '
      'has its files'
    ) from None
  return pathlib.Path(folder)
