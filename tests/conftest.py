"""Eight fake devices, shared compilations, array shapes checked at every call.

The import hook checks jaxtyping annotations in every module of the package
but `types.py`, whose pytrees also hold shapes and shardings.
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

CHECKED = ('errors', 'ops', 'nn', 'losses', 'models', 'quantizers')
jaxtyping.install_import_hook(
  [f'vqrae_jax.{name}' for name in CHECKED], 'beartype.beartype'
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
