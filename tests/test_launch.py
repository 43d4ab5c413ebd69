"""`launch/`: what a scheduler's file starts is the run that one line starts.

Slurm's file runs on a Slurm of one node, whose daemons live in a temporary
folder as long as the test; Debian has them as slurm-wlm and munge.
"""

import getpass
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml

from tests import runs, tiny
from vqrae_jax import cli
from vqrae_jax.train import __main__ as train
from vqrae_jax.train.checkpoint import Checkpoints

LAUNCH = runs.ROOT / 'launch'
STEPS = 96
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
    pytest.skip('no slurmctld, slurmd, munged: apt-get install slurm-wlm munge')
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
def test_two_processes_are_stopped_and_killed_and_go_on(config, want, tmp_path):
  workdir = tmp_path / 'run'
  launched = runs.launched(config, workdir, 1)
  when = runs.at_step(STEPS // 4)
  said = runs.signalled(launched, workdir, when, signal.SIGINT)
  assert launched.returncode == 143, said
  for rank in '01':
    assert f'{rank}: stopped: by the scheduler after step' in said
  stopped = runs.rows(workdir)[-1]['step']
  launched = runs.launched(config, workdir, 1)
  pid = launched.pid
  while not runs.at_step(stopped + 1)(workdir):  # the rest takes half a second
    assert launched.poll() is None
    time.sleep(0.001)
  children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text()
  os.kill(int(children.split()[1]), signal.SIGKILL)
  said = launched.communicate(timeout=300)[1]
  assert launched.returncode == 128 + signal.SIGKILL, said
  assert 'process 1 ended with 137' in said
  assert len(runs.rows(workdir)) < STEPS
  said = runs.finished(runs.launched(config, workdir, 1))
  assert 'resumed from step' in said
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


def test_one_that_fails_ends_all_with_its_code():
  words = '--processes=2', '--', '--config=configs/quickstart.py', '--nonsense'
  done = subprocess.run(
    [sys.executable, LAUNCH / 'local.py', *words],
    cwd=runs.ROOT, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 2
  lines = [line for line in done.stderr.splitlines() if 'nonsense' in line]
  assert lines and all(line[:9] in ('0: error:', '1: error:') for line in lines)


@pytest.mark.parametrize('name', ['slurm.sbatch', 'tpu_vm.sh'])
def test_shellcheck(name):
  if not shutil.which('shellcheck'):
    pytest.skip('no shellcheck')
  done = subprocess.run(
    ['shellcheck', LAUNCH / name], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  'tasks, devices',
  [
    ({}, '0,1,2,3'),
    (dict(SLURM_NTASKS='8'), ''),
    (dict(SLURM_NTASKS_PER_NODE='4'), ''),
  ],
)
def test_one_task_of_a_node_has_all_its_gpus(tasks, devices, tmp_path):
  """Also where sbatch was given no number of tasks, and so sets none."""
  stand_in = tmp_path / 'srun'
  stand_in.write_text('#!/bin/sh\necho "has ${JAX_LOCAL_DEVICE_IDS}."\n')
  stand_in.chmod(0o755)
  node = dict(SLURM_JOB_ID='1', SLURM_JOB_NUM_NODES='2', SLURM_GPUS_ON_NODE='4')
  path = f'{tmp_path}:{os.environ["PATH"]}'
  done = subprocess.run(
    ['bash', LAUNCH / 'slurm.sbatch'], env=dict(PATH=path, **node, **tasks),
    capture_output=True, text=True, timeout=60,
  )  # fmt: skip
  assert f'has {devices}.' in done.stdout, done.stderr


GCLOUD = """#!/bin/sh
# Runs what it would have a worker do, here.
for word; do
  case $word in --command=*) cd "$HOME" && exec bash -c "${word#*=}" ;; esac
done
"""
WORKER = """#!/bin/sh
trap 'echo stopped; exit 143' TERM
printf '%s\\n' "$@"
while :; do sleep 0.1; done
"""


def test_tpu_vms_run_the_command_as_given(tmp_path):
  python = tmp_path / 'vqrae_jax/.venv/bin/python'
  python.parent.mkdir(parents=True)
  for path, text in (tmp_path / 'gcloud', GCLOUD), (python, WORKER):
    path.write_text(text)
    path.chmod(0o755)
  env = {'HOME': str(tmp_path), 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}

  def script(*words):
    subprocess.run(
      [LAUNCH / 'tpu_vm.sh', *words], env=env | dict(NAME='a', ZONE='b'),
      check=True, timeout=60,
    )  # fmt: skip

  flags = ['--config=configs/a.py:b=c', "--config.data.source=d e'*$HOME"]
  log = tmp_path / 'vqrae_jax/train.log'
  log.touch()  # a worker in the background opens it when it comes to it
  script('train', *flags)
  wait(lambda: flags[-1] in log.read_text().splitlines())
  script('stop')
  wait(lambda: log.read_text().endswith('stopped\n'))
  want = ['-m', 'vqrae_jax.train', '--distributed', *flags, 'stopped']
  assert log.read_text().splitlines() == want


@pytest.mark.parametrize('path', LAUNCH.glob('*'), ids=lambda path: path.name)
def test_the_flags_are_those_of_train(path, monkeypatch):
  """In launch lines and in what is launched, and the config is there."""
  if path.suffix == '.yaml':
    (job,) = yaml.safe_load(path.read_text())['spec']['replicatedJobs']
    spec = job['template']['spec']
    (container,) = spec['template']['spec']['containers']
    args = [
      w.replace('$(JOB_COMPLETION_INDEX)', '0') for w in container['args']
    ]
    hosts = [w for w in args if w.startswith('--num_processes=')]
    assert spec['parallelism'] == spec['completions']
    assert hosts in ([], [f'--num_processes={spec["completions"]}'])
  else:
    args = re.findall(r'--(?:config|workdir|dry_run)[^\s\']*', path.read_text())
  monkeypatch.setattr(
    cli, 'join_hosts', mock.Mock(side_effect=InterruptedError)
  )
  monkeypatch.chdir(runs.ROOT)
  with pytest.raises(InterruptedError):
    train.main(args)


def kubernetes():
  """The package, in a pod of a JobSet."""
  labels = {'jobset.sigs.k8s.io/jobset-name': 'set', 'job-name': 'set-w-0'}
  meta = SimpleNamespace(
    name='set-w-0', labels=labels,
    owner_references=[SimpleNamespace(controller=True, kind='Job')],
  )  # fmt: skip
  found, spec = mock.MagicMock(), SimpleNamespace(parallelism=4)
  pod = SimpleNamespace(metadata=meta)
  found.client.CoreV1Api().list_namespaced_pod().items = [pod]
  job = SimpleNamespace(metadata=meta, spec=spec)
  found.client.BatchV1Api().read_namespaced_job.return_value = job
  found.client.exceptions.ApiException = OSError
  return found


TPU_VM = {
  'agent-worker-number': '3',
  'worker-network-endpoints': 'a:b:10.0.0.9,a:b:10.0.0.8,c:d:e,f:g:h',
}
SCHEDULERS = {
  'Slurm': ('n7:61453', dict(
    SLURM_JOB_ID='13', SLURM_STEP_NODELIST='n[7-9]', SLURM_NTASKS='4',
    SLURM_PROCID='3', SLURM_LOCALID='1')),
  'Open MPI': ('10.0.0.1:61441', dict(
    OMPI_MCA_orte_hnp_uri='4096.0;tcp://10.0.0.1,10.0.0.2:34911',
    OMPI_COMM_WORLD_SIZE='4', OMPI_COMM_WORLD_RANK='3',
    OMPI_COMM_WORLD_LOCAL_RANK='1')),
  'GKE': ('p0:8482', dict(
    TPU_WORKER_HOSTNAMES='p0,p1,p2,p3', TPU_WORKER_ID='3')),
  'TPU VM': ('10.0.0.9:8482', {}),
  'JobSet': ('set-w-0-0.set:55527', dict(
    KUBERNETES_SERVICE_HOST='x', JOB_COMPLETION_INDEX='3', HOSTNAME='x')),
}  # fmt: skip


@pytest.mark.parametrize('name', SCHEDULERS)
def test_distributed_finds_the_others(name, monkeypatch):
  """As --help says. JAX has no public function that looks and does not join."""
  from jax._src.clusters import ClusterEnv, cloud_tpu_cluster, k8s_cluster

  address, env = SCHEDULERS[name]
  for word in list(os.environ):
    if word.startswith(('SLURM_', 'OMPI_', 'TPU_', 'KUBERNETES_')):
      monkeypatch.delenv(word)
  for word, value in env.items():
    monkeypatch.setenv(word, value)

  def metadata(key):
    there = name == 'TPU VM' and key in TPU_VM
    return (TPU_VM[key], 200) if there else ('', 404)

  on_tpu = name in ('GKE', 'TPU VM')
  monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', on_tpu)
  monkeypatch.setattr(cloud_tpu_cluster, 'get_metadata', metadata)
  monkeypatch.setattr(socket, 'gethostbyname', lambda host: '10.0.0.9')
  monkeypatch.setitem(sys.modules, 'kubernetes', kubernetes())
  monkeypatch.setattr(k8s_cluster.K8sCluster, '_namespace', lambda: 'default')
  found = ClusterEnv.auto_detect_unset_distributed_params(
    None, None, None, None, None, 10
  )
  assert found[:3] == (address, 4, 3)
