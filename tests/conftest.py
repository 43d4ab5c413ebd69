"""Eight fake devices, shapes checked at every call, fixtures of all rooms.

The import hook checks annotations where arrays are computed; `types.py` is left
out, whose pytrees also hold shapes and shardings.
"""

import os

from tests import flags

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  f'{os.environ.get("XLA_FLAGS", "")} {flags.devices(8)}'
)
# XLA's threads. It takes as many as there are devices, and a device may wait
# in two collectives of a program at once: then another never comes to its own.
os.environ['NPROC'] = '32'

import functools
import gc
import importlib.util
import pathlib
import resource
import sys

import jax
import jaxtyping
import pytest

import tests.typecheck  # noqa: F401, the hook finds it by its name

CHECKED = ('ops', 'nn', 'losses', 'models', 'quantizers')
jaxtyping.install_import_hook(
  [f'vqrae_jax.{name}' for name in CHECKED], 'tests.typecheck.checked'
)

# Tracing makes objects by the million, and by default Python looks for cycles
# among all there are so often that it takes 7 % of the suite's time.
gc.set_threshold(50_000, 20, 100)

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def seeded() -> None:
  """Weights that PyTorch draws do not depend on the tests before."""
  if 'torch' in sys.modules:
    sys.modules['torch'].manual_seed(0)


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """Real images beside the checkout; tests that use them skip without."""
  folder = ROOT.parent / 'shared' / 'data'
  if not folder.is_dir():
    pytest.skip('no images at ../shared/data')
  return folder


@pytest.fixture(scope='session')
def place(tmp_path_factory) -> pathlib.Path:
  """Everything that a command may be pointed at by mistake (`tests/bad.py`)."""
  from tests import bad  # not before the hook is there

  return bad.make(tmp_path_factory.mktemp('a place') / 'wörk')


@pytest.fixture
def answer(place, monkeypatch, capsys):
  """(main, argv) -> its error line (`tests/bad.py`)."""
  from tests import bad

  return functools.partial(bad.answer, place, monkeypatch, capsys)


@pytest.fixture
def programs():
  """() -> names of the programs compiled since, single operations left out."""
  from tests import bad

  heard = set()

  def listen(event, seconds, **said):
    if event == '/jax/core/compile/backend_compile_duration':
      heard.add(said['fun_name'])

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield lambda: heard - bad.SINGLE
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def v5e():
  """Four chips to compile for, which are not there."""
  from jax.experimental import topologies

  if importlib.util.find_spec('libtpu') is None and (
    'TPU_LIBRARY_PATH' not in os.environ
  ):
    pytest.skip('no libtpu')
  return topologies.get_topology_desc('v5e:2x2', 'tpu').devices


@pytest.fixture
def h100():
  """Two GPUs to compile for, which are not there."""
  from vqrae_jax import errors, preflight

  try:
    return preflight.gpus('h100:2')
  except errors.UserError:
    pytest.skip('no JAX for CUDA')


@pytest.fixture(scope='module')
def one_device():
  """Runs of the module are on one device: quicker to compile, and cached."""
  from vqrae_jax import sharding

  make = sharding.make_mesh

  def one(layout='dp', devices=None, tensor=1):
    return make(layout, devices or jax.devices()[:1], tensor)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', one)
    yield


@pytest.fixture(scope='module', autouse=True)
def bounded_memory():
  """Drops compiled programs after a module where a worker holds 7 GiB."""
  yield
  pages = pathlib.Path('/proc/self/statm')
  if pages.exists():
    held = int(pages.read_text().split()[1]) * resource.getpagesize()
    if held > 7 * 2**30:
      jax.clear_caches()


# Files of tests that train, or run a command as a process.
INTEGRATION = {
  'contract', 'train', 'test_bad_inputs', 'test_bad_luck', 'test_commands',
  'test_evaluate', 'test_latent_stats', 'test_launch', 'test_preflight',
  'test_quickstart', 'test_tokenize',
}  # fmt: skip


def pytest_collection_modifyitems(items):
  """Marks tests of runs, and puts them first: no worker should end alone."""
  tests = ROOT / 'tests'
  for item in items:
    place = item.path.relative_to(tests).parts[0].removesuffix('.py')
    if place in INTEGRATION:
      item.add_marker('integration')
  items.sort(
    key=lambda item: (
      item.path.stem not in ('test_resume', 'test_hosts'),
      item.get_closest_marker('integration') is None,
    )
  )
