"""How published files name an encoder's leaves: what families share.

A `KeyFormat` is one way of naming, told by a key that only it has, and its table
of rows for a spec. Rows for leaves that a spec lacks want nothing, so a table
names all that its family may have. No file is opened here.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

from vqrae_jax.errors import UserError, choose
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.weights import Rule, Table, ignore

BLOCKS = 'transformer/blocks/'
NORMS = {
  'affine': '',
  'plain': 'the final norm\'s affine: output_norm="plain" has none',
  'none': 'the final norm: output_norm="none" stops before it',
}
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class KeyFormat:
  """One way of naming the leaves of a family.

  Attributes:
    name: of the family, as a reader knows it.
    mark: a regex that is found in a key of such a file, and in no other's.
    table: (spec, {the file's key: shape}) -> its rows.
  """

  name: str
  mark: str
  table: Callable[[EncoderSpec, Shapes], Table]

  def tells(self, shapes: Shapes) -> bool:
    """Whether a file is named so."""
    return any(re.search(self.mark, key) for key in shapes)


def dense(theirs: str, ours: str) -> tuple[Rule, Rule]:
  """A linear layer of PyTorch."""
  row = _row(theirs)
  return (
    Rule(f'{theirs}.weight', f'{ours}/kernel{row}', 'linear'),
    Rule(f'{theirs}.bias', f'{ours}/bias{row}'),
  )


def norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
  """A LayerNorm of PyTorch; of an RMSNorm only the weight is wanted."""
  row = _row(theirs)
  return (
    Rule(f'{theirs}.weight', f'{ours}/scale{row}'),
    Rule(f'{theirs}.bias', f'{ours}/bias{row}'),
  )


def cut(theirs: str, ours: tuple[str, ...]) -> tuple[Rule, Rule]:
  """One linear layer of PyTorch that is several of ours, one upon another."""
  row = _row(theirs)
  kernels = tuple(f'{o}/kernel{row}' for o in ours)
  biases = tuple(f'{o}/bias{row}' for o in ours)
  return (
    Rule(f'{theirs}.weight', kernels, 'linear'),
    Rule(f'{theirs}.bias', biases),
  )


def _row(theirs: str) -> str:
  return '[{i}]' if '{i}' in theirs else ''


def convolution(theirs: str) -> tuple[Rule, Rule]:
  """The convolution that cuts and embeds patches."""
  return (
    Rule(f'{theirs}.weight', 'embed/linear/kernel', 'conv_patch'),
    Rule(f'{theirs}.bias', 'embed/linear/bias'),
  )


def cls_and_positions(cls: str, positions: str) -> tuple[Rule, Rule]:
  """A cls token and one table of positions, its own first."""
  return (
    Rule(cls, 'embed/prefix', 'batched'),
    Rule(
      positions,
      ('embed/prefix_positions', 'embed/positions'),
      ('batched', 'batched grid'),
    ),
  )


def final_norm(spec: EncoderSpec, theirs: str) -> tuple:
  """The final norm, or why it is left out."""
  if not spec.final_norm:
    return ()
  why = NORMS[spec.output_norm]
  return (ignore(rf'{theirs}\..*', why),) if why else norm(theirs, 'norm')


ACTS = {
  'gelu': 'gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_new': 'gelu_tanh',
}


def act(config: Mapping, default: str) -> str:
  """Our word for a config.json's activation."""
  return choose(ACTS, str(config.get('hidden_act', default)), 'hidden_act')


def side(size: object) -> int:
  """The pixels of a square's side, out of a number or a pair.

  Raises:
    UserError: no square.
  """
  sides = {*size} if isinstance(size, list | tuple) else {size}
  if len(sides) != 1 or not all(isinstance(s, int) and s > 0 for s in sides):
    raise UserError(f'a size of {size} in config.json is no square in pixels')
  return sides.pop()


def square(config: Mapping, image: int, patch: int) -> dict:
  """The patch and native grid of a config.json, with its type's defaults."""
  patch = side(config.get('patch_size', patch))
  n = side(config.get('image_size', image)) // patch
  return dict(patch_size=patch, grid=(n, n))
