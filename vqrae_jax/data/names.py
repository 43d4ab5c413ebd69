"""Many short strings in two arrays: a million names in tens of megabytes."""

from collections.abc import Iterable, Iterator

import numpy as np


class Names:
  """An immutable list of names, kept as one blob of bytes.

  Bytes that are no UTF-8 come back as the surrogates that `os` uses for them,
  so that a name read from a folder opens the file it came from.
  """

  def __init__(self, blob: np.ndarray, ends: np.ndarray):
    """uint8 [bytes] all names, one after another; int64 [n] where each ends."""
    self.blob, self.ends = blob, ends

  @classmethod
  def of(cls, names: Iterable[bytes]) -> 'Names':
    """Names from their bytes."""
    names = list(names)
    blob = np.frombuffer(b''.join(names), np.uint8)
    lengths = np.fromiter((len(n) for n in names), np.int64, len(names))
    return cls(blob, np.cumsum(lengths))

  @classmethod
  def joined(cls, parts: 'Iterable[Names]') -> 'Names':
    """One list after another."""
    parts = list(parts)
    starts = np.cumsum([0, *(len(p.blob) for p in parts)])
    ends = [p.ends + s for p, s in zip(parts, starts[:-1], strict=True)]
    return cls(
      np.concatenate([np.zeros(0, np.uint8), *(p.blob for p in parts)]),
      np.concatenate([np.zeros(0, np.int64), *ends]),
    )

  def __len__(self) -> int:
    return len(self.ends)

  def __getitem__(self, index: int) -> str:
    start = self.ends[index - 1] if index else 0
    return (
      self.blob[start : self.ends[index]]
      .tobytes()
      .decode('utf8', 'surrogateescape')
    )

  def __iter__(self) -> Iterator[str]:
    return (self[i] for i in range(len(self)))
