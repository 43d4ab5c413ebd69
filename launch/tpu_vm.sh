#!/usr/bin/env bash
# A slice of TPU VMs as a queued resource; every worker runs the same command,
# and the processes find each other by --distributed.
#
#   export NAME=vqrae ZONE=us-central1-a TYPE=v5litepod-64
#   export RUNTIME=v2-alpha-tpuv5-lite   # v5p: TYPE=v5p-128 v2-alpha-tpuv5
#   launch/tpu_vm.sh create [--spot]     # waits until the slice is there
#   launch/tpu_vm.sh install             # what is committed, and its packages
#   launch/tpu_vm.sh train --config=configs/simvq_siglip_l.py \
#     --config.data.source=DATA --workdir=gs://BUCKET/runs/NAME
#   launch/tpu_vm.sh log                 # worker 0's, as it grows
#   launch/tpu_vm.sh stop                # saves; the same train resumes
#   launch/tpu_vm.sh delete
#
# DATA is a path on every worker (`launch/tpu_vm.sh run COMMAND` mounts a bucket
# there, say).
#
# Tried: gcloud 528 parses each line, and a stand-in for the workers runs them
# (tests/test_launch.py). Never on a TPU.
# shellcheck disable=SC2016 # what the workers expand is in single quotes
set -euo pipefail

: "${NAME:?} ${ZONE:?}"
queued=(gcloud compute tpus queued-resources)

run() { # WORKERS COMMAND
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" \
    --command="$2"
}

what=${1:?create, install, train, log, stop, run or delete}
shift
case $what in
  create)
    "${queued[@]}" create "$NAME" --node-id="$NAME" --zone="$ZONE" \
      --accelerator-type="${TYPE:?}" --runtime-version="${RUNTIME:?}" "$@"
    until [[ ${state:=} == ACTIVE ]]; do
      sleep 30
      state=$("${queued[@]}" describe "$NAME" --zone="$ZONE" \
        --format='value(state.state)')
      echo "$NAME: $state"
      [[ $state != FAILED && $state != SUSPENDED ]]
    done
    ;;
  install)
    git archive --prefix=vqrae_jax/ --output=/tmp/vqrae_jax.tar HEAD
    gcloud compute tpus tpu-vm scp /tmp/vqrae_jax.tar "$NAME:" \
      --zone="$ZONE" --worker=all
    # The image has Python 3.10; uv brings a newer one.
    run all 'tar xf vqrae_jax.tar && cd vqrae_jax &&
      python3 -m pip install --quiet --user uv &&
      uv=$HOME/.local/bin/uv && $uv venv --quiet --python=3.11 --clear &&
      $uv pip install --quiet -c constraints.txt ".[tpu]" "etils[epath-gcs]"'
    ;;
  train)
    flags=$(printf '%q ' "$@")
    run all "cd vqrae_jax && { nohup .venv/bin/python -m vqrae_jax.train \
      --distributed $flags >>train.log 2>&1 </dev/null & echo \$! >train.pid; }"
    ;;
  log) run 0 'tail -n 100 -F vqrae_jax/train.log' ;;
  stop) run all 'kill -TERM "$(cat vqrae_jax/train.pid)"' ;;
  run) run all "$*" ;;
  delete) "${queued[@]}" delete "$NAME" --zone="$ZONE" --force --quiet ;;
  *) echo "$0: no \"$what\"" >&2 && exit 2 ;;
esac
