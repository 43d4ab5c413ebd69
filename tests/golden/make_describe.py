"""Writes describe.json: what each tiny tokenizer says of itself on disk.

    python -m tests.golden.make_describe

Renew it when a spec gains a field, and then think of old tokenizers: a new
default changes every fingerprint, so the format version must rise or the
field must be left out of `describe` at its default.
"""

import json
import pathlib

from tests import tiny
from vqrae_jax.models.tokenizer import build_tokenizer, describe

PATH = pathlib.Path(__file__).with_name('describe.json')


def described() -> dict:
  """{kind: describe(tokenizer)} as JSON gives it back."""
  kinds = [*tiny.QUANTIZERS, 'none']
  found = {k: describe(build_tokenizer(tiny.model(k))) for k in kinds}
  return json.loads(json.dumps(found))


if __name__ == '__main__':
  PATH.write_text(json.dumps(described(), indent=1) + '\n')
