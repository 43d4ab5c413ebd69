"""The quick-start's promise, whole: minutes, so `make test-slow` only."""

import json
import subprocess
import sys

import pytest

from tests.test_commands import ROOT


@pytest.mark.slow
def test_quickstart_reaches_its_figures(tmp_path):
  """PSNR at least 20 dB and 1 dB below block means, SSIM .55, 2,000 codes,
  shuffled codes 6 dB worse, on photographs kept out of training."""
  subprocess.run(
    [sys.executable, '-m', 'vqrae_jax.train',
     '--config=configs/quickstart.py', f'--workdir={tmp_path}'],
    check=True,
    cwd=ROOT,
  )  # fmt: skip
  found = json.loads((tmp_path / 'summary.json').read_text())
  assert found['psnr'] >= max(20.0, found['psnr_block_mean'] - 1)
  assert found['ssim'] >= 0.55
  assert found['codes_used'] >= 2000
  assert found['psnr_shuffled'] <= found['psnr'] - 6
  assert found['photographs'] == ['astronaut', 'chelsea', 'coffee']
