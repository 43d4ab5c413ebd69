"""Where the encoders of the table were published, and under what licence.

One row for each of `ENCODERS`. No revision is pinned: a repository's files
are taken as the hub has them, or as "@REV" says, and the commit that was
found is recorded. Licences are those that the repositories state; read them
there before relying on them.
"""

import dataclasses

from vqrae_jax.encoders import ENCODERS

_MAE = "see the hub's page; the authors' repository is CC BY-NC 4.0"

# Start of a row's name: (owner on the hub, licence).
_OWNERS = {
  'siglip2-': ('google', 'Apache-2.0'),
  'siglip-': ('google', 'Apache-2.0'),
  'dinov2-': ('facebook', 'Apache-2.0'),
  'vit-mae-': ('facebook', _MAE),
  'internvit-': ('OpenGVLab', 'MIT'),
}


@dataclasses.dataclass(frozen=True)
class Published:
  """A repository of the Hugging Face hub.

  Attributes:
    hub: ORG/NAME.
    licence: of the weights.
  """

  hub: str
  licence: str

  @property
  def url(self) -> str:
    return f'https://huggingface.co/{self.hub}'


def _spelled(name: str) -> str:
  """A row's name as its repository spells it."""
  if not name.startswith('internvit-'):
    return name
  name = name.replace('internvit-', 'InternViT-')
  for low in ('300m', '6b', '-v'):
    name = name.replace(low, low.upper())
  return name


def _published(name: str) -> Published:
  start = next(s for s in _OWNERS if name.startswith(s))
  owner, licence = _OWNERS[start]
  return Published(f'{owner}/{_spelled(name)}', licence)


PUBLISHED = {name: _published(name) for name in ENCODERS}

_BY_HUB = {p.hub.lower(): name for name, p in PUBLISHED.items()}


def row_of(hub: str) -> str | None:
  """The row that a hub id is, if any."""
  return _BY_HUB.get(hub.lower())
