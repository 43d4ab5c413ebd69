"""The quick-start's figures: minutes, so `make test-slow` only."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_commands import ROOT


@pytest.mark.slow
def test_quickstart_reaches_its_figures(tmp_path):
  """PSNR at least 20 dB and 1 dB below block means, SSIM .55, 2,000 codes,
  shuffled codes 6 dB worse, on images kept out of training; compiled as users
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
  assert found['psnr'] >= max(20.0, found['psnr_block_mean'] - 1)
  assert found['ssim'] >= 0.55
  assert found['codes_used'] >= 2000
  assert found['psnr_shuffled'] <= found['psnr'] - 6
  assert found['eval_images'] == ['astronaut', 'chelsea', 'coffee']
