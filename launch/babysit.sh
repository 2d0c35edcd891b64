#!/usr/bin/env bash
# Keeps a run going on a spot slice: makes the slice again when it was preempted, and starts the run where it was saved.
#
# usage: launch/babysit.sh --name NAME --project PROJECT --zone ZONE --type TYPE --image IMAGE --bucket BUCKET
#                          [--every 60] [--restarts 10] [OPTIONS OF tpu_vm.sh create] [--dry-run] -- ARGUMENTS
#
# Every --every seconds it looks at the slice and at the run on it:
#   the slice is not there, or was preempted    delete, create (again and again until there is room), copy, run
#   the run ended before it was finished        run, at most --restarts times without a new slice
#   hosts do not answer five times in a row     delete the slice and make it again
#   the arguments are wrong (exit status 2)     ends with 1: starting again would not help
#   the run is finished                         ends with 0; the slice stays: launch/tpu_vm.sh delete
# It may itself be stopped and started at any time; it keeps nothing. --dry-run prints what a preempted slice brings about.
#
# example: launch/babysit.sh --name star --project my-project --zone us-east5-a --type v5p-512 --image v2-alpha-tpuv5 \
#            --spot --bucket my-bucket -- --config experiments/star_elastic_nano_v3.py
here=$(dirname "$0")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

(($#)) || { usage; exit 2; }
parse 'name project zone type image network subnetwork service-account bucket every restarts' 'spot' "$@"
need name project zone type image
training # the arguments are wrong now rather than in an hour
readonly every=${option[every]:-60} most=${option[restarts]:-10}

# vm ACTION: tpu_vm.sh with the same slice.
vm() {
  local flags action=$1
  case $action in
    create) given name project zone type image network subnetwork service-account spot ;;
    run) given name project zone bucket ;;
    *) given name project zone ;;
  esac
  if $dry; then
    flags+=(--dry-run)
  fi
  "$here/tpu_vm.sh" "$action" "${flags[@]}" -- "${arguments[@]}"
}

# A new slice with the run on it. Fails where there is no room for one, or it is lost on the way; then it is tried again.
renew() {
  say "making the slice ${option[name]}"
  vm create && vm copy && vm run
}

if $dry; then
  for action in state delete create copy run status; do
    vm "$action"
  done
  exit 0
fi

silent=0 restarts=0
while :; do
  slice=$(vm state) || slice=UNKNOWN
  case $slice in
    UNKNOWN | CREATING | STARTING | RESTARTING | REPAIRING | DELETING) ;; # it will be something else soon
    ABSENT)
      renew || say "that did not work; again in $every s"
      silent=0 restarts=0
      ;;
    READY)
      if hosts=$(vm status); then
        silent=0
      else
        hosts=''
      fi
      kinds=" $(awk '{print $2}' <<<"$hosts" | sort -u | xargs) "
      if [[ $hosts =~ 'failed 2'($|$'\n') ]]; then
        say "the arguments of elastic train are wrong; launch/tpu_vm.sh logs says how"
        exit 1
      elif [[ -z $hosts ]]; then
        say "hosts do not answer ($((++silent)) of 5)"
        ((silent < 5)) || vm delete || true
      elif [[ $kinds == ' finished ' ]]; then
        say 'the run is finished'
        exit 0
      elif [[ $kinds == *' running '* ]]; then
        : # also while others have ended already: these will within a minute
      elif ((restarts >= most)); then
        say "the run ended $((restarts + 1)) times on this slice: $kinds; launch/tpu_vm.sh logs says why"
        exit 1
      else
        say "the run ended ($kinds): start $((++restarts)) of $most"
        if [[ $kinds == *' idle '* ]]; then
          vm copy || continue
        fi
        vm run || say "that did not work; again in $every s"
      fi
      ;;
    *)
      say "the slice is $slice: it is made again"
      vm delete || true
      continue
      ;;
  esac
  sleep "$every"
done
