"""Statistics of latents as a run's config names them: `init.latents`.

They go with `model.latents` or not at all, and a run that begins from another
tokenizer (`init_from`) has them from there. What they do is in
`models/latents.py`, how a file of them is read in `models/latent_files.py`.
"""

from vqrae_jax.errors import UserError
from vqrae_jax.models import latent_files, latents
from vqrae_jax.models.tokenizer import Tokenizer
from vqrae_jax.train.config import RunSpec


def check(spec: RunSpec, tokenizer: Tokenizer) -> None:
  """Model, data and `init.latents` agree; opens no file.

  Raises:
    UserError: a norm without statistics, statistics without a norm, or a
      grid of tokens that they are not of.
  """
  given, norm = spec.init.latents, tokenizer.latents_spec
  if norm.norm == 'none':
    if given is not None:
      raise UserError(
        f'init.latents={given} has no place: set model.latents='
        'dict(norm="channel") or "position", or remove it'
      )
    return
  if given is None and spec.init_from is None:
    flag = ' --position' if norm.grid else ''
    raise UserError(
      f'model.latents.norm="{norm.norm}" needs statistics: '
      f'{latent_files.COMMAND} --config=… --data=… --out=stats.npz{flag} '
      'computes them for --config.init.latents=stats.npz; or begin with '
      'init_from'
    )
  latents.check_grid(norm, tokenizer.grid(*spec.data.size), 'data.image_size')
  if spec.eval is not None:
    tile = spec.eval.tile
    latents.check_grid(norm, tokenizer.grid(tile, tile), 'eval.tile')
