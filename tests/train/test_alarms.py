"""Each alarm sounds when it should, once, and not otherwise."""

import re
import types

import pytest

from vqrae_jax.train.loop import Alarms

SOUND = {
  'loss/discriminator': 0.8,
  'logits/real': 0.3,
  'logits/fake': -0.2,
  'gan_balance': 12.0,
  'nonfinite': 0.0,
}


def adversary(loss='hinge', start=2, gan_start=4):
  spec = types.SimpleNamespace(loss=loss)
  return types.SimpleNamespace(spec=spec, start=start, gan_start=gan_start)


def said(alarms, steps, **metrics):
  for step in steps:
    alarms.hear(step, SOUND | metrics)
  return alarms.words()


def test_silent_while_all_is_well():
  assert said(Alarms(adversary()), range(1, 9)) == []
  assert said(Alarms(None), range(1, 9)) == []


@pytest.mark.parametrize(
  'metrics, words',
  (
    ({'loss/discriminator': 0.001}, 'tells every reconstruction'),
    ({'logits/real': 400.0}, 'logits run away'),
    ({'logits/fake': -400.0}, 'logits run away'),
    ({'gan_balance': 1e4}, 'gan_balance lies at its bound 1e\\+04'),
  ),
)
def test_one_line_until_it_is_over(metrics, words):
  alarms = Alarms(adversary())
  (line,) = said(alarms, range(5, 9), **metrics)
  assert re.search(words, line)
  assert said(alarms, range(9, 12), **metrics) == []
  assert said(alarms, range(12, 15)) == []
  assert len(said(alarms, range(15, 18), **metrics)) == 1


def test_players_that_have_not_begun_are_not_judged():
  quiet = {'loss/discriminator': 0.0}
  assert said(Alarms(adversary()), (1, 2), **quiet) == []
  # Nor is the balance before the decoder hears of it.
  assert said(Alarms(adversary()), (3, 4), gan_balance=1e4) == []


def test_a_step_that_was_left_out_tells_nothing():
  lost = {'loss/discriminator': float('nan'), 'nonfinite': 1.0}
  assert said(Alarms(adversary()), (5, 6), **lost) == []


def test_guessing_depends_on_the_loss():
  """2 % of what guessing gives: 1 for hinge, 2 log 2, log 2."""
  low = {'loss/discriminator': 0.021}
  assert said(Alarms(adversary('hinge')), (5, 6), **low) == []
  assert len(said(Alarms(adversary('non_saturating')), (5, 6), **low)) == 1
  assert said(Alarms(adversary('vanilla')), (5, 6), **low) == []
