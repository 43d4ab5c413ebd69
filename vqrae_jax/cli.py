"""What the command lines share: flags, the config, errors and exit codes.

Flags belong to one call, not to the process, so tests may call a `main` many
times. A `UserError`, a path that does not exist or may not be used, or a URL
that needs a package is one line on stderr and exit code 2; another error of the
system (a full disk) is one line and exit code 1. A run that was stopped and
saved itself exits with 143, as the shell reports SIGTERM, one that lost another
host with 75 (`hosts.py`). Any other error keeps its traceback.
"""

import contextlib
import importlib
import importlib.metadata
import io
import logging as std_logging
import os
import pathlib
import platform
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags, logging

from vqrae_jax import __version__
from vqrae_jax.errors import Stopped, UserError, did_you_mean
from vqrae_jax.paths import check_writable

COMMANDS = {
  'train': 'train a tokenizer from a config',
  'preflight': 'memory and compilation of a run, on devices you need not have',
  'evaluate': 'PSNR, SSIM, LPIPS, rFID, usage and probes of a tokenizer',
  'reconstruct_images': 'images through tokens and back, as PNGs with PSNR',
  'tokenize': 'the indices of a data set, in files that trainers read',
  'demo': 'a web page that shows an image, its tokens and its reconstruction',
  'doctor': 'the health of a codebook on images, with remedies',
  'latent_stats': "mean and variance of an encoder's latents",
  'fetch_weights': 'download the published weights that a config needs',
  'convert': 'convert PyTorch checkpoints to this package and back',
  'export': 'write a tokenizer as programs that need only JAX',
  'push': 'upload a tokenizer to the Hugging Face hub, with a model card',
  'train.export': 'the tokenizer of an unfinished run',
}


def _parse(values: flags.FlagValues, argv: list[str], **options) -> list[str]:
  """Parses argv into `values`; what is left of it."""
  values.set_gnu_getopt()
  try:
    return values(['', *argv], **options)[1:]
  except flags.UnrecognizedFlagError as e:
    near = did_you_mean(e.flagname, values)
    raise UserError(f'unknown flag --{e.flagname}{near}') from None
  except (flags.Error, ValueError, TypeError) as e:
    raise UserError(str(e)) from None


def parse(
  values: flags.FlagValues, argv: list[str], module: str, example: str
) -> None:
  """Parses argv (without the program) into `values`; `--help` prints and
  exits.

  Raises:
    UserError: an unknown flag, a bad value, or arguments that are no flags.
  """
  about = 'show this help'
  flags.DEFINE_bool('help', False, about, values, short_name='h')
  rest = _parse(values, argv)
  if values.help:
    print(f'python -m {module}\n\nexample:\n  {example}\n\nflags:')
    for name in sorted(values):
      flag = values[name]
      if name == flag.name and name != 'help':
        default = '' if flag.default is None else f' (default: {flag.default})'
        print(f'  --{name}: {flag.help}{default}')
    sys.exit(0)
  if rest:
    raise UserError(f'unexpected argument "{rest[0]}"; flags start with --')


def required(values: flags.FlagValues, *names: str) -> None:
  """Each named flag must have a value."""
  for name in names:
    if getattr(values, name) in (None, ''):
      raise UserError(f'flag --{name} is missing: {values[name].help}')


def new_file(path: str, ending: str, flag: str = '--out') -> pathlib.Path:
  """What a flag names: a file to be made, in a folder that exists.

  Raises:
    UserError: another ending, no such folder, or something is there.
  """
  out = pathlib.Path(os.path.expanduser(path))
  if out.suffix != ending:
    raise UserError(f'{flag}={path} must end in {ending}')
  if out.exists() or out.is_symlink():
    raise UserError(f'{flag}={path} exists and is not replaced; name another')
  if not out.parent.is_dir():
    raise UserError(f'{flag}={path}: there is no folder {out.parent}')
  check_writable(out.parent, flag)
  return out


def new_folder(path: str, absent: bool = False) -> pathlib.Path:
  """The local folder that --out names, made later if absent.

  Args:
    path: of the flag.
    absent: whether it must not be there yet.

  Raises:
    UserError: a URL, something is there, or it cannot be written.
  """
  if '://' in path:
    raise UserError(f'--out={path} is a URL; name a local folder')
  out = pathlib.Path(os.path.expanduser(path))
  if absent and (out.exists() or out.is_symlink()):
    raise UserError(f'--out={path} exists and is not replaced; name another')
  check_writable(out, '--out')
  return out


COMPILERS = 'libtpu', 'jax-cuda12-plugin', 'jax-cuda13-plugin'


def versions() -> dict[str, str]:
  """{name: version} of what files and figures depend on."""
  found = {'python': platform.python_version(), 'vqrae_jax': __version__}
  for name in ('jax', 'jaxlib', *COMPILERS, 'flax', 'numpy', 'pillow'):
    # Most compilers are not there; a build of one's own may have no metadata.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def define_tokenizer(
  values: flags.FlagValues,
  text: str = 'a tokenizer: a folder, a gs:// URL, or hf:ORG/NAME of the hub',
) -> None:
  """The flags of a command that opens a tokenizer."""
  flags.DEFINE_string('tokenizer', None, text, flag_values=values)
  define_trusted(values)


def define_data(values: flags.FlagValues, name: str = 'data') -> None:
  """The flag of a command that reads images."""
  text = (
    'images: a file, a folder, a glob, tar shards, ArrayRecord files or '
    'bundled:photos'
  )
  flags.DEFINE_string(name, None, text, flag_values=values)


def define_trusted(values: flags.FlagValues) -> None:
  """The flag of a command that builds a tokenizer's model."""
  text = (
    'packages whose code may be run, if the encoder or the quantizer comes '
    'from another package'
  )
  flags.DEFINE_list('trusted', [], text, flag_values=values)


HOSTS = ('coordinator_address', 'num_processes', 'process_id')


def define_hosts(values: flags.FlagValues) -> None:
  """Flags of a command that many hosts run together."""
  flags.DEFINE_bool(
    'distributed',
    'JAX_COORDINATOR_ADDRESS' in os.environ,
    'join the other hosts with jax.distributed.initialize(), which finds them '
    'by itself on TPU VMs and GKE, under Slurm and Open MPI 4, and in '
    'Kubernetes Jobs and JobSets (with the package kubernetes and permission '
    'to read pods); elsewhere give --coordinator_address, --num_processes, '
    '--process_id',
    values,
  )
  flags.DEFINE_string(HOSTS[0], None, 'HOST:PORT of process 0', values)
  for name, about in (
    ('num_processes', 'number of processes'),
    ('process_id', "this process's number, from 0"),
  ):
    flags.DEFINE_integer(name, None, about, flag_values=values)


def join_hosts(values: flags.FlagValues) -> None:
  """Joins the other hosts, if the flags of `define_hosts` ask for it.

  Raises:
    UserError: what `jax.distributed` could not find is missing, or a host
      could not be reached.
  """
  import jax

  given = {n: values[n].value for n in HOSTS if values[n].value is not None}
  if not (values.distributed or given):
    return
  try:
    jax.distributed.initialize(**given)
  except (RuntimeError, ValueError, IndexError) as e:
    missing = ', '.join(f'--{name}' for name in HOSTS if name not in given)
    hint = f'; give {missing}' if missing else ''
    raise UserError(f'--distributed: {e}{hint}') from None


# ----------------------------------------------------------------------------
# The flag `--config=F.py:args --config.a.b=v` of the commands that take a run.


def find_config(path: str) -> str:
  """The config file that `path` names: as given, or "configs/NAME.py" of the
  recipes.

  Raises:
    UserError: no such file.
  """
  file = pathlib.Path(os.path.expanduser(path))
  if not file.is_file():
    names = {p.name for p in _recipes().glob('[!_]*.py')} - {'common.py'}
    known = [f'configs/{name}' for name in sorted(names)]
    if path not in known:
      raise UserError(f'no config at "{path}"{did_you_mean(path, known)}')
    file = _recipes() / file.name
  return str(file)


def _recipes() -> pathlib.Path:
  """Their folder: within the package if installed, beside it in a checkout."""
  package = pathlib.Path(__file__).resolve().parent
  inside = package / 'configs'
  return inside if inside.is_dir() else package.parent / 'configs'


@contextlib.contextmanager
def _configs_are(*folders: pathlib.Path) -> Iterator[None]:
  """`import configs` finds these folders, and what it found before
  afterwards."""

  def taken():
    names = [n for n in sys.modules if f'{n}.'.startswith('configs.')]
    return {name: sys.modules.pop(name) for name in names}

  before = taken()
  sys.modules['configs'] = package = types.ModuleType('configs')
  package.__path__ = [*map(str, folders)]
  try:
    yield
  finally:
    taken()
    sys.modules.update(before)


def load_config(source: str) -> Any:
  """What get_config(args) returns, of the file in "F.py:args".

  In the file `configs` is the folder of the recipes and then its own: `from
  configs import common` works wherever it lies. Modules beside it are found by
  their own names too, after all that is installed.

  Raises:
    UserError: no such file, or the file raises: its author has to fix it.
  """
  from ml_collections import ConfigDict

  path, colon, args = source.partition(':')
  file = find_config(path)
  home = pathlib.Path(file).resolve().parent
  if home != _recipes() and str(home) not in sys.path:
    sys.path.append(str(home))
  try:
    with _configs_are(_recipes(), home):
      found = runpy.run_path(file)['get_config'](*[args] * len(colon))
    if not hasattr(found, 'items'):
      raise TypeError(f'get_config returned {found!r}, not a ConfigDict')
    return ConfigDict(found)
  except Exception as e:
    frames = traceback.extract_tb(e.__traceback__)
    at = ''.join([f':{f.lineno}' for f in frames if f.filename == file][-1:])
    kind = '' if isinstance(e, ValueError) else f'{type(e).__name__}: '
    raise UserError(f'{path}{at}: {kind}{e}') from None


def parse_config_flag(
  argv: list[str],
  module: str,
  example: str,
  about: str,
  define: Callable[[flags.FlagValues], None],
) -> flags.FlagValues:
  """The parsed flags of `python -m module`: `config` is the ConfigDict with
  its overrides, or None; the `default_as_str` of that flag is "F.py:args".

  Args:
    argv: without the program.
    about: what --help says of --config.
    define: adds the command's other flags.

  Raises:
    UserError: an unknown flag or key, or a bad value.
  """
  from ml_collections import config_flags

  first, values = flags.FlagValues(), flags.FlagValues()
  flags.DEFINE_string('config', None, about, first)
  argv = _parse(first, argv, known_only=True)
  define(values)
  if first.config is None:
    flags.DEFINE_string('config', None, about, values)
  else:
    config = load_config(first.config)
    _check_overrides(config, argv)
    config_flags.DEFINE_config_dict(
      'config', config, about, values, sys_argv=['', *argv]
    )
    values['config'].default_as_str = first.config
  parse(values, argv, module, example)
  return values


def _check_overrides(config: Any, argv: list[str]) -> None:
  """Every --config.a.b=v names a key that the config has."""
  for word in argv:
    dotted = word.lstrip('-').partition('=')[0].removeprefix('no')
    if not (word.startswith('-') and dotted.startswith('config.')):
      continue
    node, path = config, 'config'
    for key in dotted.split('.')[1:]:
      keys = list(node.keys()) if hasattr(node, 'keys') else []
      if key not in keys:
        near = did_you_mean(key, keys) if keys else f'; {path} is not a section'
        raise UserError(
          f'the config file does not set "{path}.{key}"{near} (a key that it '
          'does not set goes into the file)'
        )
      node, path = node[key], f'{path}.{key}'


# ----------------------------------------------------------------------------
# A command as a process.


def _is_ours(record: std_logging.LogRecord) -> bool:
  """Orbax and grain log each of their steps, under absl's own name."""
  theirs = f'{os.sep}orbax{os.sep}', f'{os.sep}grain{os.sep}'
  noise = record.levelno < std_logging.WARNING
  return not (noise and any(part in record.pathname for part in theirs))


_BAD_PATH = (
  FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
  PermissionError,
)  # fmt: skip


def run(main: Callable[[list[str]], None]) -> None:
  """Runs `main(argv)`; bad input is one line and exit code 2, another error of
  the system (a full disk) one line and 1."""
  # absl asks the process-wide flags, which stay empty here, how to log.
  flags.FLAGS.mark_as_parsed()
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  logging.set_stderrthreshold('info')
  # A file's name may hold bytes that no terminal can show.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')
  logging.get_absl_handler().addFilter(_is_ours)
  for noisy in ('jax', 'tensorboardX', 'PIL', 'httpx'):
    std_logging.getLogger(noisy).setLevel(std_logging.WARNING)
  try:
    main(sys.argv[1:])
  except UserError as e:
    print(f'error: {" ".join(str(e).split())}', file=sys.stderr)
    sys.exit(2)
  except OSError as e:
    if e.strerror is None or isinstance(e, ConnectionError | TimeoutError):
      raise
    where = f'{e.filename}: ' if e.filename else ''
    print(f'error: {where}{e.strerror}', file=sys.stderr)
    # A scheduler does not start again after 2: a disk may be back by then.
    sys.exit(2 if isinstance(e, _BAD_PATH) else 1)
  except ImportError as e:
    # fsspec's, of a URL whose package is not here, has a message alone.
    if e.name is not None:
      raise
    print(f'error: {" ".join(str(e).split())}', file=sys.stderr)
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


def module_of(command: str) -> types.ModuleType:
  """The module of a command of `COMMANDS`: its `main`, and `define`, which
  defines its flags (but --config, of which it has `ABOUT`)."""
  packages = 'train', 'evaluate', 'export'
  end = '.__main__' if command in packages else ''
  return importlib.import_module(f'vqrae_jax.{command}{end}')


def vqrae() -> None:
  """The console entry point: `vqrae NAME …` is `python -m vqrae_jax.NAME …`."""
  name = sys.argv.pop(1) if sys.argv[1:] else '--help'
  if name in COMMANDS:
    return run(module_of(name).main)
  if name not in ('-h', '--help'):
    near = did_you_mean(name, COMMANDS)
    print(f'error: unknown command "{name}"{near}', file=sys.stderr)
    sys.exit(2)
  print('vqrae COMMAND --help shows the flags of a command:\n')
  for command, about in COMMANDS.items():
    print(f'  {command:20}{about}')
