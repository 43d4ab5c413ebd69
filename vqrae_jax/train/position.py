"""Where a run is in its data, and what it met on the way there."""

import dataclasses
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

from vqrae_jax.errors import UserError


@dataclasses.dataclass
class Position:
  """All that a checkpoint needs beside arrays.

  Attributes:
    step: completed steps; the next sample is step x batch_size.
    samples: a running CRC of which photograph each sample was.
    skipped: unreadable photographs met so far, over all hosts.
    nonfinite: steps left out so far (`finite.py`).
    nonfinite_in_a_row: those of them since the last that counted.
  """

  step: int = 0
  samples: int = 0
  skipped: int = 0
  nonfinite: int = 0
  nonfinite_in_a_row: int = 0

  @classmethod
  def of(cls, manifest: Mapping[str, Any]) -> 'Position':
    """The position that a checkpoint's manifest tells.

    Raises:
      UserError: it tells none, or one of another version of this package.
    """
    try:
      return cls(**manifest['position'])
    except (KeyError, TypeError) as e:
      raise UserError(
        f'checkpoint {manifest["step"]}: its manifest tells no position '
        f'({e}); go on with the version of vqrae_jax that wrote it'
      ) from None

  def after(self, step: int, metrics: Mapping[str, float]) -> 'Position':
    """The position after a step, by what the step read and said."""
    mark = int(metrics['samples']).to_bytes(4, 'little')
    spoilt = int(metrics['nonfinite'])
    return Position(
      step=step,
      samples=zlib.crc32(mark, self.samples),
      skipped=self.skipped + int(metrics['skipped']),
      nonfinite=self.nonfinite + spoilt,
      nonfinite_in_a_row=spoilt and self.nonfinite_in_a_row + 1,
    )


def check_skipped(run: Any, position: Position, workdir: pathlib.Path) -> None:
  """Stops a run whose photographs are unreadable more often than allowed.

  Raises:
    UserError: with the last name met on this host.
  """
  samples = position.step * run.spec.batch_size
  share = run.spec.data.max_skipped
  if position.skipped <= share * max(samples, len(run.source)):
    return
  name, reason = next(
    reversed(run.batches.unreadable.items()), ('another host', 'see its log')
  )
  raise UserError(
    f'{position.skipped} photographs of {samples} samples could not be read, '
    f'more than data.max_skipped={share} allows; the last was {name}: '
    f'{reason}; {workdir}/unreadable.jsonl names them: mend or remove them, '
    'or raise data.max_skipped'
  )
