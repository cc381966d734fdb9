#!/usr/bin/env bash
# Run a `tav` command on a TPU slice of a GKE cluster with xpk. The cluster restarts preempted jobs.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
launch/gke.sh --type=v5e-8 --zone=us-west4-a --cluster=NAME --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/tav_jax
              [--name=tav] [--build=yes] [--restarts=100] [--project=ID] [--dry-run] -- train --config=… --workdir=gs://…

  --build      build launch/Dockerfile and push it to --image first
  --restarts   how often the cluster may restart the job: after a preemption, a stop by SIGTERM (status 75), an error that
               is not one of the command line (status 1), or a death of a worker
TEXT
}

CLUSTER="" IMAGE="" BUILD="" RESTARTS=100
more_options() {
  case $1 in
    --cluster) CLUSTER=$2 ;;
    --image) IMAGE=$2 ;;
    --build) BUILD=$2 ;;
    --restarts) RESTARTS=$2 ;;
    *) return 1 ;;
  esac
}

options "$@"
need_type
need_zone
[ -n "$CLUSTER" ] || fail "--cluster is missing; xpk cluster list --zone=$ZONE shows yours"
[ -n "$IMAGE" ] || fail "--image is missing; give the name of the image in a registry, for example us-docker.pkg.dev/project/images/tav_jax"
[[ $RESTARTS =~ ^[0-9]+$ ]] || fail "--restarts is '$RESTARTS'; give a number"
[ ${#REST[@]} -gt 0 ] || fail "there is no command; give it after --, for example -- train --workdir=gs://bucket/run"
if [ -z "$DRY_RUN" ]; then
  command -v xpk >/dev/null || fail "xpk is not installed: pip install xpk"
  [ -z "$BUILD" ] || command -v docker >/dev/null || fail "docker is not installed; --build needs it"
fi

if [ -n "$BUILD" ]; then
  run docker build --tag "$IMAGE" --file "$HERE/Dockerfile" "$HERE/.."
  run docker push "$IMAGE"
fi
run xpk workload create --cluster="$CLUSTER" --workload="$NAME" --tpu-type="$ACCELERATOR" --num-slices=1 \
  --docker-image="$IMAGE" --max-restarts="$RESTARTS" --restart-on-exit-codes=75,1 --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} \
  --command="exec tav $(quoted "${REST[@]}")"
