"""Values that are usual, so that an unusual one is noticed once, not refused.

The ranges are those that the tokenizers' own documentation gives (decay,
commitment) or that papers tried (codes, up to 65,536); around an epsilon two
powers of ten, and below commitment's .1 two for SimVQ, which may want it while
the encoder is frozen (`docs/results.md`). `docs/from_pytorch.md` shows the same
table, and a test holds the two equal. What cannot work at all is an error where
it is built.
"""

import math

from vqrae_jax import quantizers
from vqrae_jax.models.tokenizer import Tokenizer
from vqrae_jax.train.config import RunSpec

RANGES: dict[str, dict[str, tuple[float, float]]] = {
  'vq': {
    'num_codes': (512, 65536),
    'decay': (0.95, 0.999),
    'epsilon': (1e-7, 1e-3),
  },
  'simvq': {'num_codes': (512, 65536)},
  'fsq': {'epsilon': (1e-5, 1e-1)},
  'losses': {'commit': (0.1, 0.5)},
}
LOWER = {'simvq': {'commit': 0.001}}


def unusual(spec: RunSpec, tokenizer: Tokenizer) -> str | None:
  """One line that names every value outside its usual range, or None."""
  name = quantizers.name_of(tokenizer.quantizer)
  found = [
    (f'model.quantizer.{field}', getattr(tokenizer.quantizer, field), usual)
    for field, usual in RANGES.get(name, {}).items()
  ]
  found += [
    (f'losses.{term}', value.weight, (LOWER.get(name, {}).get(term, low), high))
    for term, value in spec.terms().items()
    for low, high in [RANGES['losses'].get(term, (0, math.inf))]
  ]
  if tokenizer.codebook_size:  # noise teaches continuous decoders to forgive
    found.append(('noise_tau', spec.noise_tau, (0, 0)))
  odd = [
    f'{key}={value:g} (usually {low:g}{f" to {high:g}" if high > low else ""})'
    for key, value, (low, high) in found
    if not low <= value <= high
  ]
  return f'unusual: {", ".join(odd)}' if odd else None
