"""The demo: what its page computes, and the page in a browser."""

import functools
import os
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import vqrae_jax
from tests import runs, tiny
from vqrae_jax import demo, export
from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import evaluator


@functools.cache
def model(kind='vq-ema', norm='none'):
  """32 pixels in four tiles of 16."""
  made = (
    tiny.normalised(kind, norm)
    if norm != 'none'
    else tiny.built(tiny.model(kind))
  )
  return demo.Model(*made, 32, (16, 16))


@pytest.mark.parametrize(
  'kind, norm',
  [('vq-ema', 'none'), ('grouped-vq', 'none'), ('vq-ema', 'position')],
)
def test_tokens_are_those_of_the_tiles(kind, norm):
  """And decode to the reconstruction."""
  shown = model(kind, norm)
  crop = shown.crop(tiny.images(1, 50, 40)[0])
  assert crop.shape == (32, 32, 3)
  indices = shown.encode(crop)
  assert indices.shape[:2] == (8, 8)
  tiles = crop.reshape(2, 16, 2, 16, 3).swapaxes(1, 2).reshape(4, 16, 16, 3)
  pair = shown.tokenizer, shown.variables
  encode = jax.jit(vqrae_jax.encode_to_indices, static_argnums=0)
  for i, want in enumerate(np.asarray(encode(*pair, tiles))):
    top, left = 4 * (i // 2), 4 * (i % 2)
    found = indices[top : top + 4, left : left + 4]
    np.testing.assert_array_equal(found, want)
  _, want = evaluator.reconstruct_tiled(*pair, crop, 16)
  np.testing.assert_allclose(shown.decode(indices) / 255, want, atol=0.6 / 255)


def test_a_click_and_a_brush():
  shown = model()
  crop = shown.crop(tiny.images(1, 32, 32)[0])
  indices = shown.encode(crop)
  code = shown.token_at(indices, 17.9, 5.0)  # x, y
  assert code == indices[1, 4]
  kept = shown.where(indices, code)
  np.testing.assert_array_equal(kept, indices == code)
  page = shown.shown(crop, kept)
  np.testing.assert_array_equal(page[4:8, 16:20], crop[4:8, 16:20])
  assert (page <= crop).all() and (page < crop).any()
  # Two by two from the token, within the image; four about it.
  want = indices.copy()
  want[7:, 7:] = want[1:5, 2:6] = 63
  edited = shown.edited(indices, 31.0, 28.1, 2, np.int32(63))
  edited = shown.edited(edited, 12.0, 8.0, 4, np.int32(63))
  np.testing.assert_array_equal(edited, want)
  # Tokens that are not edited keep their colours.
  before, after = (shown.colours(x, indices) for x in (indices, edited))
  same = (indices == edited).repeat(4, 0).repeat(4, 1)
  np.testing.assert_array_equal(before[same], after[same])
  line = shown.figures(crop, shown.decode(edited), 2)
  assert '384 bits' in line and '64 indices of 64 codes' in line


def test_bad_input(tmp_path):
  for kind, words in (('none', 'continuous'), ('multiscale', 'several scales')):
    export.save_tokenizer(*tiny.built(tiny.model(kind)), tmp_path / kind)
    with pytest.raises(UserError, match=words):
      demo.Model.load(str(tmp_path / kind), None)
  export.save_tokenizer(*tiny.built(tiny.model('vq-ema')), tmp_path / 'vq')
  with pytest.raises(UserError, match='--size=40 .*16'):
    demo.Model.load(str(tmp_path / 'vq'), 40)
  assert demo.Model.load(str(tmp_path / 'vq'), None).size == demo.LEAST


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
  """A photograph is opened, a token clicked on, some edited."""
  pytest.importorskip('gradio')
  browser = pytest.importorskip('playwright.sync_api')
  chromium = shutil.which('chromium') or shutil.which('chromium-browser')
  if chromium is None:
    pytest.skip('no chromium')
  export.save_tokenizer(*tiny.built(tiny.model('vq-ema')), tmp_path / 'vq')
  Image.fromarray(tiny.images(1, 90, 70)[0]).save(tmp_path / 'photo.png')
  port = runs.free_address().rsplit(':', 1)[1]
  server = subprocess.Popen(
    [sys.executable, '-m', demo.MODULE, f'--tokenizer={tmp_path}/vq',
     f'--port={port}', '--size=64'],
    env=tiny.alone(1) | {'PYTHONPATH': str(runs.ROOT)},
    text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  try:
    address = server.stdout.readline().split(';')[0]
    assert address == f'http://127.0.0.1:{port}'
    with browser.sync_playwright() as playwright:
      opened = playwright.chromium.launch(
        executable_path=chromium, args=['--no-sandbox']
      )
      page = opened.new_page(viewport=dict(width=1400, height=1150))
      page.goto(address)

      def wait(place, words):
        text = f"document.querySelector('#{place}')?.innerText ?? ''"
        page.wait_for_function(f'({text}).includes("{words}")', timeout=120_000)
        return page.inner_text(f'#{place}')

      page.wait_for_selector('#upload input[type=file]', state='attached')
      page.set_input_files('#upload input[type=file]', tmp_path / 'photo.png')
      before = wait('figures', 'PSNR')
      assert '256 indices of 64 codes' in before and 'edited' not in before
      page.wait_for_selector('#slider img')
      # Before a token was clicked on there is nothing to paint with.
      page.locator('#recon img').click()
      page.get_by_text('Click on a token first').wait_for()
      tokens = page.locator('#tokens img')
      tokens.click()
      found = re.search(r'code (\d+): (\d+) of 256', wait('caption', 'code'))
      assert 0 <= int(found[1]) < 64 and int(found[2]) >= 1
      page.wait_for_selector('#same img')
      box = page.locator('#recon img').bounding_box()
      for row in (0.3, 0.7):
        page.mouse.click(
          box['x'] + box['width'] / 2, box['y'] + row * box['height']
        )
        time.sleep(1)
      after = wait('figures', 'edited')
      assert int(re.search(r'(\d+) tokens edited', after)[1]) > 16
      if folder := os.environ.get('VQRAE_SCREENSHOTS'):
        page.screenshot(path=f'{folder}/demo.png', full_page=True)
      page.get_by_text("The image's own").click()
      page.wait_for_function(
        "!document.querySelector('#figures').innerText.includes('edited')"
      )
      opened.close()
  finally:
    server.kill()
    server.wait()
