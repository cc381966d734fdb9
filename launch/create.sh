#!/usr/bin/env bash
# Create a TPU VM (one host or a slice of several) and install tav_jax on every worker.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
launch/create.sh --type=v5e-8 --zone=us-west4-a [--name=tav] [--spot] [--project=ID] [--dry-run]
                 [--reserved] [--network=NAME] [--subnetwork=NAME] [--service-account=EMAIL]

Creates a TPU VM and installs this checkout on all of its workers.
  --type   v4-N, v5e-N, v5p-N or v6e-N
  --spot   cheaper, and may be preempted; launch/queued.sh continues by itself after a preemption
  --reserved, --network, --subnetwork, --service-account   as in `gcloud compute tpus tpu-vm create`
TEXT
}

options "$@"
need_type
need_zone
need_gcloud

tpus tpu-vm create "$NAME" --accelerator-type="$ACCELERATOR" --version="$RUNTIME" ${SPOT:+--spot} "${MACHINE[@]}"
PACKED=$(mktemp -d)/tav_jax.tar.gz
trap 'rm -rf "$(dirname "$PACKED")"' EXIT
pack "$PACKED"
tpus tpu-vm scp "$PACKED" "$HERE/on_vm.sh" "$NAME": --worker=all
tpus tpu-vm ssh "$NAME" --worker=all --command="bash on_vm.sh"
echo "Ready. Next: launch/run.sh --name=$NAME --zone=$ZONE -- train --config=… --workdir=gs://…" >&2
