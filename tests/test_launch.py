"""`launch/`: what a scheduler's file starts is the run that one line starts.

Slurm's file runs on a Slurm of one node, whose daemons live in a temporary
folder as long as the test; Debian has them as slurm-wlm and munge.
"""

import contextlib
import getpass
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import runs, tiny
from vqrae_jax.train.checkpoint import Checkpoints

LAUNCH = runs.ROOT / 'launch'
STEPS = 24
SLURM = """
ClusterName=test
SlurmctldHost=localhost({host})
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={munge},cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}
SlurmdSpoolDir={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
NodeName=localhost NodeHostname={host} CPUs=2
PartitionName=all Nodes=localhost Default=yes
"""


def wait(until, seconds=300):
  """Until `until()` is true."""
  deadline = time.time() + seconds
  while not (found := until()):
    assert time.time() < deadline, until
    time.sleep(0.2)
  return found


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
  """(command, …) -> what that command of a Slurm with one node of two CPUs
  prints."""
  if not all(map(shutil.which, ('slurmctld', 'slurmd', 'munged'))):
    pytest.skip('no slurmctld, slurmd and munged: apt-get install slurm-wlm')
  folder = tmp_path_factory.mktemp('slurm')
  munge, conf = folder / 'munge.socket', folder / 'slurm.conf'
  text = SLURM.format(
    host=socket.gethostname().partition('.')[0],
    user=getpass.getuser(),
    folder=folder,
    munge=munge,
    ports=[runs.free_address().partition(':')[2] for _ in range(2)],
  )
  conf.write_text(text)
  key = folder / 'munge.key'
  key.write_bytes(os.urandom(128))
  key.chmod(0o600)
  monkeypatch.setenv('SLURM_CONF', str(conf))

  def ask(*words):
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip()

  def daemon(*words):
    log = (folder / f'{words[0]}.log').open('w')
    return subprocess.Popen(words, stdout=log, stderr=log)

  files = [f'--{n}-file={folder}/munge.{n}' for n in ('key', 'pid', 'seed')]
  files += [f'--log-file={folder}/munge.log', f'--socket={munge}']
  daemons = [daemon('munged', '--foreground', '--force', *files)]
  try:
    wait(munge.exists)
    daemons.append(daemon('slurmctld', '-D'))
    daemons.append(daemon('slurmd', '-D', '-N', 'localhost'))
    wait(lambda: ask('sinfo', '-h', '-o', '%T') == 'idle')
    yield ask
  finally:
    ask('scancel', '--user', getpass.getuser())
    for process in reversed(daemons):
      process.terminate()
      process.wait(60)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  folder = runs.images(tmp_path_factory.mktemp('launch') / 'images')
  return runs.plain(
    folder, duration=STEPS, checkpoint=dict(every=5, keep=3),
    mesh=dict(layout='fsdp'),
  )  # fmt: skip


@pytest.fixture(scope='module')
def want(config, tmp_path_factory):
  """The workdir of the run that nothing stops."""
  workdir = tmp_path_factory.mktemp('want') / 'run'
  runs.finished(runs.launched(config, workdir, 1))
  return workdir


@pytest.mark.slow
def test_two_processes_are_killed_and_go_on(config, want, tmp_path):
  workdir = tmp_path / 'run'
  launched = runs.launched(config, workdir, 1)
  wait(lambda: runs.at_step(STEPS // 2)(workdir))
  pid = launched.pid
  children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text()
  os.kill(int(children.split()[1]), signal.SIGKILL)
  said = launched.communicate(timeout=300)[1]
  assert launched.returncode == 128 + signal.SIGKILL, said
  assert len(runs.rows(workdir)) < STEPS
  assert '0: ' in said and 'resumed from' in runs.finished(
    runs.launched(config, workdir, 1)
  )
  runs.check_same(workdir, want)


@pytest.mark.slow
def test_slurm_stops_requeues_and_goes_on(
  config, want, tmp_path, slurm, monkeypatch
):
  for name, value in tiny.alone(1).items():
    monkeypatch.setenv(name, value)
  python = pathlib.Path(sys.executable).parent
  monkeypatch.setenv('PATH', f'{python}:{os.environ["PATH"]}')
  monkeypatch.setenv('PYTHONPATH', str(runs.ROOT))
  workdir, log = tmp_path / 'run', tmp_path / 'log'
  file = runs.config_file(config, tmp_path / 'run.py')

  def submit():
    return slurm(
      'sbatch', '--parsable', '--ntasks=2', f'--output={log}',
      str(LAUNCH / 'slurm.sbatch'), f'--config={file}',
      f'--workdir={workdir}',
    )  # fmt: skip

  def state(job):
    text = slurm('scontrol', 'show', 'job', job)
    return dict(word.split('=', 1) for word in text.split() if '=' in word)

  def is_at(step):
    wait(lambda: runs.at_step(step)(workdir))

  def saved():
    return Checkpoints(workdir / 'checkpoints').steps()[-1]

  # What Slurm sends some time before the time is up.
  job = submit()
  is_at(STEPS // 4)
  slurm('scancel', '--signal=TERM', '--batch', job)
  wait(lambda: state(job)['JobState'] == 'PENDING')
  first = saved()
  assert 'by the scheduler after step' in log.read_text()
  # A user's scancel: no requeue.
  is_at(first + STEPS // 4)
  slurm('scancel', job)
  wait(lambda: state(job)['JobState'] == 'CANCELLED')
  assert first < saved() < STEPS
  assert state(job)['Restarts'] == '1'
  job = submit()
  wait(lambda: state(job)['JobState'] == 'COMPLETED')
  assert log.read_text().count('resumed from step') == 4
  runs.check_same(workdir, want)
