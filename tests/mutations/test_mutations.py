"""The table of faults fits the code, and each fault is caught.

Each is applied to a copy of the project, and only its test runs there: pytest
must end with exit code 1, a failed test. It must pass on an unchanged copy.
"""

import ast
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

from tests.mutations.faults import FAULTS, Fault

ROOT = pathlib.Path(__file__).resolve().parents[2]


def mutated(fault: Fault) -> str:
  """The file's text with the fault in it."""
  text = (ROOT / fault.file).read_text()
  assert text.count(fault.old) == 1, fault.name
  return text.replace(fault.old, fault.new)


@pytest.fixture
def project():
  """A copy of the project, removed afterwards."""
  with tempfile.TemporaryDirectory() as folder:
    copy, skip = pathlib.Path(folder), shutil.ignore_patterns('__pycache__')
    for name in ('vqrae_jax', 'configs', 'launch', 'tests', 'docs'):
      shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ('pyproject.toml', 'constraints.txt'):
      shutil.copy(ROOT / name, copy)
    yield copy


def run(project, *tests):
  """pytest's end there."""
  options = '-p', 'no:cacheprovider', f'--basetemp={project}/tmp'
  return subprocess.run(
    [sys.executable, '-m', 'pytest', *options, *tests],
    cwd=project,
    env=os.environ | {'PYTHONPATH': str(project)},
    capture_output=True,
    text=True,
  )


def test_every_row_fits_the_code():
  """The old text occurs once, the new file parses, the test exists."""
  assert len({f.name for f in FAULTS}) == len(FAULTS) >= 25
  for fault in FAULTS:
    assert fault.new != fault.old, fault.name
    changed = mutated(fault)
    if fault.file.endswith('.py'):
      ast.parse(changed)
    path, _, test = fault.test.partition('::')
    name = test.partition('[')[0]
    assert f'\ndef {name}(' in (ROOT / path).read_text(), fault.name


@pytest.mark.slow
def test_the_named_tests_pass_without_faults(project):
  done = run(project, *sorted({fault.test for fault in FAULTS}))
  assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught(fault, project):
  (project / fault.file).write_text(mutated(fault))
  done = run(project, fault.test)
  assert done.returncode == 1, done.stdout
