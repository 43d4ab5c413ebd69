"""Every bad input that we could think of: one line, exit code 2, no trace.

A row is what a user types and words of the answer. The commands run in this
process by `command.run`, as `python -m` runs them, in a folder of bad files
(`tests/bad.py`); a few run as real processes.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests import bad
from tests.bad import tree

ROOT = pathlib.Path(__file__).resolve().parents[1]

# The config file takes `:key=value,…` as keys over a tiny run's.
FLAGS = [
  ('', 'flag --config is missing'),
  ('--config=nowhere.py', 'no config at "nowhere.py"'),
  ('--config=configs/quikstart.py', 'did you mean "configs/quickstart.py"'),
  ('--config=photos', 'no config at "photos"'),
  ('--config=notes.txt', 'notes.txt:1: NameError'),
  ('--config=broken.py', 'broken.py:1'),
  ('--config=fails.py', r'fails\.py:2: ZeroDivisionError: division by zero'),
  ('--confg=mine.py', 'unknown flag --confg; did you mean "config"'),
  ('--config=mine.py mine', 'unexpected argument "mine"; flags start with --'),
  (
    '--config=mine.py --dry_run=maybe',
    'dry_run=maybe: it must be true or false',
  ),
  ('--config=mine.py --profile=3', '--profile=3 must be FIRST:LAST'),
  ('--config=mine.py --profile=1:9', 'ends after the 2 steps'),
  ('--config=mine.py --profile=1:2 --dry_run', 'no --profile'),
  ('--config=mine.py --workdir=notes.txt', 'notes.txt is a file'),
  ('--config=mine.py --workdir=notes.txt/run', 'notes.txt is a file'),
  ('--config=mine.py --workdir=', 'flag --workdir is empty'),
  ('--config=mine.py --config.batch_sise=4', 'did you mean .batch_size'),
  (
    '--config=mine.py --config.batch_size=many',
    'batch_size=many: it must be a whole number',
  ),
  (
    '--config=mine.py --config.batch_size=2.5',
    'batch_size=2.5: it must be a whole number',
  ),
  ('--config=mine.py --config.data.source', 'data.source'),
  ('--config=mine.py --config.seed.x=1', '"config.seed" has no keys'),
  ('--config=configs/quickstart.py:steps=x', 'steps=x" must be like'),
  ('--config=configs/simvq_siglip_l.py:stage=3', 'stage=1 or stage=2'),
  ('--config=configs/simvq_siglip2_l.py:preset=papr', 'preset=paper'),
  ('--config=configs/internvit_6b.py:decoder=M', 'must be decoder='),
  ('--config=configs/vqvae_16k.py', 'data "FOLDER"'),
  (
    '--config=configs/simvq_siglip_l.py:stage=2 --config.data.source=photos '
    '--config.batch_size=8 --config.duration=4000',
    'init_from=RUN: there is no such folder',
  ),
]

CONFIGS = [
  ('batch_size=12', 'multiple of the 8 devices'),
  ('batch_size=0', 'batch_size=0 must be above 0'),
  ('accumulate=0', 'accumulate=0 must be above 0'),
  ('accumulate=2', 'times accumulate=2'),
  ('seed=-1', 'seed=-1 must lie in'),
  ('ema=1.5', 'ema=1.5 must lie in'),
  ('noise_tau=-0.5', 'noise_tau=-0.5 must be finite and not negative'),
  ('duration="soon"', "duration='soon' must be a number of steps"),
  ('duration="3 epocs"', 'did you mean "epochs"'),
  ('duration=0', 'no step at all; an epoch is 0.375 of them'),
  ('duration=-5', 'must not be negative'),
  ('duration=None', 'duration=None must be of type'),
  ('colour=3', 'unknown key "config.colour"'),
  ('losses=dict()', 'losses is empty'),
  ('losses=dict(l3=1.0)', 'unknown loss "l3"; did you mean "l'),
  ('losses=dict(l2=0.0)', 'weight=0.0 trains nothing'),
  ('losses=dict(l2=-1.0)', 'weight=-1.0 trains nothing'),
  ('losses=dict(l2=float("nan"))', 'weight=nan trains nothing'),
  ('losses=dict(l2=dict(weigth=1.0))', 'did you mean "weight"'),
  ('losses=dict(l2="much")', 'must be of type float'),
  ('losses=dict(l2=1.0, codebook=1.0)', 'losses.codebook: the quantizer FSQ'),
  ('losses=dict(l2=dict(weight=1.0, start=9))', 'losses.l2 starts at 9'),
  ('losses=dict(l2=dict(weight=1.0, unit="days"))', 'losses.*days'),
  ('schedules=()', 'schedules'),
  ('schedules=((".*",),)', r'must be \(regex, schedule\)'),
  ('schedules=((".*", 3),)', 'must be None or dict'),
  ('schedules=((".*", None),)', 'nothing to train'),
  ('schedules=(("(", dict(lr=1e-3)),)', 'schedules.*regex'),
  ('schedules=((".*", dict(rate=1e-3)),)', 'unknown key .*rate'),
  ('schedules=((".*", dict(lr=-1.0)),)', 'finite and not negative'),
  ('schedules=((".*", dict(lr=1e-3, warmup=9)),)', 'leaves none of the 2'),
  ('schedules=((".*", dict(lr=1e-3, decay="exp")),)', "decay='exp'"),
  ('schedules=((".*", dict(lr=1e-3, layers=(1,))),)', '1 layers claims'),
  ('schedules=(("encoder/.*", dict(lr=1e-3)),)', 'decoder/'),
  ('schedules=(("encodr/.*", None), (".*", dict(lr=1.0)))', 'encodr'),
  ('optim=dict(b1=1.0)', 'optim.b1=1.0 must lie in'),
  ('optim=dict(clip=0.0)', 'optim.clip=0.0 must be above 0'),
  ('mesh=dict(layout="ddp")', 'unknown mesh layout "ddp"; did you mean "dp"'),
  ('mesh=dict(layout="fsdp+tp", tensor=3)', 'must divide the 8 devices'),
  ('mesh=dict(layout="dp", tensor=2)', 'needs mesh.layout="fsdp[+]tp"'),
  ('checkpoint=dict(every=-1)', 'checkpoint.every=-1'),
  ('checkpoint=dict(keep=0)', 'checkpoint.keep=0 must be above 0'),
  ('log=dict(every=0)', 'log.every'),
  ('log=dict(images_every=-1)', 'log.images_every=-1 must not be neg'),
  ('log=dict(usage_window=0)', 'usage_window must be above 0'),
  ('log=dict(usage_window=10**6)', 'usage_window=1000000 steps .* GiB'),
  (
    'model=MODEL | dict(latents=dict(norm="channel"))',
    'needs statistics: python -m vqrae_jax.latent_stats --config=',
  ),
  ('model=MODEL | dict(latents=dict(norm="mean"))', "latents.norm='mean'"),
  ('init=dict(latents="s.npz")', 'init.latents=s.npz has no place'),
  (
    'model=MODEL | dict(latents=dict(norm="channel")), '
    'init=dict(latents="notes.txt")',
    'init.latents=notes.txt: .* says no format of weights',
  ),
  ('init_from="nowhere"', 'init_from=nowhere: there is no such folder'),
  ('init_from="photos"', 'photos is no tokenizer: it has no config.json'),
  ('init_from="notes.txt"', 'init_from=notes.txt'),
  ('init_from="other"', 'has quantizer.name=vq, model.* is fsq; make the'),
  ('init_from="tok/encoder"', 'init.encoder begins a run with it'),
  ('init=dict(encoder="tok/encoder")', 'encoder/config.json is damaged'),
  ('init_from="unbegun"', 'no checkpoint yet'),
  ('init_from="torn"', 'init_from=torn: no checkpoint of that run is whole'),
  ('init_from="headless"', 'headless/config.json cannot be used'),
  ('init=dict(decoder="rae:nowhere.pt")', 'nowhere.pt'),
  ('init=dict(decoder="rae:notes.txt")', 'notes.txt'),
  ('init=dict(decoder="tokenizer")', 'a decoder comes from "rae:FILE"'),
  ('init=dict(decoder="rae:x.pt"), init_from="run"', 'give one of the two'),
  (
    'init=dict(decodr="x")',
    'unknown key "config.init.decodr"; did you mean "decoder"',
  ),
  ('model=MODEL | dict(encoder=dict(name="siglp"))', 'siglip'),
  ('model=None', 'config.model=None must be of type'),
  ('model=MODEL | dict(quantizer=dict(name="vqq"))', 'did you mean "vq"'),
  ('model=MODEL | dict(dtype="float16")', 'float16'),
  ('model=MODEL | dict(quantizer=dict(name="fsq", levels=()))', 'levels'),
  ('data=DATA | dict(image_size=18)', '18x18'),
  ('data=DATA | dict(image_size=-16)', 'data.image_size=-16 must be pixels'),
  ('data=DATA | dict(image_size="big")', 'data.image_size'),
  ('data=DATA | dict(resize=(8, 4))', 'data.resize'),
  ('data=DATA | dict(crop="middle")', "data.crop='middle'; there are"),
  ('data=DATA | dict(max_skipped=2.0)', 'must be a share in'),
  ('data=DATA | dict(examples=0)', 'data.examples=0 must be above 0'),
  ('data=DATA | dict(include=("cat*",))', 'is named "cat[*]"'),
  ('data=DATA | dict(exclude=("*",))', 'included and not excluded'),
  ('data=dict(image_size=16)', 'missing key "config.data.source"'),
  ('eval=dict(source="photos", tile=18)', '18x18'),
  ('eval=dict(source="photos", tile=64)', 'smaller than eval.tile=64'),
  ('eval=dict(source="photos", tile=0)', 'eval.tile=0'),
  ('eval=dict(source="bad/zero.png", tile=16)', 'zero.png'),
]

# What all commands say of DATA; what only training says is below.
DATA = [
  ('nowhere', 'data "nowhere" is no folder, file, glob'),
  ('hollow', '"hollow" holds no image'),
  ('docs', '2 .md, 1 .txt'),
  ('notes.txt', '1 .txt'),
  ('*.xyz', r'"\*.xyz"'),
  ('mixed', '1 .tar shards; name one kind by a glob, .*[*].png'),
  ('empty.tar', 'empty.tar .*no image'),
  ('texts.tar', 'texts.tar .*no image'),
  ('noise.tar', 'noise.tar .*no image'),
  ('cut.tar', 'cut.tar .*no image'),
  ('packed.tar.gz', 'compressed tars'),
  ('s-{000..002}.tar', 'there is no s-002.tar'),
  ('s-{000..9999999}.tar', '1,000,000 files'),
  ('noise.array_record', 'cannot read the ArrayRecord file'),
  ('none.array_record', 'holds no record'),
  ('gs://bucket/x.tar', 'is a URL.* mount'),
  ('bundled:cats', 'did you mean "bundled:photos"'),
]

BROKEN = [
  ('train', 'bad', 'cannot be read|unreadable'),
  ('train', 'bad.tar', 'cannot be read|unreadable'),
  ('train', 'foreign.array_record', 'unreadable|could not be read'),
  ('reconstruct_images', 'bad/zero.png', 'zero.png: .*0 bytes'),
  ('reconstruct_images', 'bad/huge.png', '100,000,000'),
  ('reconstruct_images', 'foreign.array_record', 'none of the bytes features'),
]

# A finished run of two steps, and what was done to it or is asked of it.
RUNS = [
  ('run', 'seed=1', 'has seed=0, the config says 1; go back to that'),
  ('run', 'batch_size=16', 'has batch_size=8, the config says 16'),
  ('run', 'model=MODEL | dict(quantizer=dict(name="fsq"))', 'model.quantizer'),
  ('run', 'data=DATA | dict(image_size=32)', 'has image_size'),
  ('run', 'data=DATA | dict(exclude=("1",))', 'has photographs=3'),
  ('run', 'schedules=((".*", dict(lr=1.0)),)', 'train encoder/embed'),
  (
    'run',
    'checkpoint=dict(every=0)',
    'and checkpoint.every=0 would',
  ),
  ('run', 'duration=1', 'step 2, past the 1 steps of duration=1; lengthen'),
  ('run', 'ema=0.0', 'ema=0, and it kept a moving average; go back'),
  ('run', 'log=dict(usage_window=7)', 'log.usage_window=7, and it had 5'),
  ('run', 'optim=dict(clip=None)', 'optim.clip or optim.weight_decay is'),
  ('run', 'optim=dict(weight_decay=0.1)', 'weight_decay is on where'),
  (
    'run',
    'schedules=(("encoder/.*", None), (".*", dict(lr=1.0)))',
    'schedules freeze',
  ),
  ('torn', '', 'no checkpoint in .* is whole .*; remove the folder'),
  ('another', '', 'the frozen tree "params" is not the one'),
  ('blocked', '', 'checkpoints is no folder'),
  ('foreign', '', 'foreign/tokenizer exists and is not replaced'),
  ('jumbled', '', 'checkpoint 2: its manifest tells no position'),
]

TOKENIZERS = [
  ('nowhere', 'no tokenizer at nowhere'),
  ('photos', 'photos is no tokenizer: it has no config.json'),
  ('notes.txt', 'no tokenizer at notes.txt'),
  ('run', 'it has no model.safetensors; did you mean "run/tokenizer"'),
  ('tok/no-config', 'it has no config.json'),
  ('tok/no-weights', 'it has no model.safetensors'),
  ('tok/empty-config', 'config.json is damaged'),
  ('tok/list-config', 'config.json is damaged'),
  ('tok/binary-config', 'config.json is damaged'),
  ('tok/no-model', 'config.json is damaged'),
  ('tok/odd-model', 'model'),
  ('tok/newer', 'has format version 9, this package reads 1'),
  ('tok/encoder', 'tok/encoder is an encoder alone; load_encoder opens it'),
  ('tok/edited', 'damaged or was edited: its fingerprint is'),
  ('tok/another-model', 'tok/another-model'),
  ('tok/cut-weights', 'model.safetensors cannot be read'),
  ('tok/noise-weights', 'model.safetensors cannot be read'),
  ('tok/empty-weights', 'model.safetensors cannot be read'),
]

RECONSTRUCT = [
  ('', 'flag --tokenizer is missing'),
  ('--tokenizer=tokenizer --out=out', 'flag --images is missing'),
  ('--tokenizer=tokenizer --images=photos', 'flag --out is missing'),
  ('--tokenizer=tokenizer --images=photos --out=notes.txt', 'is a file'),
  ('--tokenizer=tokenizer --images=photos --out=out --tile=7', 'tile=7 must'),
  ('--tokenizer=tokenizer --images=photos --out=out --tile=x', 'tile'),
  ('--tokenizer=tokenizer --images=photos --out=photos', 'would overwrite'),
  ('--tokenizer=tokenizer --images=dot.png --out=out', 'is smaller than'),
  ('--tokeniser=tokenizer', 'did you mean "tokenizer"'),
]


@pytest.mark.parametrize('argv, words', FLAGS)
def test_flags_of_train(argv, words, answer):
  assert re.search(words, answer('train', argv.split()))


@pytest.mark.parametrize('keys, words', CONFIGS)
def test_configs(keys, words, answer, programs):
  assert re.search(words, answer('train', [f'--config=mine.py:{keys}']))
  assert not programs()


# One function opens the data of all commands: each is asked once.
@pytest.mark.parametrize(
  'name, data, words',
  [('reconstruct_images', *row) for row in DATA]
  + [(name, *DATA[0]) for name in ('train', 'latent_stats')],
)
def test_data(name, data, words, answer):
  argv = {
    'train': ['--config=mine.py', f'--config.data.source={data}'],
    'reconstruct_images': [
      '--tokenizer=tokenizer', '--out=out', f'--images={data}'
    ],
    'latent_stats': ['--config=mine.py', '--out=s.npz', f'--data={data}'],
  }[name]  # fmt: skip
  assert re.search(words, answer(name, argv))


@pytest.mark.parametrize('run, keys, words', RUNS)
def test_runs_that_cannot_go_on(run, keys, words, answer):
  argv = [f'--config=mine.py:{keys}', f'--workdir={run}']
  assert re.search(words, answer('train', argv))


@pytest.mark.parametrize('folder, words', TOKENIZERS)
def test_tokenizers(folder, words, answer):
  argv = [f'--tokenizer={folder}', '--images=photos', '--out=out']
  assert re.search(words, answer('reconstruct_images', argv))


@pytest.mark.parametrize('argv, words', RECONSTRUCT)
def test_flags_of_reconstruct_images(argv, words, answer):
  assert re.search(words, answer('reconstruct_images', argv.split()))


@pytest.mark.parametrize('name, data, words', BROKEN)
def test_data_that_is_broken_throughout(name, data, words, answer):
  argv = {
    'train': ['--config=mine.py', f'--config.data.source={data}'],
    'reconstruct_images': [
      '--tokenizer=tokenizer', '--out=out', f'--images={data}'
    ],
  }[name]  # fmt: skip
  assert re.search(words, answer(name, argv))


@pytest.mark.parametrize(
  'argv, words',
  [
    ('train --config=none.py', "no attribute 'get_config'"),
    ('train --config=mine.py:ema=2.0', 'ema=2.0 must lie in'),
    ('train --config=mine.py --workdir=torn', 'is whole'),
    (
      'reconstruct_images --tokenizer=run --images=photos --out=out',
      'did you mean "run/tokenizer"',
    ),
  ],
)
def test_real_processes(argv, words, place):
  name, *argv = argv.split()
  before = tree(place)
  done = subprocess.run(
    [sys.executable, '-m', f'vqrae_jax.{name}', *argv],
    capture_output=True,
    text=True,
    cwd=place,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
  )
  assert done.returncode == 2 and done.stdout == ''
  assert re.search(words, done.stderr.splitlines()[-1])
  assert 'Traceback' not in done.stderr
  assert tree(place) == before


def test_links_to_nowhere_are_seen_before_training(place, answer):
  (place / 'lost').mkdir()
  for name, words in (
    ('tokenizer', 'lost/tokenizer exists and is not replaced'),
    ('checkpoints', 'lost/checkpoints is no folder'),
  ):
    (place / 'lost' / name).symlink_to(place / 'nowhere')
    found = answer('train', ['--config=mine.py', '--workdir=lost'])
    assert re.search(words, found)
    (place / 'lost' / name).unlink()
