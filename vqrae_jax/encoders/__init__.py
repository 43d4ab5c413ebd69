"""The encoders that a config may name: specs, no modules, no weights.

A row holds an `EncoderSpec`'s fields under the name it was published by, in
lower case and without its owner; a family is one file. Exact parameter counts
are pinned in `tests/golden/encoder_params.json`.
"""

from vqrae_jax.encoders import dinov2, internvit, mae, siglip, siglip2

ENCODERS = {
  **siglip.ROWS,
  **siglip2.ROWS,
  **dinov2.ROWS,
  **mae.ROWS,
  **internvit.ROWS,
}
