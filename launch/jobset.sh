#!/usr/bin/env bash
# Trains on TPU slices of any GKE cluster that has JobSet: fills in launch/jobset.yaml and hands it to kubectl.
#
# usage: launch/jobset.sh ACTION --name NAME [OPTIONS] [--dry-run] [-- ARGUMENTS]
#
# ACTION
#   run      `elastic train ARGUMENTS`: --image IMAGE [--accelerator tpu-v5p-slice] [--topology 4x4x4] [--hosts 16] [--chips 4]
#            [--slices 1] [--restarts 10] [--bucket BUCKET]
#            With --bucket BUCKET, --workdir is gs://BUCKET/NAME, and compiled programs are cached in gs://BUCKET
#   status   of the run and its pods
#   logs     follows the log of process 0
#   delete   the run; its hosts get SIGTERM and five minutes to save
#
# --hosts are those of one slice, --chips those of one host: hosts x chips is what the topology has. The cluster is the one of
# kubectl's context: gcloud container clusters get-credentials CLUSTER --project PROJECT --zone ZONE.
# --image is a container image with this package (launch/Dockerfile). --dry-run prints the commands and runs none.
#
# example: launch/jobset.sh run --name star --image REGISTRY/elastic_jax --topology 4x4x8 --hosts 32 --bucket my-bucket \
#            -- --config experiments/star_elastic_nano_v3.py
here=$(dirname "$0")
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

# The manifest with the given options in the lines that are marked with them.
manifest() {
  local line mark value list='' word
  for word in "${train[@]}"; do
    list+=", '${word//\'/\'\'}'"
  done
  while IFS= read -r line; do
    if [[ $line =~ ^(.*[a-z]:)\ .*\ '#'\ --([a-z]*)$ ]]; then
      mark=${BASH_REMATCH[2]} value=${option[${BASH_REMATCH[2]:-none}]:-}
      [[ -z $mark ]] && value="[${list:2}]"
      [[ -n $value ]] && line="${BASH_REMATCH[1]} $value"
    fi
    [[ $line == '#'* ]] || printf '%s\n' "$line"
  done <"$here/jobset.yaml"
}

create() {
  need image
  local train
  training
  if $dry; then
    printf "kubectl apply --filename=- <<'EOF'\n%s\nEOF\n" "$(manifest)"
  else
    manifest | kubectl apply --filename=-
  fi
}

action=${1:-}
[[ -z $action || $action == -h || $action == --help ]] && { usage; exit $((${#action} ? 0 : 2)); }
shift
parse 'name image accelerator topology hosts chips slices restarts bucket' '' "$@"
[[ $action =~ ^(run|status|logs|delete)$ ]] || fail "unknown action '$action'"
need name
readonly pods=jobset.sigs.k8s.io/jobset-name=${option[name]}
case $action in
  run) create ;;
  status) run kubectl get jobset "${option[name]}" && run kubectl get pods --selector="$pods" --output=wide ;;
  logs)
    first=$pods,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
    run kubectl logs --follow --selector="$first" --tail=100
    ;;
  delete) run kubectl delete jobset "${option[name]}" ;;
esac
