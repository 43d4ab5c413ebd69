"""Bad configurations of losses, players and beginnings: one line, exit code 2,
and no program compiled before it.

Rows are as those of `tests/test_bad_inputs.py`, which has what was there
before the second player, and goes the same way.
"""

import re

import jax
import pytest

from tests import tiny
from vqrae_jax.train import config as config_lib

PATCH = 'discriminator=dict(name="patch")'
GAN = f'losses=dict(l2=1.0, gan=0.5), {PATCH}'


def player(**keys):
  """A run with a discriminator of these keys."""
  fields = ', '.join(f'{key}={value}' for key, value in keys.items())
  return (
    'losses=dict(l2=1.0, gan=0.5), '
    f'discriminator=dict(dict(name="patch"), {fields})'
  )


def quantizer(words, losses):
  return f'model=MODEL | dict(quantizer=dict({words})), losses=dict({losses})'


LOSSES = [
  ('losses=dict(l2=1.0, lpisp=1.0)', 'unknown loss "lpisp"; did you .*"lpips"'),
  ('losses=dict(l1=0.0, l2=1.0)', r'losses\.l1\.weight=0\.0 trains nothing'),
  ('losses=dict(l2=float("inf"))', r'losses\.l2\.weight=inf trains nothing'),
  ('losses=dict(l1=1.0, l2=None)', r'losses\.l2\.weight=None must be of type'),
  (
    'losses=dict(l2=dict(weight=1.0, start=1, unit="epocs"))',
    r"losses\.l2\.unit='epocs'; did you mean \"epochs\"",
  ),
  (
    'losses=dict(l2=dict(weight=1.0, start=-3))',
    r"losses\.l2\.start='-3 steps' must not be negative",
  ),
  (
    'losses=dict(l2=dict(weight=1.0, ramp=9))',
    r'losses\.l2 rises for 9 steps, past the 2 steps of the run',
  ),
  (
    'losses=dict(l2=dict(weight=1.0, ramp=1.5))',
    r"losses\.l2\.ramp='1\.5 steps' must be a whole number",
  ),
  (
    quantizer('name="vq", num_codes=16', 'l2=1.0, commit=0.2, codebook=1.0'),
    r'losses\.codebook: .* VQ .* \(it gives commit\); remove the term',
  ),
  (
    'losses=dict(l2=1.0, commit=0.25)',
    r'losses\.commit: .* FSQ .* \(it gives none\); remove the term',
  ),
  (
    quantizer('name="none"', 'l2=1.0, commit=0.25'),
    r'losses\.commit: .* \(it gives none\); remove the term',
  ),
  (
    'losses=dict(l2=1.0, lpips=1.0), init=dict(networks="randm")',
    r"init\.networks='randm'; did you mean \"random\"",
  ),
  (
    'losses=dict(l2=1.0, lpips=1.0)',
    r'losses\.lpips: vgg16 .*fetch_weights --names=vgg16.*networks=random',
  ),
  (
    'losses=dict(l2=1.0, lpips=1.0), init=dict(networks="random"), '
    'data=DATA | dict(image_size=8)',
    '"lpips" needs images of 16 pixels a side',
  ),
]

SECOND_PLAYER = [
  (
    'losses=dict(l2=1.0, gan=0.5)',
    r'losses\.gan wants a discriminator: add discriminator=dict\(name="patch"',
  ),
  (PATCH, r'discriminator=patch has no losses\.gan to learn for; add that'),
  (
    f'losses=dict(gan=0.5), {PATCH}',
    r'no image loss to balance it against; add one .*losses\.gan\.adaptive=F',
  ),
  (GAN.replace('gan=0.5', 'gan=-1'), r'losses\.gan\.weight=-1 trains nothing'),
  (
    GAN.replace('gan=0.5', 'gan=dict(weight=1.0, adaptiv=False)'),
    r'"losses\.gan\.adaptiv"; did you mean "adaptive"',
  ),
  (
    GAN.replace('gan=0.5', 'gan=dict(weight=1.0, start=9)'),
    r'losses\.gan starts at 9 steps, after the 2 steps of the run',
  ),
  (player(name='"path"'), 'unknown discriminator "path"; did you mean "patch"'),
  (player(nam='"patch"'), r'"config\.discriminator\.nam"; did you mean "name"'),
  (
    player(fields='dict(hiden=8)'),
    r'"discriminator\.fields\.hiden"; did you mean "hidden"',
  ),
  (
    player(fields='dict(hidden=9)'),
    r'discriminator\.fields\.hidden=9 must be a multiple of',
  ),
  (
    player(name='"dino"', fields='dict(taps=(12,))'),
    r'discriminator\.fields\.taps=\(12,\) must be blocks from 0 to 11',
  ),
  (player(loss='"hing"'), r'discriminator\.loss "hing"; did you mean "hinge"'),
  (
    player(start=9),
    r'discriminator\.start=9 lies after the 2 steps of the run; begin earlier',
  ),
  (
    player(start=1),
    r'losses\.gan starts before discriminator\.start=1, .* let it start then',
  ),
  (player(start='"1 epocs"'), r"discriminator\.start='1 epocs' .*\"epochs\""),
  (player(schedule='dict(lr=-1.0)'), r'discriminator\.schedule: .*lr=-1\.0'),
  (
    player(schedule='dict(lr=1e-3, warmup=9)'),
    'warmup of 9 steps leaves none of the 2 steps',
  ),
  (
    player(schedule=None),
    r'discriminator\.schedule=None must be a section.*lr',
  ),
  (player(optim='dict(b1=1.0)'), r'error: discriminator\.optim\.b1=1\.0 must'),
  (player(lecam='float("nan")'), r'discriminator\.lecam=nan .*must be finite'),
  (player(r1='float("inf")'), r'discriminator\.r1=inf must be finite'),
  (player(updates=0), r'discriminator\.updates=0 must be above 0'),
  (
    'losses=dict(l2=1.0, gan=0.5), discriminator="patch"',
    r"discriminator='patch' must be a section, dict\(…\) of: name, fields",
  ),
  (
    player(name='"dino"'),
    'discriminator: .*fetch_weights .*--config.discriminator.name=patch',
  ),
]

BEGINNINGS = [
  (
    'losses=dict(l2=1.0, distill=1.0)',
    r'losses\.distill .*"teacher", and there is none: set teacher="init"',
  ),
  ('teacher="init"', 'teacher=init has nothing to teach: add losses.distill'),
  (
    'losses=dict(l2=1.0, distill=1.0), teacher="init"',
    'teacher="init" would be a random encoder: set init_from or init.encoder',
  ),
  (
    'losses=dict(l2=1.0, distill=1.0), teacher="siglip-larg"',
    'teacher=siglip-larg: .*did you mean "siglip-large-patch16-384"',
  ),
  (
    'losses=dict(l2=1.0, distill=1.0), teacher="siglip-large-patch16-256", '
    'schedules=(("encoder/.*", None), (".*", dict(lr=1e-3)))',
    r'losses\.distill holds an encoder that moves, and schedules freeze this',
  ),
  (
    quantizer('name="none"', 'l2=1.0, distill=dict(weight=1.0, target="self")'),
    r'losses\.distill\.target="self" draws .* this quantizer has no codes',
  ),
  (
    'losses=dict(l2=1.0, distill=dict(weight=1.0, target="techer"))',
    r"losses\.distill\.target='techer'; did you mean \"teacher\"",
  ),
  (
    'init_from="other"',
    r'init_from=other: that tokenizer has quantizer\.name=vq, .* is fsq; make',
  ),
  (
    'init_from="run", init=dict(encoder="x")',
    r'so init\.encoder has no place; give one of the two',
  ),
]

OTHERS = [
  ('ema=1', r'ema=1 must lie in \[0, 1\)'),
  ('optim=3', 'optim=3 must be a section, dict.* of: b1, b2, eps'),
  ('optim=dict(clip=float("nan"))', r'optim\.clip=nan must be above 0'),
  ('optim=dict(weight_decay=-1.0)', r'optim\.weight_decay=-1\.0 not below'),
  (
    'schedules=((".*", dict(lr=1e-3)), ("decoder/.*", None))',
    'earlier rows claim all that "decoder/.*" matches; put it before them',
  ),
  (
    'schedules=((".*", dict(lr=float("nan"))),)',
    r'schedules\["\.\*"\]: schedule lr=nan',
  ),
  (
    'schedules=((".*", dict(lr=0.0)),)',
    r'schedule lr=0 trains nothing; None freezes leaves',
  ),
  (
    'schedules=((".*/transformer/.*", dict(lr=1e-3, layers=("a", 1.0))),)',
    r"schedule layers=.* 'a' must be a finite factor, not negative, or None",
  ),
  (
    'schedules=((".*/transformer/.*", dict(lr=1e-3, layers=(-1.0, 1.0))),)',
    r'schedule layers=.* -1\.0 must be a finite factor',
  ),
  ('schedules=dict(lr=1e-3)', 'schedules=.* must be of type tuple'),
  ('mesh=dict(layot="dp")', r'"config\.mesh\.layot"; did you mean "layout"'),
  (
    'eval=dict(every=5)',
    r'eval\.every=5 has nothing to measure: name held-out',
  ),
  (
    'schedules=((".*/transformer/.*", dict(lr=1e-3, layers=(None, 0.0))),)',
    r'schedule layers=.* moves no block; give the row None',
  ),
  ('eval=dict(source="photos", tile=0)', r'eval\.tile=0 .* must be above 0'),
  ('model=MODEL | dict(decoder=dict(name="LL"))', 'decoder "LL"; did .* "L"'),
  (
    'model=MODEL | dict(dtype="bf16")',
    r"model\.encoder\.vit\.dtype='bf16'; did you mean \"bfloat16\"",
  ),
  (
    quantizer('name="simvq", distance="cosin"', 'l2=1.0'),
    r"model\.quantizer\.distance='cosin'; did you mean \"cosine\"",
  ),
]


@pytest.mark.parametrize(
  'keys, words', LOSSES + SECOND_PLAYER + BEGINNINGS + OTHERS
)
def test_one_line_before_anything_compiles(
  keys, words, answer, programs, monkeypatch, tmp_path
):
  # Neither weights of this machine nor a network.
  monkeypatch.setenv('VQRAE_JAX_CACHE', str(tmp_path))
  found = answer('train', [f'--config=mine.py:{keys}'])
  assert re.search(words, found)
  assert not programs()


@pytest.mark.parametrize(
  'recipe', ('simvq_siglip_l', 'simvq_siglip2_l', 'internvit_6b')
)
def test_a_recipe_that_goes_on_asks_for_the_run_first(recipe, answer, programs):
  """Whatever else is missing: data, epochs, weights."""
  found = answer('train', [f'--config=configs/{recipe}.py:stage=2'])
  assert 'init_from=RUN: there is no such folder' in found
  assert '--config.init_from=runs/NAME' in found
  assert not programs()


def test_a_word_emptied_on_a_command_line_is_none():
  emptied = tiny.run(
    init_from='', teacher='', init=dict(encoder='', decoder='')
  )
  spec = config_lib.read_config(emptied)
  assert spec.init_from is None and spec.teacher is None
  assert spec.init == config_lib.InitSpec()


def test_a_program_would_be_heard(programs):
  assert not programs()
  jax.jit(lambda x: x * 3 + 1)(1.0)
  assert programs() == {'jit(<lambda>)'}
