"""Code of other packages that a config names: "package.module:Class".

An encoder, a quantizer or a loss. The name says where the code is; there is no
registry. Importing runs code: a config of one's own is trusted, while what
comes with a tokenizer of somebody else is imported only from packages that the
caller lists.
"""

import importlib
import re
from collections.abc import Collection
from typing import Any

from vqrae_jax.errors import UserError, did_you_mean

_NAME = re.compile(r'([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)')


def is_name(word: Any) -> bool:
  """Whether it names code of another package; those of tables have no colon."""
  return isinstance(word, str) and ':' in word


def name_of(cls: type) -> str:
  """The name of a class, by where it is defined."""
  return f'{cls.__module__}:{cls.__qualname__}'


def package_of(name: str) -> str:
  """The package at the top of a name, that which `trusted` lists."""
  return name.partition(':')[0].partition('.')[0]


def load(name: str, key: str, trusted: Collection[str] | None = None) -> Any:
  """What `name` names.

  Args:
    name: "package.module:Class".
    key: of the config, for the errors.
    trusted: packages (or modules) that may be imported; None: all.

  Raises:
    UserError: no such form, not trusted, an import that fails, or no such name
      in the module.
  """
  match = _NAME.fullmatch(name) if isinstance(name, str) else None
  if match is None:
    raise UserError(f'{key}={name!r} must be "package.module:Class"')
  module, attribute = match.groups()
  if isinstance(trusted, str):
    raise UserError(f'trusted={trusted!r} must be a tuple: ({trusted!r},)')
  if trusted is not None and not any(
    f'{module}.'.startswith(f'{package}.') for package in trusted
  ):
    package = package_of(name)
    raise UserError(
      f'{key}="{name}" is code of the package "{package}", and importing it '
      f'runs it: if you trust it, pass trusted=("{package}",) to '
      f'load_tokenizer or --trusted={package} to a command'
    )
  try:
    found = importlib.import_module(module)
  except Exception as e:  # a module's own code may raise anything
    reason = ' '.join(f'{type(e).__name__}: {e}'.split())
    raise UserError(
      f'{key}="{name}": "{module}" cannot be imported ({reason}); install its '
      'package, or put the folder that holds it on PYTHONPATH'
    ) from e
  if attribute not in vars(found):
    raise UserError(
      f'{key}="{name}": there is no "{attribute}" in {module}'
      f'{did_you_mean(attribute, [n for n in vars(found) if n[0] != "_"])}'
    )
  return vars(found)[attribute]


def load_class(
  name: str, base: type, key: str, trusted: Collection[str] | None = None
) -> type:
  """The class that `name` names; the arguments are those of `load`.

  Raises:
    UserError: as `load`; no subclass of `base`; or one that is defined
      elsewhere: a class has one name, which files record.
  """
  found = load(name, key, trusted)
  if not (isinstance(found, type) and issubclass(found, base)):
    raise UserError(
      f'{key}="{name}" must be a subclass of {base.__module__}.{base.__name__}'
    )
  if name_of(found) != name:
    raise UserError(
      f'{key}="{name}" is defined elsewhere: name it "{name_of(found)}"'
    )
  return found
