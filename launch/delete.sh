#!/usr/bin/env bash
# Delete a TPU VM, or a queued request with its VM. Files in the bucket remain.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
launch/delete.sh --zone=us-west4-a [--name=tav] [--queued=yes] [--project=ID] [--dry-run]
TEXT
}

QUEUED=""
more_options() {
  [ "$1" = --queued ] && QUEUED=$2
}

options "$@"
need_zone
need_gcloud

if [ -n "$QUEUED" ]; then
  tpus queued-resources delete "$NAME" --force --quiet
else
  tpus tpu-vm delete "$NAME" --quiet
fi
