#!/usr/bin/env bash
# Trains on a Cloud TPU slice: one process on each of its hosts, over ssh.
#
# usage: launch/tpu_vm.sh ACTION --name NAME --project PROJECT --zone ZONE [OPTIONS] [--dry-run] [-- ARGUMENTS]
#
# ACTION
#   create   the slice: --type v5p-128 --image v2-alpha-tpuv5 [--spot] [--network N] [--subnetwork S] [--service-account A]
#   copy     the last commit of this checkout (of a folder that is no git checkout: what `elastic` needs of it) to all hosts,
#            and installs it in a new virtual environment
#   run      starts `elastic train ARGUMENTS` on all hosts; it goes on when this terminal closes. With --bucket BUCKET,
#            --workdir is gs://BUCKET/NAME, and compiled programs are cached in gs://BUCKET/compilation_cache
#   status   a line of each host: idle, running, finished, stopped (saved), failed N
#   logs     follows the log of one host: [--worker 0]
#   stop     SIGTERM on all hosts: all save at the same step and end; `run` with the same arguments goes on
#   delete   the slice, with all that is on its disks
#   state    of the slice, as the service has it: READY, PREEMPTED, … or ABSENT
#
# --type is the accelerator type, which counts cores on v4 and v5p (v5p-128 is 64 chips); --image is the TPU software version.
# --dry-run prints the commands and runs none.
#
# example: launch/tpu_vm.sh create --name star --project my-project --zone us-east5-a --type v5p-128 --image v2-alpha-tpuv5
#          launch/tpu_vm.sh copy --name star --project my-project --zone us-east5-a
#          launch/tpu_vm.sh run --name star --project my-project --zone us-east5-a --bucket my-bucket -- --config experiments/…
here=$(dirname "$0")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

readonly folder=elastic_jax # on every host, in the home directory

vm() {
  local verb=$1 flags
  shift
  given project zone
  run gcloud compute tpus tpu-vm "$verb" "$@" "${flags[@]}" --quiet
}

# on WORKER COMMAND: runs a shell command on one host, or on `all`.
on() {
  vm ssh "${option[name]}" --worker="$1" --command="$2"
}

create() {
  need type image
  local flags
  given spot network subnetwork service-account
  vm create "${option[name]}" --accelerator-type="${option[type]}" --version="${option[image]}" "${flags[@]}"
}

copy() {
  local name=elastic_jax.tar.gz archive=${TMPDIR:-/tmp}/elastic_jax.$$.tar.gz
  if [[ -e $here/../.git ]]; then
    run git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD
  else
    run tar -czf "$archive" -C "$here/.." --exclude=__pycache__ setup.cfg pyproject.toml README.md LICENSE elastic_jax experiments launch
  fi
  trap 'rm -f "${TMPDIR:-/tmp}/elastic_jax.$$.tar.gz"' EXIT
  vm scp "$archive" "${option[name]}:$name" --worker=all
  # The Python of most images is too old: uv brings one.
  on all "rm -rf $folder && mkdir $folder && tar -xzf $name -C $folder && python3 -m pip install --quiet --user uv && \
python3 -m uv venv --quiet --clear --python 3.12 elastic_venv && \
python3 -m uv pip install --quiet --python elastic_venv/bin/python -e './${folder}[tpu]'"
}

start() {
  local train flags again
  training
  given name project zone bucket
  # What the run's parent process says to run again where one was lost.
  again="launch/tpu_vm.sh run $(quoted "${flags[@]}" -- "${arguments[@]}")"
  on all "ELASTIC_RERUN=${again@Q} $folder/launch/host.sh start $(quoted "${train[@]}")"
}

# The service's word for the slice. Only an answer that there is none means that there is none.
state() {
  local answer
  if $dry; then
    vm describe "${option[name]}" --format='value(state)'
  elif answer=$(vm describe "${option[name]}" --format='value(state)' 2>&1); then
    echo "$answer"
  elif [[ $answer == *NOT_FOUND* || $answer == *'not found'* ]]; then
    echo ABSENT
  else
    say "the service did not answer: $answer"
    exit 1
  fi
}

action=${1:-}
[[ -z $action || $action == -h || $action == --help ]] && { usage; exit $((${#action} ? 0 : 2)); }
shift
parse 'name project zone type image network subnetwork service-account bucket worker' 'spot' "$@"
[[ $action =~ ^(create|copy|run|status|logs|stop|delete|state)$ ]] || fail "unknown action '$action'"
need name project zone
case $action in
  create) create ;;
  copy) copy ;;
  run) start ;;
  status | stop) on all "$folder/launch/host.sh $action" ;;
  logs) on "${option[worker]:-0}" "$folder/launch/host.sh logs" ;;
  delete) vm delete "${option[name]}" ;;
  state) state ;;
esac
