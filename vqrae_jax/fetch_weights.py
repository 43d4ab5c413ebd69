"""python -m vqrae_jax.fetch_weights --config=configs/simvq_siglip_l.py

Downloads the published weights that a recipe needs, ahead of a run without a
network: encoders into the hub's cache (HF_HOME), single files into
~/.cache/vqrae_jax/weights (VQRAE_JAX_CACHE). Hashes are verified, and files
that are already there are not downloaded again. --list prints the table.
"""

from collections.abc import Iterable
from typing import Any

from absl import flags

from vqrae_jax import cli
from vqrae_jax.encoders import ENCODERS, PUBLISHED
from vqrae_jax.errors import UserError, did_you_mean
from vqrae_jax.weights import hub

MODULE = 'vqrae_jax.fetch_weights'
EXAMPLE = f'python -m {MODULE} --config=configs/simvq_siglip_l.py'
ABOUT = 'the recipe whose weights are wanted, as for training'


def main(argv: list[str]) -> None:
  """Parses flags; prints the table, or a line for each download."""
  values = cli.parse_config_flag(argv, MODULE, EXAMPLE, ABOUT, define)
  if values.list:
    print(table())
    return
  if values.config is None and not values.names:
    raise UserError('give --config, --names or --list')
  names = list(values.names)
  if values.config is not None:
    names += needed(values.config)
    if not names:
      print('this recipe needs no published weights')
  fetch(dict.fromkeys(names))


def define(values: flags.FlagValues) -> None:
  """The command's flags but --config."""
  flags.DEFINE_list(
    'names', [], 'rows of the table to download', flag_values=values
  )
  flags.DEFINE_bool(
    'list', False, 'print the table and download nothing', flag_values=values
  )


def table() -> str:
  """What `--list` prints: a line for each row that can be downloaded."""
  rows = [('name', 'where', 'SHA-256', 'licence', 'used by')]
  for name, row in PUBLISHED.items():
    rows.append((name, f'hf:{row.hub}', "hub's", row.licence, 'model.encoder'))
  for name, row in hub.FILES.items():
    known = (row.sha256 or 'not published')[:16]
    rows.append((name, row.url, known, row.licence, row.used_by))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  widths[1] = min(widths[1], 48)
  return '\n'.join(
    '  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
    for row in rows
  )


def needed(config: Any) -> list[str]:
  """What a config needs: rows of the table, and hub ids.

  The encoder it names, or the one it starts from (`init.encoder`), a teacher
  of its own, and the networks inside its losses, discriminator and figures,
  unless `init.networks` is "random". Each once, encoders first.
  """
  from vqrae_jax.pretrained.networks import NEEDS

  def section(*keys: str) -> Any:
    node = config
    for key in keys:
      node = node.get(key) if hasattr(node, 'get') else None
    return node

  given = section('init', 'encoder')
  if given is None:
    given = section('model', 'encoder', 'name')
  names = [
    name
    for name in (given, section('teacher'))
    if name in ENCODERS or str(name).startswith('hf:')
  ]
  wanted = []
  if section('init', 'networks') != 'random':
    wanted += [k for k, v in (section('losses') or {}).items() if v]
    wanted.append(section('discriminator', 'name'))
    wanted += section('eval', 'metrics') or ()
  for name in wanted:
    names += NEEDS.get(name, ())
  return list(dict.fromkeys(names))


def fetch(names: Iterable[str]) -> None:
  """Downloads each row or "hf:ORG/NAME[@REV]"; prints a line for each.

  Raises:
    UserError: an unknown name, before anything is downloaded; or no way to
      one.
  """
  names = list(names)
  every = [*PUBLISHED, *hub.FILES]
  for name in names:
    if name not in every and not name.startswith('hf:'):
      raise UserError(
        f'--names: unknown weights "{name}"{did_you_mean(name, every)}'
      )
  for name in names:
    (_file if name in hub.FILES else _repository)(name)


def _file(name: str) -> None:
  row = hub.FILES[name]
  new = hub.download(row.url, row.path, row.sha256, progress=True)
  state = 'downloaded' if new else 'there already'
  check = 'as published' if row.sha256 else 'recorded, none is published'
  sha256 = hub.known_hash(row.path, None)
  print(f'{name}: {state}, {row.path}, SHA-256 {sha256} ({check})')


def _repository(name: str) -> None:
  source = hub.parse_source(name, PUBLISHED)
  row = PUBLISHED[name].hub if source.kind == 'row' else source.value
  folder, commit = hub.snapshot(row, source.revision)
  size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
  print(f'{name}: {folder}, commit {commit}, {size / 2**20:.0f} MiB')


if __name__ == '__main__':
  cli.run(main)
