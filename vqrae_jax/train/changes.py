"""What a resumed run's config may not change: the leaves of its state.

A checkpoint names every leaf it holds. Where a config asks for others, the
keys that do so are named, and not the leaves of an optimizer.
"""

from collections.abc import Mapping
from typing import Any

from vqrae_jax.errors import UserError

_TRAINED, _OPTIMIZER = 'tokenizer/params/', 'tokenizer/opt_state/'


def check_same_leaves(
  before: Mapping[str, tuple[int, ...]],
  now: Mapping[str, tuple[int, ...]],
  where: str,
) -> None:
  """A config's state has the leaves that a checkpoint holds.

  Args:
    before: {leaf name: shape} of the checkpoint.
    now: the same of the config.
    where: the run's workdir, for the error.

  Raises:
    UserError: with the keys that made them differ. What no key explains is
      left to `Checkpoints.restore`, which names leaves.
  """
  why = _reasons(before, now)
  if why:
    raise UserError(
      f'the run in {where} cannot go on: {"; ".join(why)}; go back to that, '
      f'or name another --workdir with --config.init_from={where}'
    )


def _reasons(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  was, wants = (_under(_TRAINED, side) for side in (before, now))
  why = []
  for names, verb, other in (
    (sorted(was - wants), 'freeze', 'trained'),
    (sorted(wants - was), 'train', 'kept frozen'),
  ):
    if names:
      more = f' and {len(names) - 1} more' if len(names) > 1 else ''
      why.append(f'schedules {verb} {names[0]}{more}, which it {other}')
  if why:  # the other leaves follow those
    return why
  had, has = (bool(_under('ema/', side)) for side in (before, now))
  if had != has:
    why.append(
      'ema=0, and it kept a moving average'
      if had
      else 'ema is above 0, and it kept no moving average'
    )
  old, new = before.get('usage'), now.get('usage')
  if old and new and old[0] != new[0]:
    why.append(f'log.usage_window={new[0]}, and it had {old[0]}')
  if _under(_OPTIMIZER, before) != _under(_OPTIMIZER, now):
    why.append(
      'optim.clip or optim.weight_decay is on where it was off, or the other '
      'way round'
    )
  return why


def _under(prefix: str, leaves: Mapping[str, Any]) -> set[str]:
  return {n.removeprefix(prefix) for n in leaves if n.startswith(prefix)}
