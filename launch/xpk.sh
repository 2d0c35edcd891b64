#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that xpk made; the hosts of all slices are one run.
#
# usage: launch/xpk.sh ACTION --name NAME --project PROJECT --zone ZONE --cluster CLUSTER [OPTIONS] [--dry-run] [-- ARGUMENTS]
#
# ACTION
#   run      `elastic train ARGUMENTS`: --type v5p-128 --image IMAGE [--slices 1] [--restarts 10] [--bucket BUCKET]
#            With --bucket BUCKET, --workdir is gs://BUCKET/NAME, and compiled programs are cached in gs://BUCKET
#   status   of the cluster's runs
#   logs     follows the log of process 0 (kubectl, whose context xpk has set)
#   delete   the run; its hosts get SIGTERM and five minutes to save
#
# --image is a container image with this package (launch/Dockerfile). Lost hosts and preempted slices: the run starts again by
# itself, up to --restarts times, and goes on from its last checkpoint. --dry-run prints the commands and runs none.
#
# example: launch/xpk.sh run --name star --project my-project --zone us-east5-a --cluster pods --type v5p-128 --slices 2 \
#            --image REGISTRY/elastic_jax --bucket my-bucket -- --config experiments/star_elastic_nano_v3.py
here=$(dirname "$0")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

create() {
  need type image
  local train
  training
  # Kubernetes starts again what exits with 42 or was killed; 1 is a run that lost a process.
  run xpk workload create --workload="${option[name]}" "${place[@]}" --tpu-type="${option[type]}" \
    --num-slices="${option[slices]:-1}" --docker-image="${option[image]}" --max-restarts="${option[restarts]:-10}" \
    --restart-on-exit-codes=1 --termination-grace-period-seconds=300 \
    --command="python -m elastic_jax train $(quoted "${train[@]}")"
}

action=${1:-}
[[ -z $action || $action == -h || $action == --help ]] && { usage; exit $((${#action} ? 0 : 2)); }
shift
parse 'name project zone cluster type image slices restarts bucket' '' "$@"
[[ $action =~ ^(run|status|logs|delete)$ ]] || fail "unknown action '$action'"
need name project zone cluster
place=(--cluster="${option[cluster]}" --project="${option[project]}" --zone="${option[zone]}")
case $action in
  run) create ;;
  status) run xpk workload list "${place[@]}" ;;
  logs)
    first="jobset.sigs.k8s.io/jobset-name=${option[name]},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    run kubectl logs --follow --selector="$first" --tail=100
    ;;
  delete) run xpk workload delete --workload="${option[name]}" "${place[@]}" ;;
esac
