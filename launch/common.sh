# shellcheck shell=bash disable=SC2034 # the variables are used by the scripts that source this file
# Shared by the scripts here: options, checks, and `run`, which prints a command under --dry-run and executes it otherwise.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NAME=tav ZONE="" TYPE="" PROJECT="" SPOT="" DRY_RUN="" REST=()
MACHINE=() # options of gcloud for a new TPU VM

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# Options precede `--`, as --name=ski or --name ski. The words after `--` are the `tav` command.
options() {
  while [ $# -gt 0 ]; do
    local option=$1 value=""
    shift
    case $option in
      --) REST=("$@"); break ;;
      --dry-run) DRY_RUN=yes; continue ;;
      --spot) SPOT=yes; continue ;;
      --reserved) MACHINE+=(--reserved); continue ;;
      --help | -h) usage; exit 0 ;;
      --*=*) value=${option#*=} option=${option%%=*} ;;
      --*) [ $# -gt 0 ] || fail "$option needs a value"; value=$1; shift ;;
      *) fail "$option is not an option; --help lists them" ;;
    esac
    case $option in
      --name) NAME=$value ;;
      --zone) ZONE=$value ;;
      --type) TYPE=$value ;;
      --project) PROJECT=$value ;;
      --network | --subnetwork | --service-account) MACHINE+=("$option=$value") ;;
      *) more_options "$option" "$value" || fail "$option is not an option; --help lists them" ;;
    esac
  done
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    fail "--name is '$NAME'; use lower-case letters, digits and dashes, beginning with a letter"
}

more_options() { return 1; }

need_zone() {
  [ -n "$ZONE" ] || fail "--zone is missing; for example --zone=us-west4-a (gcloud compute tpus locations list)"
}

# Google's accelerator type and runtime version from the short name (v5e-8).
need_type() {
  local chips=${TYPE##*-} kind=${TYPE%-*}
  [ -n "$TYPE" ] || fail "--type is missing; one of v4-N, v5e-N, v5p-N, v6e-N, for example --type=v5e-8"
  [[ $chips =~ ^[1-9][0-9]*$ ]] || fail "--type is '$TYPE'; it must end in a number of chips, for example v5e-8"
  case $kind in
    v4) RUNTIME=tpu-ubuntu2204-base ACCELERATOR=v4-$chips ;;
    v5e | v5litepod) RUNTIME=v2-alpha-tpuv5-lite ACCELERATOR=v5litepod-$chips ;;
    v5p) RUNTIME=v2-alpha-tpuv5 ACCELERATOR=v5p-$chips ;;
    v6e) RUNTIME=v2-alpha-tpuv6e ACCELERATOR=v6e-$chips ;;
    *) fail "--type is '$TYPE'; one of v4-N, v5e-N, v5p-N, v6e-N, for example v5e-8" ;;
  esac
}

need_gcloud() {
  [ -n "$DRY_RUN" ] || command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
}

run() {
  if [ -n "$DRY_RUN" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpus() {
  local area=$1 verb=$2
  shift 2
  run gcloud compute tpus "$area" "$verb" "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}

# The words as one line that a shell parses back to the same words.
quoted() {
  printf '%q ' "$@"
}

# Write an archive of this checkout that pip can install.
pack() {
  run git -C "$HERE/.." archive --format=tar.gz --prefix=tav_jax/ --output="$1" HEAD
}
