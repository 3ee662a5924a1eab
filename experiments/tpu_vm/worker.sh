#!/usr/bin/env bash
# Runs on each worker, in the home directory, called by tpu_vm.sh. All workers run the same, because JAX finds the others.
#
#   worker.sh setup REPOSITORY COMMIT   clone or update the project, and install it with its TPU extra
#   worker.sh start ARGUMENTS…          start python -m dalle_jax.main ARGUMENTS… in the background; stop an earlier one
#   worker.sh status                    print running, done, stopped (saved, can resume), killed, failed, or none
#   worker.sh stop                      send SIGTERM, which saves, and wait for the end. After ten minutes kill the
#                                       training with its data workers
#
# Files: dalle_jax/ (the clone), dalle_jax_venv/, dalle_jax_run/log (of this start), log.before, pid, exit.
set -euo pipefail
cd

run=dalle_jax_run
resumes='the same command resumes the run' # printed by dalle_jax.training.run after a stop signal and a save

say() { echo "worker.sh: $*"; }

is_running() { # checks the command too, because process ids are reused after a restart of the machine
  [ -e $run/pid ] && grep -q -s -a dalle_jax.main "/proc/$(cat $run/pid)/cmdline"
}

newer_python() { # prints an interpreter that this project supports, or nothing
  local each
  for each in python3.13 python3.12 python3.11 python3; do
    if "$each" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$each"
      return
    fi
  done
}

setup() {
  local repository=$1 commit=$2 python
  [ -d dalle_jax ] || git clone --quiet "$repository" dalle_jax
  git -C dalle_jax remote set-url origin "$repository"
  git -C dalle_jax fetch --quiet --tags --force origin
  git -C dalle_jax checkout --quiet --detach "origin/$commit" 2>/dev/null ||
    git -C dalle_jax checkout --quiet --detach "$commit"
  if [ ! -x dalle_jax_venv/bin/python ]; then
    python=$(newer_python)
    if [ -n "$python" ]; then
      "$python" -m venv dalle_jax_venv
    else # the TPU images have Python 3.10
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --seed --python 3.12 dalle_jax_venv
    fi
  fi
  dalle_jax_venv/bin/python -m pip install --quiet --editable 'dalle_jax[tpu]'
  say "set up: $(git -C dalle_jax rev-parse --short HEAD)"
}

start() {
  if is_running; then stop; fi
  mkdir -p $run
  rm -f $run/exit $run/pid
  if [ -e $run/log ]; then mv $run/log $run/log.before; fi
  echo "$(date '+%F %T') $(hostname): python -m dalle_jax.main $*" >$run/log
  setsid nohup bash "$(realpath "${BASH_SOURCE[0]}")" wait_for "$@" </dev/null >>$run/log 2>&1 &
  for _ in {1..300}; do # 30 s
    if [ -e $run/pid ] || ! kill -0 $! 2>/dev/null; then break; fi
    sleep 0.1
  done
  if [ ! -e $run/pid ]; then
    say "the training did not start; the end of ~/$run/log:" >&2
    tail -n 5 $run/log >&2
    exit 1
  fi
  say "started"
}

wait_for() { # background part of start: runs the training and stores its exit status
  local code=0
  trap : TERM # a shutdown sends SIGTERM to all processes: the training saves, and this function waits for it
  cd dalle_jax
  # The training leads its own process group. It does not start unless the file with its id is written.
  # shellcheck disable=SC2016  # variables of the inner shell
  setsid bash -c 'echo $$ >"$0.new" && mv "$0.new" "$0" && exec "$@"' ../$run/pid \
    ../dalle_jax_venv/bin/python -u -m dalle_jax.main "$@" &
  while true; do
    wait $! && code=0 || code=$?
    kill -0 $! 2>/dev/null || break
  done
  kill -KILL -- "-$!" 2>/dev/null || true # data workers that outlive it would block the TPU or the memory for the next training
  echo $code >../$run/exit
}

status() {
  if is_running; then
    say running
  elif [ ! -e $run/pid ]; then
    say none
  elif [ ! -e $run/exit ]; then
    say killed
  elif [ "$(cat $run/exit)" != 0 ]; then
    say "failed, status $(cat $run/exit)"
  elif grep -q "$resumes" $run/log; then
    say stopped
  else
    say 'done'
  fi
}

stop() {
  local seconds=${WORKER_STOP_SECONDS:-600} # a large checkpoint takes long
  if ! is_running; then return; fi
  kill -TERM "$(cat $run/pid)"
  until ! is_running; do
    if [ "$((seconds--))" -le 0 ]; then
      kill -KILL -- "-$(cat $run/pid)" || true # the whole group
      break
    fi
    sleep 1
  done
  for _ in {1..50}; do # wait_for writes it next, unless it was killed too
    [ ! -e $run/exit ] || break
    sleep 0.1
  done
  status
}

case ${1:-} in
  setup | start | status | stop | wait_for) "$@" ;;
  *)
    echo "worker.sh: expected setup, start, status or stop, not '${1:-}'" >&2
    exit 2 ;;
esac
