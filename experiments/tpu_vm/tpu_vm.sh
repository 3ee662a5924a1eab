#!/usr/bin/env bash
# A training on a Cloud TPU VM or pod slice: create, launch on all workers, watch, resume after preemption, delete.
# `tpu_vm.sh help` says how, README.md beside this file when and why.
set -euo pipefail

usage() {
  cat <<'HELP'
tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTION…] [-- ARGUMENTS OF dalle_jax.main]

  create   make the TPU VM and wait until it is ready
  launch   install this project on all workers, and start the training there
  watch    follow the log of worker 0 (Ctrl-C ends the watching, not the training)
  resume   keep the training going until it is done: where the TPU was taken away, make it again; where the training is
           not running, start it again, and it goes on from its last checkpoint
  delete   let the training save, then delete the TPU VM; asks first

Every command takes every option, so that one line does for all of them.

  --name=NAME         of the TPU VM
  --zone=ZONE         gcloud compute tpus locations list
  --project=PROJECT   (gcloud's own)
  --type=TYPE         create, resume: v5litepod-16, v5p-128, v6e-64, …; gcloud compute tpus accelerator-types list
  --version=VERSION   the TPU's software (the one for JAX on that type)
  --spot              cheaper; may be taken away at any time
  --queued            wait in Google's queue for a place; without it, create fails where there is none now
  --autocheckpoint    ask for SIGTERM before maintenance (gcloud's alpha commands), so that the training saves
  --repository=URL    launch, resume: what the workers clone
  --commit=COMMIT     a branch, tag or commit of it (main)
  --poll=SECONDS      how often resume and create look (60)
  --yes               do not ask
  --dry-run           print the commands, run none
HELP
}

say() { echo "tpu_vm.sh: $*" >&2; }
fail() {
  say "$@"
  exit 2
}

# -- what is asked for -------------------------------------------------------------------------------------------------

name='' zone='' project='' type='' version='' repository='' commit=main poll=60
spot=false queued=false autocheckpoint=false yes=false dry_run=false
training=()

command=${1:-}
case $command in
  create | launch | watch | resume | delete) shift ;;
  help | --help | -h) usage && exit ;;
  '') usage >&2 && exit 2 ;;
  *) fail "there is no command '$command'; expected create, launch, watch, resume, delete or help" ;;
esac

while [ $# -gt 0 ]; do
  case $1 in
    --) shift && training=("$@") && break ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --repository=*) repository=${1#*=} ;;
    --commit=*) commit=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --spot) spot=true ;;
    --queued) queued=true ;;
    --autocheckpoint) autocheckpoint=true ;;
    --yes) yes=true ;;
    --dry-run) dry_run=true ;;
    --config* | --workdir*) fail "$1 is the training's: write it after ' -- '" ;;
    *) fail "unexpected '$1': options are written --option=VALUE, the training's arguments after ' -- '; see tpu_vm.sh help" ;;
  esac
  shift
done

needs() { # OPTION VALUE EXAMPLE
  [ -n "$2" ] || fail "$command needs --$1, for example --$1=$3"
}

needs name "$name" my-tpu
needs zone "$zone" us-east5-b
[[ $poll =~ ^[0-9]+$ ]] || fail "--poll=$poll: expected whole seconds"

case $command in create | resume)
  needs type "$type" v6e-16
  case $version$type in # (a version given matches none of these)
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v[234]-*) version=tpu-ubuntu2204-base ;;
    "$type") fail "--type=$type is none that this script knows: give its software --version too" ;;
  esac ;;
esac

config='' workdir='' before=''
for argument in ${training[@]+"${training[@]}"}; do
  case $before in --config | --workdir) argument=$before=$argument ;; esac # written as two words
  case $argument in
    --config=*) config=${argument#*=} ;;
    --workdir=*) workdir=${argument#*=} ;;
  esac
  before=$argument
done
case $command in launch | resume)
  needs repository "$repository" https://github.com/YOU/dalle_jax.git
  example='-- --config=configs/prior.py:2.8b --workdir=gs://BUCKET/prior'
  [ -n "$config" ] || fail "$command needs the training's arguments, for example $example"
  if [[ $workdir != gs://* ]]; then
    [ "$command" = launch ] || fail "resume needs a workdir that outlives the TPU VM (given: '$workdir'), for example $example"
    say "warning: --workdir is not on gs://, so the run is lost with the TPU VM, and several workers cannot share it"
  fi ;;
esac

if ! $dry_run && ! type gcloud >/dev/null 2>&1; then
  fail "gcloud is not installed: see https://cloud.google.com/sdk/docs/install, or look first with --dry-run"
fi

# -- gcloud ------------------------------------------------------------------------------------------------------------
# Functions below join their steps by `&&`: `set -e` is off in whatever an `if` calls, and resume has to outlive failures.

where=("--zone=$zone" ${project:+"--project=$project"})
errors=$(mktemp) answers=$(mktemp)
trap 'rm -f "$errors" "$answers"' EXIT

run() { # prints a command as it could be typed, then runs it, within `limit` where its caller has one
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  $dry_run || ${limit[@]+"${limit[@]}"} "$@"
}

tpu() { run gcloud compute tpus tpu-vm "$@" "${where[@]}"; }
workers() { tpu ssh "$name" "--worker=$1" "--command=$2" "${@:3}"; }

# Sets `state`: READY; WAITING, it will change by itself; LOST, it never comes back; STOPPED; ABSENT; or UNKNOWN.
look() {
  if $dry_run; then
    run gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)'
    [[ ${made:-} || $command != resume ]] && state=READY || state=LOST
    say "(dry run: taken to be $state)"
    return
  fi
  if state=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)' 2>"$errors"); then
    case $state in
      READY | STOPPED) ;;
      PREEMPTED | TERMINATED | UNKNOWN) state=LOST ;; # (gcloud's UNKNOWN: after a repair that failed)
      *) state=WAITING ;;
    esac
  elif ! grep -q NOT_FOUND "$errors"; then
    state=UNKNOWN
    say "no answer: $(tail -n 1 "$errors")"
  elif $queued && state=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)' 2>"$errors"); then
    case $state in
      SUSPENDED | FAILED) state=LOST ;;
      *) state=WAITING ;;
    esac
  else
    state=ABSENT
  fi
}

make() {
  local track=() options=("--accelerator-type=$type" "${where[@]}")
  if $spot; then options+=(--spot); fi
  if $autocheckpoint; then track=(alpha) && options+=(--autocheckpoint-enabled); fi
  made=yes
  if $queued; then
    run gcloud ${track[@]+"${track[@]}"} compute tpus queued-resources create "$name" "--node-id=$name" "--runtime-version=$version" "${options[@]}"
  else
    run gcloud ${track[@]+"${track[@]}"} compute tpus tpu-vm create "$name" "--version=$version" "${options[@]}"
  fi
}

remove() {
  if $queued; then # the TPU goes with the request for it
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    tpu delete "$name" --quiet
  fi
}

start() {
  local source arguments
  printf -v source ' %q' "$repository" "$commit"
  printf -v arguments ' %q' "${training[@]}"
  tpu scp "$(dirname "${BASH_SOURCE[0]}")/worker.sh" "$name:" --worker=all &&
    workers all "bash worker.sh setup$source" &&
    workers all "bash worker.sh start$arguments"
}

pause() { $dry_run || sleep "$poll"; }

# -- resume ------------------------------------------------------------------------------------------------------------

going_on='resuming from step' # what dalle_jax.training.loop prints, with "N of M", where there is a checkpoint
patience=${TPU_VM_PATIENCE_SECONDS:-1800}
slowest=${TPU_VM_ANSWER_SECONDS:-300} # for gcloud, the connections, and the 120 s that a worker has
prompt=(--ssh-flag=-oConnectTimeout=60 --ssh-flag=-oServerAliveInterval=30) # a worker that hangs is no answer, soon

# Sets `said` to what the workers answer to a command (without '). False where one does not answer, or not in time.
hear() { # WORKERS COMMAND
  local limit=()
  if type timeout >/dev/null 2>&1; then limit=(timeout -k 10 "$slowest"); fi # macOS may have none
  # In the background: Ctrl-C ends a `wait`, but does not reach what `timeout` runs, and `$(…)` would wait for that.
  workers "$1" "timeout 120 bash -c '$2'" "${prompt[@]}" </dev/null >"$answers" &
  wait $! && said=$(<"$answers")
}

# Sets `job` to what the workers say of the training: done, running, failed, mixed (some of each), over or no answer.
ask() {
  local said
  if ! hear all 'if [ -e worker.sh ]; then bash worker.sh status; else echo worker.sh: none; fi'; then # (none: a new TPU)
    job='no answer'
    return
  fi
  if $dry_run; then
    [[ ${started:-} ]] && job='done' || job=over
    say "(dry run: taken to be $job)"
    return
  fi
  said=$(sed -n 's/^worker\.sh: \([a-z]*\).*/\1/p' <<<"$said" | sort -u | tr '\n' ' ')
  case $said in
    '') job='no answer' ;;
    'done ') job='done' ;;
    'running ') job=running ;;
    *running*) job=mixed ;;
    *failed*) job=failed ;;
    *) job=over ;; # saved and stopped, or killed
  esac
}

# Sets `begun` to the step from which the run on the workers went on, as "6 of 12"; empty where it is the first.
ask_begun() {
  local said
  hear 0 "grep -a -s -o \"$going_on [0-9]* of [0-9]*\" dalle_jax_run/log | tail -n 1" || return
  begun=$(sed -n "s/^$going_on //p" <<<"$said")
}

resume() {
  local failures=0 begun='' failed_from='' before='' seen said silent='' # since when not all answer, in SECONDS
  while true; do
    look
    seen=$state
    case $state in READY | UNKNOWN) ;; *) silent='' ;; esac
    case $state in
      ABSENT) make || say "it could not be made now" ;;
      LOST)
        failures=0
        { remove && make; } || say "it could not be made again now" ;;
      STOPPED) fail "$name was stopped by someone: gcloud compute tpus tpu-vm start $name ${where[*]}, or delete it" ;;
      READY)
        ask
        seen="READY, $job"
        # The others notice a lost worker within their own time-out; what is still mixed a look later has failed.
        if [ "$job" = mixed ] && [ "$before" != "$seen" ]; then job=running; fi
        case $job in failed | mixed) ask_begun || job='no answer' ;; esac
        if [ "$job" != 'no answer' ]; then silent=''; fi
        case $job in
          'done')
            say "the training is done: $workdir"
            return ;;
          running) ;;
          'no answer')
            silent=${silent:-$SECONDS}
            if [ $((SECONDS - silent)) -ge "$patience" ]; then
              say "$name is READY, but a worker has not answered for $patience s; see what it says to" \
                "gcloud compute tpus tpu-vm ssh $name --worker=all --command='bash worker.sh status' ${where[*]}" \
                "(keys: ssh-add ~/.ssh/google_compute_engine); where it hangs, delete, then resume makes it again"
              exit 1
            fi ;;
          *)
            case $job in failed | mixed) # what fails again from a newer checkpoint has got on in between
              if [ "$begun" != "$failed_from" ]; then failures=0; fi
              failed_from=$begun failures=$((failures + 1)) ;;
            esac
            if [ $failures -ge 3 ]; then
              if hear 0 "tail -n 20 dalle_jax_run/log"; then echo "$said"; fi
              say "the training failed three times in a row from ${begun:+step }${begun:-the beginning};" \
                "the log of worker 0 ends as above"
              exit 1
            fi
            if start; then started=yes; else say "it could not be started now"; fi ;;
        esac ;;
    esac
    if [ "$seen" != "$before" ]; then say "$(date '+%F %T') $seen"; fi
    before=$seen
    pause
  done
}

# -- the commands ------------------------------------------------------------------------------------------------------

case $command in
  create)
    make
    until look && [ "$state" = READY ]; do
      if [ "$state" = LOST ]; then fail "Google gave the request up: delete it, and create again"; fi
      say "$state; looking again in $poll s"
      pause
    done
    say "ready; next: launch" ;;
  launch)
    start
    say "started; next: watch, and resume to keep it going" ;;
  watch)
    if [ -n "$workdir" ]; then say "curves: tensorboard --logdir=$workdir/tensorboard"; fi
    workers 0 "tail -n 50 -F dalle_jax_run/log" --ssh-flag=-t ;;
  resume) resume ;;
  delete)
    if ! $yes && ! $dry_run; then
      [ -t 0 ] || fail "delete asks before it deletes, and there is nobody to ask: add --yes"
      read -r -p "Delete $name in $zone? What is not on gs:// is lost. Type its name: " answer
      [ "$answer" = "$name" ] || fail "not deleted"
    fi
    look
    if [ "$state" = READY ]; then
      workers all "[ ! -e worker.sh ] || bash worker.sh stop" || say "the training could not be stopped; deleting all the same"
    fi
    remove ;;
esac
