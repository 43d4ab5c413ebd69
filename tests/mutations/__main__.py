"""python -m tests.mutations [-j2] [NAME ...]: is each fault still caught?

Runs the tests of `test_mutations.py`: all, or those of the faults whose names
contain NAME.
"""

import argparse
import pathlib
import sys

import pytest

from tests.mutations.faults import FAULTS


def main(argv: list[str]) -> int:
  """pytest's exit code: 0 if each fault is caught."""
  parser = argparse.ArgumentParser('python -m tests.mutations')
  parser.add_argument('-j', type=int, default=1, help='processes at once')
  parser.add_argument('names', nargs='*', help='parts of names of faults')
  args = parser.parse_args(argv)
  path = str(pathlib.Path(__file__).with_name('test_mutations.py'))
  chosen = [
    f'{path}::test_a_fault_is_caught[{fault.name}]'
    for fault in FAULTS
    if any(name in fault.name for name in args.names)
  ]
  if args.names and not chosen:
    parser.error(f'no name of a fault contains {" or ".join(args.names)}')
  return pytest.main([f'-n{args.j}', '-vv', *(chosen or [path])])


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
