"""A repository of the Hugging Face hub as a folder, fetched or cached.

Only what an encoder needs is asked for: the configs and one set of weights,
safetensors if there are any. What the cache holds is used when the hub cannot
be reached or `HF_HUB_OFFLINE=1` forbids it. Nothing in a repository is run.
"""

import pathlib

from vqrae_jax.errors import UserError

CONFIGS = ('config.json', 'preprocessor_config.json')
_SAFE = (
  'model.safetensors',
  'model.safetensors.index.json',
  'model-*-of-*.safetensors',
)
_TORCH = ('pytorch_model.bin', 'pytorch_model.bin.index.json')
_TORCH_SHARDS = ('pytorch_model-*-of-*.bin',)


def fetch_command(hub: str, revision: str | None) -> str:
  """The shell line that brings what is needed into the cache."""
  at = f' --revision {revision}' if revision else ''
  return (
    f"hf download {hub}{at} --include '*config.json' --include "
    "'model*.safetensors*'"
  )


def snapshot(hub: str, revision: str | None) -> tuple[pathlib.Path, str]:
  """(the folder, the commit that it holds) of ORG/NAME at a revision.

  Args:
    hub: ORG/NAME.
    revision: a branch, tag or commit; None for the default branch.

  Raises:
    UserError: no such repository or revision, or no way to it; with the
      command that brings it.
  """
  folder = _download(hub, revision, (*CONFIGS, *_SAFE))
  if not any((folder / name).exists() for name in _SAFE[:2]):
    folder = _download(hub, folder.name, (*CONFIGS, *_TORCH, *_TORCH_SHARDS))
    if not any((folder / name).exists() for name in _TORCH):
      raise UserError(
        f'hf:{hub}: its folder {folder} holds no {_SAFE[0]}; bring it with: '
        f'{fetch_command(hub, revision)}'
      )
  return folder, folder.name


def _download(
  hub: str, revision: str | None, files: tuple[str, ...]
) -> pathlib.Path:
  import huggingface_hub  # heavy, and only here

  try:
    folder = huggingface_hub.snapshot_download(
      hub, revision=revision, allow_patterns=list(files)
    )
  # The client raises a dozen kinds of three libraries; none is our fault.
  except Exception as e:
    words = ' '.join(str(e).split())[:140] or type(e).__name__
    at = f'@{revision}' if revision else ''
    raise UserError(
      f'hf:{hub}{at} cannot be had ({type(e).__name__}: {words}); where there '
      f'is a network: {fetch_command(hub, revision)}, or name a folder that '
      'has its files'
    ) from None
  return pathlib.Path(folder)
