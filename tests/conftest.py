"""Eight fake devices, shared compilations, shapes checked at every call.

The import hook checks annotations in every module but `types.py`, whose
pytrees also hold shapes and shardings, `specs.py`, which checks its own fields,
and the thin command lines.
"""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)

import pathlib

import jax
import jaxtyping
import pytest

import tests.typecheck  # noqa: F401, the hook finds it by its name

CHECKED = (
  'errors', 'ops', 'nn', 'losses', 'models', 'quantizers',
  'inference', 'optim', 'sharding', 'export', 'data', 'evaluate', 'train',
  'weights', 'encoders', 'pretrained',
)  # fmt: skip
jaxtyping.install_import_hook(
  [f'vqrae_jax.{name}' for name in CHECKED], 'tests.typecheck.checked'
)

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Compiling is most of the suite's time, and many tests share a program.
jax.config.update('jax_compilation_cache_dir', str(ROOT / '.jax_cache'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """Real photographs beside the checkout; tests that want them skip without."""
  folder = ROOT.parent / 'shared' / 'data'
  if not folder.is_dir():
    pytest.skip('no photographs at ../shared/data')
  return folder


@pytest.fixture(scope='session')
def place(tmp_path_factory) -> pathlib.Path:
  """Everything that a command may be pointed at by mistake (`tests/bad.py`)."""
  from tests import bad  # not before the hook is there

  return bad.make(tmp_path_factory.mktemp('a place') / 'wörk')
