#!/usr/bin/env bash
# Keeps one host's part of a run; tpu_vm.sh calls it on every host, over ssh.
#
# usage: launch/host.sh start ARGUMENT...    starts `elastic train ARGUMENT...` in the background; it outlives the connection
#        launch/host.sh status               one line: HOST idle | running | finished | stopped | failed N
#        launch/host.sh logs                 follows the log until the run ends
#        launch/host.sh stop                 SIGTERM: all processes save at the same step and end; waits for it
#        launch/host.sh clear                forgets a run that has ended
#
# `stopped`: it was told to stop, and has saved; `failed N`: it ended with N. The same start goes on with either.
# State and log are in $ELASTIC_RUN (default ~/elastic_run), Python in $ELASTIC_PYTHON (default ~/elastic_venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/.."
state=${ELASTIC_RUN:-$HOME/elastic_run}
python=${ELASTIC_PYTHON:-$HOME/elastic_venv/bin/python}
mkdir -p "$state"

# Whether the process that keeps the run is there; after a reboot its number may be another's.
running() {
  [[ -s $state/pid ]] && grep -qs host.sh "/proc/$(<"$state/pid")/cmdline"
}

# Stays with the run, passes SIGTERM on, and leaves the exit status behind.
keep() {
  local child code signalled
  "$python" -m elastic_jax train "$@" >>"$state/log" 2>&1 </dev/null &
  child=$!
  trap 'signalled=true; kill -TERM "$child" 2>/dev/null || true' TERM
  while :; do
    signalled=false code=0
    wait "$child" || code=$?
    $signalled || break # a signal ends `wait` before the child ends
  done
  echo "$code" >"$state/exit"
}

case ${1:-} in
  start)
    shift
    if running; then
      echo "$(hostname) is running already"
      exit 0
    fi
    rm -f "$state/exit"
    date -u '+--- started %FT%TZ' >>"$state/log"
    wc -c <"$state/log" >"$state/from"
    setsid launch/host.sh keep "$@" >/dev/null 2>&1 </dev/null &
    echo $! >"$state/pid"
    echo "$(hostname) started"
    ;;
  keep)
    shift
    keep "$@"
    ;;
  status)
    if running; then
      echo "$(hostname) running"
    elif [[ ! -s $state/exit ]]; then
      # Neither a process nor an exit status: nothing was started, or the machine itself was lost.
      [[ -e $state/pid ]] && echo "$(hostname) failed 137" || echo "$(hostname) idle"
    elif [[ $(<"$state/exit") != 0 ]]; then
      echo "$(hostname) failed $(<"$state/exit")"
    elif tail -c "+$(<"$state/from")" "$state/log" | grep -q 'run the same command to go on'; then
      echo "$(hostname) stopped"
    else
      echo "$(hostname) finished"
    fi
    ;;
  logs)
    if running; then
      tail -n 100 --pid="$(<"$state/pid")" -f "$state/log"
    else
      tail -n 100 "$state/log"
    fi
    ;;
  stop)
    if running; then
      kill -TERM "$(<"$state/pid")"
      while running; do sleep 1; done
    fi
    launch/host.sh status
    ;;
  clear)
    if running; then
      echo "$(hostname) is running: stop it before" >&2
      exit 1
    fi
    rm -rf "$state"
    ;;
  *)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    [[ ${1:-} == --help || ${1:-} == -h ]] || exit 2
    ;;
esac
