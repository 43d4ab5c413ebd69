"""python -m vqrae_jax.push --tokenizer=DIR --repo=ORG/NAME [--run=DIR]

Uploads a tokenizer to the Hugging Face hub in one commit: config.json,
model.safetensors and a model card, README.md, which each push replaces (the old
one stays in the repository's history).
`load_tokenizer("hf:ORG/NAME")` and every --tokenizer open it.

With --run, the workdir that the tokenizer came from, the card has the run's
data, recipe, figures, and where the encoder and its licence come from. The hub
controls who may write: log in with `hf auth login`, or set HF_TOKEN.
"""

import json
import os
import pathlib
import re
from typing import Any

import jax
from absl import flags

from vqrae_jax import __version__, cli, export
from vqrae_jax.encoders import PUBLISHED, row_of
from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import metrics
from vqrae_jax.models.tokenizer import Tokenizer, describe, packages_of
from vqrae_jax.train import config as config_lib
from vqrae_jax.train import reporting
from vqrae_jax.weights.files import printable

MODULE = 'vqrae_jax.push'
EXAMPLE = (
  f'python -m {MODULE} --tokenizer=runs/quickstart/tokenizer '
  '--run=runs/quickstart --repo=ORG/NAME'
)


def define(values: flags.FlagValues) -> None:
  """The command's flags."""
  keys = dict(flag_values=values)
  cli.define_tokenizer(values, 'the folder of a tokenizer')
  flags.DEFINE_string('repo', None, 'ORG/NAME on the hub, made if new', **keys)
  text = "the run's workdir, whose data, recipe and figures the card gets"
  flags.DEFINE_string('run', None, text, **keys)
  text = 'whether a new repository is private'
  flags.DEFINE_bool('private', False, text, **keys)


def main(argv: list[str]) -> None:
  """Parses flags, writes the card, pushes."""
  values = flags.FlagValues()
  define(values)
  cli.parse(values, argv, MODULE, EXAMPLE)
  cli.required(values, 'tokenizer', 'repo')
  if not re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', values.repo):
    raise UserError(f'--repo={values.repo} must be ORG/NAME')
  if '://' in values.tokenizer or values.tokenizer.startswith('hf:'):
    raise UserError(f'--tokenizer={values.tokenizer} must be a local folder')
  # Opened, it is known to be intact.
  tokenizer, variables = export.load_tokenizer(
    values.tokenizer, trusted=values.trusted
  )
  folder = pathlib.Path(os.path.expanduser(values.tokenizer))
  fingerprint = json.loads((folder / export.CONFIG).read_text())['fingerprint']
  run = None
  if values.run:
    run = read_run(pathlib.Path(os.path.expanduser(values.run)), fingerprint)
  parameters = sum(x.size for x in jax.tree.leaves(variables['params']))
  text = card(values.repo, tokenizer, parameters, fingerprint, run)
  print(f'{upload(folder, text, values.repo, values.private)}')


def read_run(
  workdir: pathlib.Path, fingerprint: str
) -> tuple[config_lib.RunConfig, dict[str, Any]]:
  """(the config, what summary.json holds) of the run that made a tokenizer.

  Raises:
    UserError: no finished run, or one that made another tokenizer.
  """
  figures = reporting.read_summary(workdir)
  if figures.get('fingerprint') != fingerprint:
    what = 'is of another tokenizer' if figures else 'is missing or damaged'
    raise UserError(
      f'--run={workdir}: its summary.json {what}; name the finished run that '
      'this tokenizer came from, or leave --run out'
    )
  try:
    config = json.loads((workdir / 'config.json').read_bytes())
    return config_lib.read_config(config), figures
  except (OSError, ValueError) as e:
    raise UserError(f'--run={workdir}: config.json: {e}') from None


def upload(folder: pathlib.Path, text: str, repo: str, private: bool) -> str:
  """Makes the repository if it is new, and one commit; its URL.

  Raises:
    UserError: no way to the hub, no right to write there, or a card that the
      hub refuses.
  """
  import huggingface_hub  # slow to import

  files = {
    'README.md': text.encode(),
    export.CONFIG: folder / export.CONFIG,
    export.WEIGHTS: folder / export.WEIGHTS,
  }
  api = huggingface_hub.HfApi(library_name='vqrae_jax')
  try:
    api.create_repo(repo, private=private, exist_ok=True)
    done = api.create_commit(
      repo,
      [huggingface_hub.CommitOperationAdd(n, f) for n, f in files.items()],
      commit_message='A tokenizer of vqrae_jax',
    )
  # The client raises a dozen kinds of three libraries; none is our fault.
  except Exception as e:
    cure = 'is there a network, and a hub at HF_ENDPOINT?'
    if getattr(e, 'response', None) is not None:
      cure = 'log in with "hf auth login" or HF_TOKEN, with write access'
    raise UserError(
      f'Could not push to hf:{repo} ({type(e).__name__}: {printable(e, 160)}); '
      f'{cure}'
    ) from None
  return done.commit_url


# ----------------------------------------------------------------------------
# The card.


def card(
  repo: str,
  tokenizer: Tokenizer,
  parameters: int,
  fingerprint: str,
  run: tuple[config_lib.RunConfig, dict[str, Any]] | None = None,
) -> str:
  """The model card as Markdown, metadata first.

  Args:
    repo: ORG/NAME.
    tokenizer: what is pushed.
    parameters: how many it has.
    fingerprint: its fingerprint.
    run: from `read_run`, or None.
  """
  from huggingface_hub import ModelCardData

  quantizer = describe(tokenizer)['quantizer']
  tags = ['image-tokenizer', 'jax', 'vqrae_jax', quantizer['name']]
  data = ModelCardData(library_name='vqrae_jax', tags=tags)
  h, w = tokenizer.native_size
  trusted = packages_of(tokenizer)
  extra = f', trusted={trusted}' if trusted else ''
  what = {
    'native size': f'{h}x{w} px',
    'tokens of such an image': list(tokenizer.index_shape(h, w)),
    'codes (K)': tokenizer.codebook_size or 'none: latents are continuous',
    'pixels per token, per side': tokenizer.patch_size,
    'latent channels': tokenizer.latent_dim,
    'quantizer': f'`{json.dumps(quantizer)}`',
    'parameters': f'{parameters:,}',
    'fingerprint': f'`{fingerprint}`',
    'written by': f'vqrae_jax {__version__}',
  }
  use = f"""```python
import vqrae_jax

tokenizer, variables = vqrae_jax.load_tokenizer('hf:{repo}'{extra})
indices = vqrae_jax.encode_to_indices(tokenizer, variables, images)
recon = vqrae_jax.decode_from_indices(tokenizer, variables, indices)
```

`images` are uint8[b h w 3], or floats in [0, 1]; h and w are multiples of \
{tokenizer.patch_size}."""
  sections = {
    'Use': use,
    'What it is': '\n'.join(
      ['| | |', '|---|---|', *(f'| {k} | {v} |' for k, v in what.items())]
    ),
  }
  if run is None:
    sections['Training'] = 'Not recorded: it was pushed without --run.'
    sections['Licence'] = (
      'The source of the encoder is not recorded. If it was initialized from '
      'published weights, their licence applies.'
    )
  else:
    config, figures = run
    sections['Training'] = _training(config, figures)
    sections['Figures'] = _figures(config, figures)
    sections['Licence'] = _licence(config)
  body = '\n\n'.join(f'## {name}\n\n{text}' for name, text in sections.items())
  name = repo.partition('/')[2]
  return f'---\n{data.to_yaml()}\n---\n\n# {name}\n\n{body}\n'


def _name(source: str | None) -> str:
  """Of data: folders of this machine are nobody's business."""
  if source and source.startswith(('/', '~')):
    return pathlib.PurePath(source).name
  return str(source)


def _training(config: config_lib.RunConfig, figures: dict[str, Any]) -> str:
  data, model = config.data, dict(config.model)
  sizes = ' or '.join(f'{h}x{w}' for h, w in data.sizes)
  lines = [
    f'- data: {_name(data.source)}, {sizes} px, crop={data.crop}, '
    f'flip={data.flip}',
    f'- {figures.get("steps")} steps of {config.batch_size} images '
    f'(duration={config.duration}, seed={config.seed}, '
    f'{model.get("dtype", "float32")})',
    f'- losses: {", ".join(config.losses)}',
    f'- EMA {config.ema}, AdamW b1={config.optim.b1} b2={config.optim.b2}',
  ]
  if config.init_from:
    lines.append(f'- started from {_name(config.init_from)}')
  if config.discriminator:
    lines.append(f'- discriminator: {config.discriminator.name}')
  return '\n'.join(lines)


def _figures(config: config_lib.RunConfig, figures: dict[str, Any]) -> str:
  names = figures.get('eval_images')
  if not names:
    protocol = 'No images were held out to evaluate it on.'
  else:
    some = ', '.join(names[:4]) + (', …' if len(names) > 4 else '')
    tile = config.eval.tile or config.data.image_size
    protocol = (
      f'On {len(names)} images of {_name(config.eval.source)} ({some}), in '
      f'tiles of {tile} px, encoded to indices and decoded; PSNR and SSIM of '
      'values in [0, 1].'
    )
  return f'{protocol}\n\n```\n{metrics.table(figures)}\n```'


def _licence(config: config_lib.RunConfig) -> str:
  """Of the weights that the run started with, as their repository states it."""
  if config.init_from:
    return (
      f'It was started from {_name(config.init_from)}, whose licence applies.'
    )
  found = []
  if source := config.init.encoder:
    hub = source.removeprefix('hf:').partition('@')[0]
    if row := PUBLISHED.get(source) or PUBLISHED.get(row_of(hub) or ''):
      found.append(f'The encoder comes from {row.hub}; licence: {row.licence}.')
    else:
      found.append(
        f'The encoder comes from {_name(source)}, whose licence applies.'
      )
  if source := config.init.decoder:
    name = _name(source.removeprefix('rae:'))
    found.append(f'The decoder was started from {name}, whose licence applies.')
  return ' '.join(found) or 'All of it was trained from random weights.'


if __name__ == '__main__':
  cli.run(main)
