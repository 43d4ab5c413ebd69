"""One file from the web: resumed, verified, and there whole or not at all.

Bytes gather in NAME.part, beside NAME.part.tag with the server's own mark of
the file, so that a download that was cut goes on, and starts over where the
file has changed or the server cannot resume. The SHA-256 stands in
NAME.sha256 before NAME itself appears.
"""

import contextlib
import fcntl
import http.client
import os
import pathlib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

from vqrae_jax.errors import UserError
from vqrae_jax.weights import published

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
  want = published.wanted(path, sha256)
  if path.is_file():
    have = published.digest(path)
    if have.startswith(want):
      _record(path, have)
      return False
  part = path.with_name(f'{path.name}.part')
  with _locked(part, url):
    for tries in range(_TRIES):
      resumed = _fetch(url, path, part, progress, last=tries == _TRIES - 1)
      if resumed is None:
        continue
      have = published.digest(part)
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
  beside = published.record(path)
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
