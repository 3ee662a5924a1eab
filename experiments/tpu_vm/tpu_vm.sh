#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod slice: creates it, launches on all workers, watches, resumes after preemption, deletes.
# `tpu_vm.sh help` lists the options. README.md in this folder explains the steps.
set -euo pipefail

usage() {
  cat <<'HELP'
tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTION…] [-- ARGUMENTS OF dalle_jax.main]

  create   create the TPU VM and wait until it is ready
  launch   install this project on all workers and start the training
  watch    follow the log of worker 0 (Ctrl-C ends this command, not the training)
  resume   keep the training running until it is done: create the TPU VM again after a preemption, and restart the
           training if it has ended early, which resumes from its last checkpoint
  delete   let the training save, then delete the TPU VM, after a confirmation

Every command accepts every option, so that you can use the same options for all commands.

  --name=NAME         name of the TPU VM
  --zone=ZONE         zone, see gcloud compute tpus locations list
  --project=PROJECT   project (default: the one of gcloud)
  --type=TYPE         create, resume: v5litepod-16, v5p-128, v6e-64, …; see gcloud compute tpus accelerator-types list
  --version=VERSION   software of the TPU (default: the one for JAX on that type)
  --spot              cheaper, but may be preempted at any time
  --queued            wait in Google's queue for capacity; without it, create fails if there is none
  --autocheckpoint    request SIGTERM before maintenance, so that the training saves (needs gcloud's alpha commands)
  --repository=URL    launch, resume: repository that the workers clone
  --commit=COMMIT     branch, tag or commit of the repository (default: main)
  --poll=SECONDS      interval at which create and resume check the state (default: 60)
  --yes               do not ask for confirmation
  --dry-run           print the commands without running them
HELP
}

say() { echo "tpu_vm.sh: $*" >&2; }
fail() {
  say "$@"
  exit 2
}

# -- options -----------------------------------------------------------------------------------------------------------

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
    --config* | --workdir*) fail "$1 is an argument of the training: write it after ' -- '" ;;
    *) fail "unexpected '$1': write options as --option=VALUE, and arguments of the training after ' -- '; see tpu_vm.sh help" ;;
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
  case $version$type in # with a given version, no pattern matches
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v[234]-*) version=tpu-ubuntu2204-base ;;
    "$type") fail "--type=$type is unknown to this script: give its software --version too" ;;
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
  [ -n "$config" ] || fail "$command needs the arguments of the training, for example $example"
  if [[ $workdir != gs://* ]]; then
    [ "$command" = launch ] || fail "resume needs a workdir on gs:// (given: '$workdir'), because the TPU VM may be deleted; for example $example"
    say "warning: --workdir is not on gs://, so it is lost with the TPU VM, and several workers cannot share it"
  fi ;;
esac

if ! $dry_run && ! type gcloud >/dev/null 2>&1; then
  fail "gcloud is not installed: see https://cloud.google.com/sdk/docs/install, or try --dry-run"
fi

# -- gcloud ------------------------------------------------------------------------------------------------------------
# The functions below join their steps by `&&`, because `set -e` is off in functions that an `if` calls, and resume must
# survive failures.

where=("--zone=$zone" ${project:+"--project=$project"})
errors=$(mktemp) answers=$(mktemp)
trap 'rm -f "$errors" "$answers"' EXIT

run() { # prints a command in shell syntax, then runs it, with the prefix `limit` if the caller has set one
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  $dry_run || ${limit[@]+"${limit[@]}"} "$@"
}

tpu() { run gcloud compute tpus tpu-vm "$@" "${where[@]}"; }
workers() { tpu ssh "$name" "--worker=$1" "--command=$2" "${@:3}"; }

# Sets `state`: READY; WAITING, which changes without action; LOST, which is final; STOPPED; ABSENT; or UNKNOWN.
look() {
  if $dry_run; then
    run gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)'
    [[ ${created:-} || $command != resume ]] && state=READY || state=LOST
    say "(dry run: assuming $state)"
    return
  fi
  if state=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)' 2>"$errors"); then
    case $state in
      READY | STOPPED) ;;
      PREEMPTED | TERMINATED | UNKNOWN) state=LOST ;; # gcloud says UNKNOWN after a failed repair
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

create() {
  local track=() options=("--accelerator-type=$type" "${where[@]}")
  if $spot; then options+=(--spot); fi
  if $autocheckpoint; then track=(alpha) && options+=(--autocheckpoint-enabled); fi
  created=yes
  if $queued; then
    run gcloud ${track[@]+"${track[@]}"} compute tpus queued-resources create "$name" "--node-id=$name" "--runtime-version=$version" "${options[@]}"
  else
    run gcloud ${track[@]+"${track[@]}"} compute tpus tpu-vm create "$name" "--version=$version" "${options[@]}"
  fi
}

remove() {
  if $queued; then # this deletes the TPU together with the request
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

resuming='resuming from step' # printed by dalle_jax.training.loop at a checkpoint, followed by "N of M"
patience=${TPU_VM_PATIENCE_SECONDS:-1800}
slowest=${TPU_VM_ANSWER_SECONDS:-300} # includes gcloud, the connections, and 120 s for the worker
prompt=(--ssh-flag=-oConnectTimeout=60 --ssh-flag=-oServerAliveInterval=30) # a worker that hangs counts as no answer soon

# Sets `said` to the answers of the workers to a command, which must not contain '. Fails if an answer is missing or late.
hear() { # WORKERS COMMAND
  local limit=()
  if type timeout >/dev/null 2>&1; then limit=(timeout -k 10 "$slowest"); fi # macOS may not have it
  # In the background, because Ctrl-C ends a `wait`, but does not reach the child of `timeout`, for which `$(…)` waits.
  workers "$1" "timeout 120 bash -c '$2'" "${prompt[@]}" </dev/null >"$answers" &
  wait $! && said=$(<"$answers")
}

# Sets `job` to the state of the training: done, running, failed, mixed (differs by worker), over or no answer.
ask() {
  local said
  if ! hear all 'if [ -e worker.sh ]; then bash worker.sh status; else echo worker.sh: none; fi'; then # none: a new TPU
    job='no answer'
    return
  fi
  if $dry_run; then
    [[ ${started:-} ]] && job='done' || job=over
    say "(dry run: assuming $job)"
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

# Sets `begun` to the step from which the training resumed, as "6 of 12", or empty if it started from scratch.
ask_begun() {
  local said
  hear 0 "grep -a -s -o \"$resuming [0-9]* of [0-9]*\" dalle_jax_run/log | tail -n 1" || return
  begun=$(sed -n "s/^$resuming //p" <<<"$said")
}

resume() {
  local failures=0 begun='' failed_from='' before='' seen said silent='' # time since when not all workers answer, in SECONDS
  while true; do
    look
    seen=$state
    case $state in READY | UNKNOWN) ;; *) silent='' ;; esac
    case $state in
      ABSENT) create || say "$name could not be created now" ;;
      LOST)
        failures=0
        { remove && create; } || say "$name could not be created again now" ;;
      STOPPED) fail "$name was stopped by a user. Start it (gcloud compute tpus tpu-vm start $name ${where[*]}) or delete it" ;;
      READY)
        ask
        seen="READY, $job"
        # The other workers notice a lost one within their timeout. A state that stays mixed counts as failed.
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
              say "$name is READY, but a worker has not answered for $patience s. Check the output of" \
                "gcloud compute tpus tpu-vm ssh $name --worker=all --command='bash worker.sh status' ${where[*]}" \
                "(keys: ssh-add ~/.ssh/google_compute_engine). If it hangs, delete $name, then resume creates it again"
              exit 1
            fi ;;
          *)
            case $job in failed | mixed) # a failure after a newer checkpoint means that there was progress
              if [ "$begun" != "$failed_from" ]; then failures=0; fi
              failed_from=$begun failures=$((failures + 1)) ;;
            esac
            if [ $failures -ge 3 ]; then
              if hear 0 "tail -n 20 dalle_jax_run/log"; then echo "$said"; fi
              say "the training failed three times in a row from ${begun:+step }${begun:-the beginning};" \
                "the end of the log of worker 0 is above"
              exit 1
            fi
            if start; then started=yes; else say "the training could not be started now"; fi ;;
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
    create
    until look && [ "$state" = READY ]; do
      if [ "$state" = LOST ]; then fail "Google dropped the request: delete it, then create again"; fi
      say "$state; checking again in $poll s"
      pause
    done
    say "ready; next: launch" ;;
  launch)
    start
    say "started; next: watch, and resume to keep it running" ;;
  watch)
    if [ -n "$workdir" ]; then say "curves: tensorboard --logdir=$workdir/tensorboard"; fi
    workers 0 "tail -n 50 -F dalle_jax_run/log" --ssh-flag=-t ;;
  resume) resume ;;
  delete)
    if ! $yes && ! $dry_run; then
      [ -t 0 ] || fail "delete needs a confirmation, but the input is no terminal: add --yes"
      read -r -p "Delete $name in $zone? All files that are not on gs:// will be lost. Type the name to confirm: " answer
      [ "$answer" = "$name" ] || fail "not deleted"
    fi
    look
    if [ "$state" = READY ]; then
      workers all "[ ! -e worker.sh ] || bash worker.sh stop" || say "the training could not be stopped; deleting anyway"
    fi
    remove ;;
esac
