#!/usr/bin/env bash
# Trains in several processes on this machine, as on several hosts: for trying out a mesh, a restart, a fault.
#
# usage: launch/local_multiprocess.sh [--processes 2] [--devices 4] [--port PORT] [--python PYTHON] [--dry-run] -- ARGUMENTS
#
# Each process has --devices virtual CPU devices; ARGUMENTS are those of elastic train. Processes meet at localhost:PORT (default: a
# free one). Ctrl-C or SIGTERM lets all of them save at the same step and stop; a second one kills them. When one is lost, the
# others stop, and it is said which one, and what to run. --dry-run prints the command of every process and runs none.
#
# exit status: 0 finished, or saved and stopped; 2 the arguments are wrong; 1 a process was lost or failed
#
# example: launch/local_multiprocess.sh --processes 2 --devices 2 -- --config experiments/quickstart.py:smoke --workdir runs/two
here=$(dirname "$0")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

(($#)) || { usage; exit 2; }
again=$(quoted "$0" "$@")
parse 'processes devices port python bucket name' '' "$@"
training

option[processes]=${option[processes]:-2} option[devices]=${option[devices]:-4}
python=${option[python]:-python3}
given processes devices port
if $dry; then
  flags+=(--dry-run)
fi
export ELASTIC_RERUN=$again
exec "$python" -m elastic_jax.parallel.supervise "${flags[@]}" -- "$python" -m elastic_jax train "${train[@]}"
