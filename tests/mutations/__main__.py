"""python -m tests.mutations [-j2] [WORD ...]: is each fault still caught?

Every fault of the table (those whose names hold a WORD) is put into a copy of
the project, and its test alone is run there: it must fail, with pytest's exit
code 1. Without faults the same tests must pass.
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
CACHE = '.jax_cache'  # of compilations; the copies share it


class Result(NamedTuple):
  """Whether a row holds, the last thing that pytest said, and how long."""

  good: bool
  words: str
  seconds: float


def mutated(fault: Fault, root: pathlib.Path = ROOT) -> str:
  """The file's text with the fault in it.

  Raises:
    ValueError: the old text is not there exactly once.
  """
  text = (root / fault.file).read_text()
  if (n := text.count(fault.old)) != 1:
    raise ValueError(f'{fault.name}: {fault.file} has the old text {n} times')
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
    (ROOT / CACHE).mkdir(exist_ok=True)
    (copy / CACHE).symlink_to(ROOT / CACHE)
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
  """Runs the named test on the fault."""
  began = time.monotonic()
  code, output = _pytest(fault, [fault.test])
  seconds = time.monotonic() - began
  if code == 1:
    errors = re.findall(r'^E +(\S.*)', output, re.M)
    return Result(True, errors[0] if errors else '', seconds)
  if code == 0:
    return Result(False, 'NOT CAUGHT', seconds)
  return Result(False, f'pytest ended with {code}:\n{output}', seconds)


def clean(faults: list[Fault]) -> Result:
  """Runs the tests that the faults name on the project as it is."""
  began = time.monotonic()
  code, output = _pytest(None, sorted({f.test for f in faults}))
  return Result(code == 0, output if code else '', time.monotonic() - began)


def main(argv: list[str]) -> int:
  """Prints a row a fault; the number of those that do not hold."""
  parser = argparse.ArgumentParser('python -m tests.mutations')
  parser.add_argument('-j', type=int, default=1, help='processes at once')
  parser.add_argument('words', nargs='*', help='of the names of faults')
  args = parser.parse_args(argv)
  words = args.words or ['']
  faults = [f for f in FAULTS if any(w in f.name for w in words)]
  if not faults:
    parser.error(f'no fault has a name with {" or ".join(words)}')
  with concurrent.futures.ThreadPoolExecutor(args.j) as pool:
    unmutated = pool.submit(clean, faults)
    results = pool.map(caught, faults)
    bad = 0
    for fault, result in zip(faults, results, strict=True):
      bad += not result.good
      said = 'caught' if result.good else 'FAULTY ROW'
      test = fault.test.removeprefix('tests/')
      print(f'{said} {result.seconds:5.1f} s  {fault.name}\n    {test}')
      print(f'    {result.words[:100] if result.good else result.words}')
    result = unmutated.result()
  bad += not result.good
  said = 'pass' if result.good else f'DO NOT PASS\n{result.words}'
  print(f'without faults, {result.seconds:.1f} s: the tests {said}')
  print(f'{len(faults)} faults, {bad} rows that do not hold')
  return int(bad > 0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
