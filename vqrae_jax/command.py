"""What every command line shares: its flags, its errors, its exit codes.

Flags belong to one call, not to the process, so nothing is defined at import
and tests may call a `main` many times. A `UserError` becomes one line on
stderr and exit code 2; a run that a signal stopped, and that saved itself, one
line and 143, as the shell has it for SIGTERM. A disk that is full or
read-only is a line too. Any other error keeps its traceback.
"""

import errno
import io
import logging as std_logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable

from absl import flags, logging

from vqrae_jax.errors import Stopped, UserError, did_you_mean

# How absl says that a value is of another type, and what it should say.
_TYPES = (
  (r'invalid literal for int\(\) .*', 'it must be a whole number'),
  (r'could not convert string to float.*', 'it must be a number'),
  (r"\('Non-boolean .*\)", 'it must be true or false'),
)
# A disk or a path that does not let a run write, read or go on.
_DISK = (
  errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
  errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EIO,
)  # fmt: skip


def parse(
  values: flags.FlagValues, argv: list[str], module: str, example: str
) -> None:
  """Parses argv (without the program) into `values`; `--help` prints and
  exits.

  Raises:
    UserError: an unknown flag, a bad value, or words that are no flags.
  """
  flags.DEFINE_bool(
    'help', False, 'show this help', short_name='h', flag_values=values
  )
  try:
    rest = values([module, *argv])
  except flags.UnrecognizedFlagError as e:
    raise UserError(
      f'unknown flag --{e.flagname}{did_you_mean(e.flagname, values)}'
    ) from None
  except SyntaxError as e:
    raise UserError(f'{e.filename}:{e.lineno}: {e.msg}') from None
  # Config files are code: what one raises is its writer's to mend.
  except Exception as e:
    raise UserError(_one_line(e)) from None
  if values.help:
    print(f'python -m {module}\n\nexample:\n  {example}\n\nflags:')
    for name in sorted(values):
      flag = values[name]
      if name == flag.name and name != 'help':
        default = '' if flag.default is None else f' (default: {flag.default})'
        print(f'  --{name}: {flag.help}{default}')
    sys.exit(0)
  if rest[1:]:
    raise UserError(f'unexpected argument "{rest[1]}"; flags start with --')


def _one_line(error: Exception) -> str:
  """What a flag, config file or override failed with, in one line."""
  text = str(error.args[0] if error.args else error)
  lines = [line.strip() for line in text.split('\n') if line.strip()]
  if 'Traceback' in text:  # the config file itself failed: its last line
    kind, _, words = lines[-1].partition(': ')
    where = re.findall(r'File "(.*)", line (\d+)', text)[-1:]
    at = ':'.join(*where) if where else 'config file'
    return words if kind == 'ValueError' else f'{at}: {lines[-1]}'
  text = ' '.join(lines)
  at = traceback.extract_tb(error.__traceback__)[-1]
  library = any(
    f'/{name}/' in at.filename for name in ('absl', 'ml_collections')
  )
  if library or isinstance(error, flags.Error | ValueError | OSError):
    for pattern, words in _TYPES:
      text = re.sub(pattern, words, text)
    return text
  return f'{at.filename}:{at.lineno}: {type(error).__name__}: {text}'


def required(values: flags.FlagValues, *names: str) -> None:
  """Each named flag must have a value."""
  for name in names:
    if getattr(values, name) in (None, ''):
      raise UserError(f'flag --{name} is missing: {values[name].help}')


def new_file(path: str, ending: str) -> pathlib.Path:
  """What --out names: not there yet, in a folder that is.

  Raises:
    UserError: another ending, no folder, or something is there.
  """
  out = pathlib.Path(path).expanduser()
  if out.suffix != ending:
    raise UserError(f'--out={path} must end in {ending}')
  if out.exists() or out.is_symlink():
    raise UserError(f'--out={path} exists and is not replaced; name another')
  if not out.parent.is_dir():
    raise UserError(f'--out={path}: there is no folder {out.parent}')
  return out


def join_hosts() -> None:
  """Joins the other hosts of a `--distributed` command.

  Raises:
    UserError: there is nothing to join, or no way to it.
  """
  import jax

  try:
    jax.distributed.initialize()
  except (RuntimeError, ValueError) as e:
    raise UserError(f'--distributed: {" ".join(str(e).split())}') from None


def _worth_saying(record: std_logging.LogRecord) -> bool:
  """Orbax and grain log each of their steps, under absl's own name."""
  theirs = f'{os.sep}orbax{os.sep}', f'{os.sep}grain{os.sep}'
  noise = record.levelno < std_logging.WARNING
  return not (noise and any(part in record.pathname for part in theirs))


def run(main: Callable[[list[str]], None]) -> None:
  """Runs `main(argv)`; a `UserError` is one line and exit code 2."""
  # absl asks the process-wide flags, which stay empty here, how to log.
  flags.FLAGS.mark_as_parsed()
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  logging.set_stderrthreshold('info')
  # A file's name may hold bytes that are no text of any terminal.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')
  logging.get_absl_handler().addFilter(_worth_saying)
  for noisy in ('jax', 'tensorboardX', 'PIL'):
    std_logging.getLogger(noisy).setLevel(std_logging.WARNING)
  try:
    main(sys.argv[1:])
  except UserError as e:
    print(f'error: {" ".join(str(e).split())}', file=sys.stderr)
    sys.exit(2)
  except OSError as e:
    if e.errno not in _DISK:
      raise
    where = f'{e.filename}: ' if e.filename else ''
    print(f'error: {where}{e.strerror}', file=sys.stderr)
    sys.exit(2)
  except Stopped as e:
    print(f'stopped: {e}', file=sys.stderr)
    sys.exit(143)
  except KeyboardInterrupt:
    print('stopped', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # A program may be compiling in a thread that no orderly end waits for.
    os._exit(130)
