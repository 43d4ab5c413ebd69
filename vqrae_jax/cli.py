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
from typing import Any

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


# ----------------------------------------------------------------------------
# The flag `--config=F.py:args --config.a.b=v` of the commands that take a run.
#
# A file is found as given or as installed, and an override names a key that is
# there, else the nearest one is named.


def find_config(path: str) -> str:
  """The config file that `path` names: as given, or as installed.

  Its folder's parent goes first on `sys.path`, so that a config's
  `from configs import common` finds the `configs` it lies in.
  """
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    root = pathlib.Path(__file__).resolve().parents[1]
    installed = root / file
    if not installed.is_file():
      known = [f'configs/{p.name}' for p in (root / 'configs').glob('[!_]*.py')]
      raise UserError(f'no config at "{path}"{did_you_mean(path, known)}')
    file = installed
  home = str(file.resolve().parents[1])
  if home not in sys.path[:1]:
    sys.path.insert(0, home)
    sys.modules.pop('configs', None)
  return str(file)


def resolved(argv: list[str]) -> list[str]:
  """argv with the config's path resolved, its `:args` kept."""
  out, words = [], iter(argv)
  for word in words:
    if word in ('--config', '-config'):  # the value is the next word
      word = f'{word}={next(words, "")}'
    if word.startswith(('--config=', '-config=')):
      path, colon, args = word.split('=', 1)[1].partition(':')
      word = f'--config={find_config(path)}{colon}{args}'
    out.append(word)
  return out


def parse_config_flag(
  argv: list[str],
  module: str,
  example: str,
  about: str,
  define: Callable[[flags.FlagValues], None],
) -> flags.FlagValues:
  """The parsed flags of `python -m module`, --config among them.

  Args:
    argv: without the program.
    about: what --help says of --config.
    define: adds the command's other flags.

  Raises:
    UserError: an unknown flag or key, or a bad value.
  """
  from ml_collections import config_flags

  def values_of(words):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
      'config',
      None,
      about,
      flag_values=values,
      # Or it would look for --config.a.b=v in the process's own arguments.
      sys_argv=[module, *words],
    )
    define(values)
    parse(values, words, module, example)
    return values

  argv = resolved(argv)
  own = [w for w in argv if not w.lstrip('-').startswith('config.')]
  values = values_of(own)
  if values.config is None:
    return values
  # As its file says first, to see that each override has its key.
  _check_overrides(values.config, argv)
  return values_of(argv)


def _check_overrides(config: Any, argv: list[str]) -> None:
  """Every --config.a.b=v names a key that the config has."""
  for word in argv:
    dotted = word.lstrip('-').split('=')[0]
    if not (word.startswith('-') and dotted.startswith('config.')):
      continue
    node, path = config, 'config'
    for key in dotted.split('.')[1:]:
      keys = list(node.keys()) if hasattr(node, 'keys') else []
      if key not in keys:
        raise UserError(
          f'unknown key "{path}.{key}"{did_you_mean(key, keys)} (others are '
          "set in the config's file)"
          if keys
          else f'"{path}" has no keys, so no "{path}.{key}"'
        )
      node, path = node[key], f'{path}.{key}'
