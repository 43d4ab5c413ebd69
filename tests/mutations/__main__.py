"""python -m tests.mutations [-j2] [NAME ...]: is each fault still caught?

The runner applies each fault (those whose names contain NAME) to a copy of the
project and runs only its test there: pytest must end with exit code 1, a failed
test. The same tests must pass on an unchanged copy.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from tests.mutations.faults import FAULTS, Fault

ROOT = pathlib.Path(__file__).resolve().parents[2]
COPIED = ('vqrae_jax', 'configs', 'tests', 'docs', 'pyproject.toml')


class Result(NamedTuple):
  """Whether a row holds, the first error or what is wrong, and the time."""

  good: bool
  message: str
  seconds: float


def mutated(fault: Fault, root: pathlib.Path = ROOT) -> str:
  """The file's text with the fault in it.

  Raises:
    ValueError: the old text does not occur exactly once.
  """
  text = (root / fault.file).read_text()
  if (n := text.count(fault.old)) != 1:
    raise ValueError(
      f'{fault.name}: {fault.file} contains the old text {n} times'
    )
  return text.replace(fault.old, fault.new)


def _pytest(fault: Fault | None, tests: list[str]) -> tuple[int, str]:
  """pytest's exit code and output on a copy of the project."""
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / 'project'
    copy.mkdir()
    for name in COPIED:
      source = ROOT / name
      if source.is_dir():
        skip = shutil.ignore_patterns('__pycache__')
        shutil.copytree(source, copy / name, ignore=skip)
      else:
        shutil.copy(source, copy)
    if fault is not None:
      (copy / fault.file).write_text(mutated(fault))
    done = subprocess.run(
      [
        sys.executable, '-m', 'pytest', '-rfE', '--tb=short', '--no-header',
        '-p', 'no:cacheprovider', f'--basetemp={folder}/tmp', *tests,
      ],
      cwd=copy,
      env=os.environ | {'PYTHONPATH': str(copy)},
      capture_output=True,
      text=True,
    )  # fmt: skip
  return done.returncode, done.stdout + done.stderr


def caught(fault: Fault) -> Result:
  """Runs the test of a fault on a copy that has it."""
  began = time.monotonic()
  code, output = _pytest(fault, [fault.test])
  seconds = time.monotonic() - began
  if code == 1:
    errors = re.findall(r'^E +(?!AssertionError: *$)(\S.*)', output, re.M)
    return Result(True, errors[0] if errors else '', seconds)
  if code == 0:
    return Result(False, 'NOT CAUGHT', seconds)
  return Result(False, f'pytest ended with {code}:\n{output}', seconds)


def clean(faults: list[Fault]) -> Result:
  """Runs the tests of the faults on an unchanged copy."""
  began = time.monotonic()
  code, output = _pytest(None, sorted({f.test for f in faults}))
  return Result(code == 0, output if code else '', time.monotonic() - began)


def main(argv: list[str]) -> int:
  """Prints the results; 1 if a row does not hold, else 0."""
  parser = argparse.ArgumentParser('python -m tests.mutations')
  parser.add_argument('-j', type=int, default=1, help='processes at once')
  parser.add_argument('names', nargs='*', help='parts of names of faults')
  args = parser.parse_args(argv)
  names = args.names or ['']
  faults = [f for f in FAULTS if any(n in f.name for n in names)]
  if not faults:
    parser.error(f'no name of a fault contains {" or ".join(names)}')
  with concurrent.futures.ThreadPoolExecutor(args.j) as pool:
    unmutated = pool.submit(clean, faults)
    results = pool.map(caught, faults)
    bad = 0
    for fault, result in zip(faults, results, strict=True):
      bad += not result.good
      state = 'caught' if result.good else 'FAULTY ROW'
      test = fault.test.removeprefix('tests/')
      print(f'{state} {result.seconds:5.1f} s  {fault.name}\n    {test}')
      print(f'    {result.message[:100] if result.good else result.message}')
    result = unmutated.result()
  bad += not result.good
  state = 'pass' if result.good else f'DO NOT PASS\n{result.message}'
  print(f'without faults, {result.seconds:.1f} s: the tests {state}')
  print(f'{len(faults)} faults, {bad} rows that do not hold')
  return int(bad > 0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
