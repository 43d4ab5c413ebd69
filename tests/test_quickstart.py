"""The quick-start's figures: minutes, so `make test-slow` only."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_commands import ROOT


@pytest.mark.slow
def test_quickstart_reaches_its_figures(tmp_path):
  """PSNR at least 23.5 dB and 2 dB above block means, SSIM .58, 2,500 codes,
  shuffled codes 10 dB worse, on images kept out of training; compiled as users
  do."""
  subprocess.run(
    [sys.executable, '-m', 'vqrae_jax.train',
     '--config=configs/quickstart.py', f'--workdir={tmp_path}'],
    check=True,
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
  )  # fmt: skip
  assert len([*(tmp_path / 'pictures').iterdir()]) == 5
  found = json.loads((tmp_path / 'summary.json').read_text())
  assert found['psnr'] >= max(23.5, found['psnr_block_mean'] + 2)
  assert found['ssim'] >= 0.58
  assert found['codes_used'] >= 2500
  assert found['psnr_shuffled'] <= found['psnr'] - 10
  assert found['eval_images'] == ['astronaut', 'chelsea', 'coffee']
