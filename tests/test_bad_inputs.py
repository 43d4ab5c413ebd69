"""Bad folders, runs and command lines: one line, exit code 2, no traceback.

Runs and tokenizers are given to the functions that open them, in a folder of
bad files (`tests/bad.py`); a few rows go through each command line.
"""

import re

import jax
import pytest

from tests import bad
from vqrae_jax import (
  doctor,
  export,
  latent_stats,
  push,
  reconstruct_images,
  tokenize,
)
from vqrae_jax.errors import UserError
from vqrae_jax.evaluate import __main__ as evaluate
from vqrae_jax.export import __main__ as bundle
from vqrae_jax.train import __main__ as train
from vqrae_jax.train import loop

EVALUATE = '--tokenizer=tokenizer --data=photos --out=m.json'
# The config file mine.py takes `:key=value,…` as keys over a tiny run's.
COMMANDS = [
  (train, '', '--config'),
  (train, '--config=nowhere.py', 'nowhere.py'),
  (train, '--config=broken.py', r'broken\.py.* line 1'),
  (train, '--config=fails.py', r'fails\.py:2: ZeroDivisionError'),
  (train, '--config=none.py', r'none\.py.*get_config'),
  (train, '--config=list.py', r'list\.py.*get_config returned \[1\]'),
  (train, '--config=mine.py:ema=2.0', 'ema=2.0'),
  (train, '--config=mine.py --workdir=notes.txt/run', 'notes.txt'),
  (train, '--config=mine.py --workdir=/proc/x', '--workdir=/proc/x'),
  (train, '--flagfile=/nonexistent', '/nonexistent'),
  (train, '--config=mine.py --workdir=torn', 'torn'),
  (train, '--config=mine.py --workdir=run[1]', r'run\[1\]'),
  (train, '--config=mine.py --config.data.source=hollow', '"hollow"'),
  (train, '--config=mine.py --config.data.source=bad', 'max_skipped|bad/'),
  (latent_stats, '--config=mine.py --out=/proc/s.npz', '--out=/proc'),
  (doctor, '--tokenizer=tokenizer', '--data'),
  (doctor, '--tokenizer=nowhere --data=photos', 'nowhere'),
  (doctor, '--tokenizer=~nosuchuser/t --data=photos', '~nosuchuser'),
  (doctor, '--tokenizer=tokenizer --data=photos --images=9', '--images=9.* 3'),
  (doctor, '--tokenizer=tokenizer --data=photos --json=a.txt', r'\.json'),
  (doctor, '--tokenizer=tokenizer --data=photos --out=notes.txt', '--out'),
  (doctor, '--tokenizer=tokenizer --data=photos --out=o --png=a.png', '--png'),
  (evaluate, '--tokenizer=tokenizer --data=photos', '--out'),
  (evaluate, f'{EVALUATE} --out=notes.txt', '--out=notes.txt'),
  (evaluate, f'{EVALUATE} --metrics=fid', '"rfid"'),
  (evaluate, f'{EVALUATE} --metrics= --fid_stats=s.npz', '--fid_stats'),
  (evaluate, f'{EVALUATE} --metrics=rfid --weights=x.pth', 'NAME=FILE'),
  (evaluate, f'{EVALUATE} --metrics=rfid --weights=vgg16=x.pth', '"vgg16"'),
  (evaluate, f'{EVALUATE} --metrics=rfid --weights=inception=x.pth', 'x.pth'),
  (evaluate, f'{EVALUATE} --metrics=rfid', 'fetch_weights --names=inception'),
  (evaluate, f'{EVALUATE} --metrics= --size=15', '15x15.* patch 4'),
  (evaluate, f'{EVALUATE} --metrics= --images=9', '--images=9.* 3'),
  (evaluate, f'{EVALUATE} --metrics= --data=bad', 'none of the'),
  (bundle, '--out=o', '--tokenizer and --run'),
  (bundle, '--tokenizer=tokenizer', '--out'),
  (bundle, '--tokenizer=tokenizer --run=run --out=o', '--tokenizer and --run'),
  (bundle, '--tokenizer=nowhere --out=o', 'nowhere'),
  (bundle, '--tokenizer=tokenizer --out=photos', '--out=photos exists'),
  (bundle, '--tokenizer=tokenizer --out=notes.txt/o', '--out=notes.txt/o'),
  (bundle, '--tokenizer=tokenizer --out=o --size=18', '18x18.* patch 4'),
  (bundle, '--tokenizer=tokenizer --out=o --size=any', '--size=any.*learned'),
  (bundle, '--tokenizer=tokenizer --out=o --size=big', '--size=big'),
  (bundle, '--tokenizer=tokenizer --out=o --platforms=gpu', 'gpu.*cuda'),
  (bundle, '--tokenizer=tokenizer --out=o --dtype=f16', '--dtype=f16.*bfloat'),
  (
    bundle,
    '--tokenizer=tokenizer --out=o --precision=canonical --dtype=bfloat16',
    '--precision=canonical.*--dtype',
  ),
  (bundle, '--run=torn --out=o', '--run=torn'),
  (bundle, '--run=photos --out=o', '--run=photos'),
  (push, '--tokenizer=tokenizer', '--repo'),
  (push, '--tokenizer=tokenizer --repo=mine', '--repo=mine'),
  (push, '--tokenizer=hf:a/b --repo=a/b', '--tokenizer=hf:a/b'),
  (push, '--tokenizer=tok/edited --repo=a/b', 'fingerprint'),
  (push, '--tokenizer=other --run=run --repo=a/b', '--run=run.*another'),
  (push, '--tokenizer=other --run=photos --repo=a/b', '--run=photos'),
  (tokenize, '--tokenizer=tokenizer --data=photos', '--out'),
  (tokenize, '--tokenizer=nowhere --data=photos --out=new', 'nowhere'),
  (tokenize, '--tokenizer=tokenizer --data=hollow --out=new', '"hollow"'),
  (
    tokenize,
    '--tokenizer=tokenizer --data=photos --out=photos',
    '--out=photos',
  ),
  (tokenize, '--tokenizer=tokenizer --data=photos --out=notes.txt', '--out'),
  (
    tokenize,
    '--tokenizer=tokenizer --data=photos --out=/proc/x',
    '--out=/proc',
  ),
  (reconstruct_images, '', '--tokenizer'),
  (reconstruct_images, '--tokenizer=tokenizer --out=out', '--images'),
  (reconstruct_images, '--tokeniser=tokenizer', '"tokenizer"'),
]

RECONSTRUCT = [
  ('--images=bad/zero.png', 'zero.png'),
  ('--images=bad/huge.png', '100,000,000'),
  ('--images=foreign.array_record', 'foreign.array_record'),
  ('--images=photos --out=notes.txt', '--out=.*notes.txt'),
  ('--images=photos --out=photos', 'photos'),
  ('--images=bad/cut.jpg --out=bad', '--out=bad'),
  ('--images=photos --tile=7', '--tile=7'),
  ('--images=photos --tile=x', '--tile=x'),
  ('--images=dot.png', '3x3'),
]

# What a config names, opened after its checks and before a step is compiled.
STARTS = [
  (dict(init_from='nowhere'), 'init_from=nowhere'),
  (dict(init_from='photos'), 'photos'),
  (dict(init_from='notes.txt'), 'init_from=notes.txt'),
  (dict(init_from='other'), 'init_from=other.*quantizer.name'),
  (dict(init_from='tok/encoder'), 'init.encoder'),
  (dict(init_from='unbegun'), 'unbegun'),
  (dict(init_from='torn'), 'init_from=torn'),
  (dict(init_from='headless'), 'headless/config.json'),
  (dict(init=dict(encoder='tok/encoder')), 'encoder/config.json'),
  (dict(init=dict(decoder='rae:nowhere.pt')), 'nowhere.pt'),
  (dict(init=dict(decoder='rae:notes.txt')), 'notes.txt'),
  (dict(init=dict(decoder='tokenizer')), 'rae:FILE'),
  (dict(init=dict(decoder='hf:a/b')), 'init.decoder=hf:a/b'),
  (dict(init=dict(decoder='rea:x.pt')), 'rae'),
  (dict(init=dict(encoder='dinov2-bas')), 'dinov2-base'),
  (dict(init=dict(encoder='./no')), 'init.encoder=./no'),
  (dict(init=dict(encoder='photos')), 'init.encoder=photos'),
  (dict(eval=dict(source='photos', metrics=('lpips',))), 'eval.metrics'),
]

PHOTOS = dict(source='photos', image_size=16)
# The run was read by another decoder, or this one is not installed.
DECODER = 'decoder=pil|fast_jpeg'
# A finished run of two steps, and what was done to it or is asked of it.
RUNS = [
  ('run', dict(seed=1), 'seed=0'),
  ('run', dict(batch_size=16), 'batch_size=8'),
  ('run', dict(data=PHOTOS | dict(image_size=32)), 'image_size'),
  ('run', dict(data=PHOTOS | dict(exclude=('1',))), 'images=3'),
  ('run', dict(data=PHOTOS | dict(decoder='simplejpeg')), DECODER),
  ('run', dict(schedules=(('.*', dict(lr=1.0)),)), 'train encoder/embed'),
  ('run', dict(checkpoint=dict(every=0)), 'checkpoint.every=0'),
  ('run', dict(duration=1), 'duration=1'),
  ('run', dict(ema=0.0), 'ema'),
  ('run', dict(log=dict(usage_window=7)), 'log.usage_window=7'),
  ('run', dict(optim=dict(clip=None)), 'optim.clip or optim.weight_decay'),
  ('run', bad.FROZEN, 'schedules freeze encoder/'),
  ('torn', {}, 'torn'),
  ('another', {}, '"params"'),
  ('blocked', {}, 'checkpoints'),
  ('foreign', {}, 'foreign/tokenizer'),
]

TOKENIZERS = [
  ('nowhere', 'nowhere'),
  ('photos', 'config.json'),
  ('notes.txt', 'notes.txt'),
  ('run', '"run/tokenizer"'),
  ('tok/no-weights', 'model.safetensors'),
  ('tok/empty-config', 'config.json'),
  ('tok/list-config', 'config.json'),
  ('tok/no-model', 'config.json'),
  ('tok/odd-model', 'encodr'),
  ('tok/newer', 'version 9'),
  ('tok/encoder', 'load_encoder'),
  ('tok/edited', 'fingerprint'),
  ('tok/another-model', 'tok/another-model'),
  ('tok/cut-weights', 'model.safetensors'),
  ('tok/empty-weights', 'model.safetensors'),
]


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
  monkeypatch.chdir(place)


def refused(words, fn, *args):
  with pytest.raises(UserError, match=words) as error:
    fn(*args)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('command, argv, words', COMMANDS)
def test_command_lines(command, argv, words, answer):
  assert re.search(words, answer(command.main, argv.split()))


@pytest.mark.parametrize('argv, words', RECONSTRUCT)
def test_reconstruct_images(argv, words, place):
  argv = ['--tokenizer=tokenizer', '--out=out', *argv.split()]
  refused(words, reconstruct_images.main, argv)
  assert not (place / 'out').exists()


@pytest.mark.parametrize('keys, words', STARTS)
def test_what_a_run_starts_from(keys, words, programs):
  refused(words, loop.dry_run, bad.config() | keys)
  assert not programs()


@pytest.mark.parametrize('run, keys, words', RUNS)
def test_runs_that_cannot_resume(run, keys, words):
  refused(words, loop.train, bad.config() | keys, run)


@pytest.mark.parametrize('folder, words', TOKENIZERS)
def test_tokenizers(folder, words):
  refused(words, export.load_tokenizer, folder)


def test_links_to_nowhere_are_seen_before_training(place):
  (place / 'lost').mkdir()
  for name in ('tokenizer', 'checkpoints'):
    (place / 'lost' / name).symlink_to(place / 'nowhere')
    refused(f'lost/{name}', loop.train, bad.config(), 'lost')
    (place / 'lost' / name).unlink()


def test_a_program_would_be_counted(programs):
  assert not programs()
  jax.jit(lambda x: x * 3 + 1)(1.0)
  assert programs() == {'jit(<lambda>)'}
