"""A published encoder as a directory of ours, and what is said of it.

The directory (`encoders/stored.py`) is there whole or not at all, and not
before its proof. Leaves go to the file one at a time, so that memory holds one
of them and its copy in the file's layout; only the parity figure wants a whole
model, in f32. `load_encoder` and `init.encoder` open it (`pretrained.py`).
"""

import json
import pathlib
from typing import Any

from vqrae_jax import export, pretrained, proof
from vqrae_jax.encoders import published, stored
from vqrae_jax.errors import UserError
from vqrae_jax.weights import write_safetensors


def store_encoder(
  word: str,
  out: pathlib.Path,
  row: str | None = None,
  dtype: str = 'float32',
) -> None:
  """Converts an encoder; prints what became of each key, and the parity.

  Args:
    word: the source, as `load_encoder` takes it.
    out: the directory, which is not there yet.
    row: the row of the table that a folder or file is, if it does not say.
    dtype: of the leaves on disk, "float32" or "bfloat16".

  Raises:
    UserError: a source that does not open, or latents that are not the
      reference's; nothing is written.
  """
  from tqdm import tqdm

  found = pretrained.find_encoder(word, row)
  if found.stored:
    raise UserError(f'{word} is converted already; load_encoder opens it')
  spec = pretrained.spec_of(found)
  whole = pretrained.fit_encoder(found, spec)
  fit = pretrained.fit_encoder(found, spec, pretrained.target_of(spec, dtype))
  proof.say(whole.source, {'encoder': whole})
  origin = _origin(found)
  print('\n'.join(f'{key}: {value}' for key, value in origin.items()))
  proof.back_again(fit.backwards())
  proof.parity(found.path, spec, whole)
  with (
    export.written_whole(out) as folder,
    tqdm(total=len(fit.target), unit=' leaves', leave=False) as bar,
  ):

    def read(name: str) -> Any:
      bar.update()
      return fit.read(name)

    write_safetensors(folder / export.WEIGHTS, fit.target, read)
    config = {
      'format_version': stored.FORMAT_VERSION,
      **origin,
      stored.KEY: stored.describe(spec),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + '\n'
    (folder / export.CONFIG).write_text(text, encoding='utf8')
  print(f'wrote {out}: {len(fit.target)} leaves, {dtype}')


def _origin(found: pretrained.Found) -> dict[str, str]:
  """Where it came from, as far as that is known."""
  known = {'source': found.word, 'revision': found.revision, 'row': found.row}
  if found.row in published.PUBLISHED:
    known['licence'] = published.PUBLISHED[found.row].licence
  return {key: value for key, value in known.items() if value is not None}
