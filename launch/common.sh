# shellcheck shell=bash
# What the launch scripts share: arguments, --dry-run, errors in one sentence. Sourced, not run.
set -euo pipefail

declare -A option=()   # --name VALUE of the command line, by name; a switch is 'true'
declare -a arguments=() # what stands after --
dry=false

# The script's header is its usage.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# fail SENTENCE: ends with 2, bad usage.
fail() {
  echo "$(basename "$0"): $* (--help says more)" >&2
  exit 2
}

say() {
  echo "$(basename "$0"): $*" >&2
}

# quoted WORD...: the words as the shell reads them, quoted where they must be.
quoted() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line:1}"
}

# run COMMAND...: runs it; prints it in a dry run.
run() {
  if $dry; then
    quoted "$@"
  else
    "$@"
  fi
}

# parse 'VALUES' 'SWITCHES' ARGUMENT...: fills option and arguments. --dry-run and --help are understood everywhere.
parse() {
  local values=" $1 " switches=" $2 " name value
  shift 2
  while (($#)); do
    case $1 in
      --) shift; arguments=("$@"); return ;;
      -h | --help) usage; exit 0 ;;
      --dry-run) dry=true; shift; continue ;;
      --*) name=${1#--} ;;
      *) fail "unexpected argument '$1'; arguments of elastic train stand after --" ;;
    esac
    if [[ $name == *=* ]]; then
      value=${name#*=} name=${name%%=*}
      [[ $values == *" $name "* ]] || fail "unknown option --$name"
    elif [[ $switches == *" $name "* ]]; then
      value=true
    elif [[ $values == *" $name "* ]]; then
      (($# > 1)) || fail "--$name needs a value"
      value=$2
      shift
    else
      fail "unknown option --$name"
    fi
    option[$name]=$value
    shift
  done
}

# need NAME...: these options must have been given.
need() {
  local name
  for name in "$@"; do
    [[ -n ${option[$name]:-} ]] || fail "--$name is missing"
  done
}

# given NAME...: sets `flags` to --NAME=VALUE of those that were given.
given() {
  local name
  flags=()
  for name in "$@"; do
    if [[ ${option[$name]:-} == true ]]; then
      flags+=("--$name")
    elif [[ -n ${option[$name]:-} ]]; then
      flags+=("--$name=${option[$name]}")
    fi
  done
}

# training: sets `train` to the arguments of elastic train: those after --, with the workdir and the compilation cache in
# --bucket where they are not among them.
training() {
  local all=" ${arguments[*]} "
  [[ $all == *" --config"[\ =]* ]] || fail 'the arguments of elastic train are missing: -- --config FILE'
  train=("${arguments[@]}")
  [[ $all == *" --workdir"[\ =]* ]] || { need bucket name; train+=("--workdir=gs://${option[bucket]#gs://}/${option[name]}"); }
  if [[ -n ${option[bucket]:-} && $all != *' --config.compilation_cache'* ]]; then
    train+=("--config.compilation_cache=gs://${option[bucket]#gs://}/compilation_cache")
  fi
}
