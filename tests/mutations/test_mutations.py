"""The table of faults fits the code, and each fault is caught."""

import ast

import pytest

from tests.mutations.__main__ import ROOT, caught, clean, mutated
from tests.mutations.faults import FAULTS


def test_every_row_fits_the_code():
  """The old text occurs once, the new file parses, the test exists."""
  assert len({f.name for f in FAULTS}) == len(FAULTS) >= 25
  functions = {}
  for fault in FAULTS:
    assert fault.new != fault.old, fault.name
    ast.parse(mutated(fault))
    path, _, test = fault.test.partition('::')
    if path not in functions:
      tree = ast.parse((ROOT / path).read_text())
      defined = (n for n in tree.body if isinstance(n, ast.FunctionDef))
      functions[path] = {n.name for n in defined}
    assert test.partition('[')[0] in functions[path], fault.name


@pytest.mark.slow
def test_the_named_tests_pass_without_faults():
  result = clean(list(FAULTS))
  assert result.good, result.message


@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS, ids=lambda f: f.name)
def test_every_fault_is_caught(fault):
  result = caught(fault)
  assert result.good, result.message
