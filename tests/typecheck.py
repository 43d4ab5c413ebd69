"""What the import hook checks with: an int is a float, as PEP 484 has it, and a
symbol of `jax.export` is an int, as shapes have it."""

import jax.export
from beartype import BeartypeConf, BeartypeHintOverrides, beartype

Symbol = type(jax.export.symbolic_shape('b')[0])
checked = beartype(
  conf=BeartypeConf(
    is_pep484_tower=True,
    hint_overrides=BeartypeHintOverrides({int: int | Symbol}),
  )
)
