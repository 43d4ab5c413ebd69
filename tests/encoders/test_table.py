"""The table of encoders: exact sizes, and its page in docs/."""

import json

from tests.golden import make_encoder_params as golden
from tests.golden import make_encoders_doc


def test_counts_are_the_golden_ones():
  """A row without a count fails too."""
  assert golden.counts() == json.loads(golden.PATH.read_text())


def test_docs_encoders_md_agrees_with_the_tables():
  renew = 'renew it: python -m tests.golden.make_encoders_doc'
  path = make_encoders_doc.PATH
  assert path.read_text(encoding='utf8') == make_encoders_doc.page(), renew
