"""Several processes of a run on this machine, for development.

  python launch/local.py --processes=2 --devices=4 -- \
    --config=configs/quickstart.py --workdir=runs/two_processes

Each runs `python -m vqrae_jax.train` with the flags after `--`; its output
lines begin with its number. SIGTERM and Ctrl-C reach all as SIGTERM: they save
and exit with 143; a second one kills them. If one fails, the others are ended,
and this program exits with its code, not with the 75 of one that lost it.

Tested with two processes on CPU devices (tests/test_launch.py), not on
accelerators.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE = 30  # seconds from SIGTERM to SIGKILL where another process failed


def start(number: int, address: str, args: argparse.Namespace):
  """Process `number` of the run, and the threads that copy its lines."""
  env = os.environ | {'PYTHONUNBUFFERED': '1'}
  if args.devices:
    fake = f'--xla_force_host_platform_device_count={args.devices}'
    env['XLA_FLAGS'] = f'{env.get("XLA_FLAGS", "")} {fake}'
    env['JAX_PLATFORMS'] = 'cpu'
  hosts = (
    f'--coordinator_address={address}',
    f'--num_processes={args.processes}',
    f'--process_id={number}',
  )
  process = subprocess.Popen(
    [sys.executable, '-m', 'vqrae_jax.train', *args.train, *hosts],
    env=env,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    errors='backslashreplace',
    start_new_session=True,  # or Ctrl-C would reach it as SIGINT too
  )
  for lines, out in (process.stdout, sys.stdout), (process.stderr, sys.stderr):
    threading.Thread(target=copy, args=(lines, out, number)).start()
  return process


def copy(lines, out, number: int) -> None:
  for line in lines:
    out.write(f'{number}: {line}')  # one write: no other's line inside
    out.flush()


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--processes', type=int, default=2)
  about = 'CPU devices of each process; without it, what JAX finds'
  parser.add_argument('--devices', type=int, help=about)
  parser.add_argument('train', nargs='+', help='flags of vqrae_jax.train')
  args = parser.parse_args()
  received: list[int] = []
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: received.append(number))
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  processes = [start(i, address, args) for i in range(args.processes)]
  running = processes
  code, asked, deadline = 0, False, float('inf')
  while running:
    time.sleep(0.1)
    failed = [p for p in running if p.poll()]
    if failed and not code:
      first = min(failed, key=lambda p: p.returncode == 75)
      code = first.returncode
      code = code if code > 0 else 128 - code  # a signal, as a shell says it
      if not received:
        number = processes.index(first)
        line = f'process {number} ended with {code}; ending the others'
        print(line, file=sys.stderr)
      deadline = time.time() + GRACE
    running = [p for p in running if p.returncode is None]
    kill = len(received) > 1 or time.time() > deadline
    for process in running:
      if kill:
        process.kill()
      elif (code or received) and not asked:
        process.terminate()
    asked = asked or bool(code or received)
  return code


if __name__ == '__main__':
  sys.exit(main())
