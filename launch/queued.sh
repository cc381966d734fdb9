#!/usr/bin/env bash
# Request a TPU slice, run a `tav` command on it when it is allocated, and request it again when it is preempted.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
launch/queued.sh --type=v5e-8 --zone=us-west4-a --bucket=gs://bucket/directory [--name=tav] [--spot] [--watch=60]
                 [--hours=24] [--reserved] [--network=NAME] [--subnetwork=NAME] [--service-account=EMAIL]
                 [--project=ID] [--dry-run] -- train --config=… --workdir=gs://…

Google queues the request. When the slice is allocated, every worker installs this checkout and runs `tav …`. The command
is the VM's startup script, so a VM that restarts continues the run. If the slice is suspended or fails, this script
requests it again. It checks every --watch seconds until the run has finished or failed (0: request once and exit), and
then deletes the slice.
  --bucket   directory in a bucket for the archive of this checkout, and for the log, NAME.finished or NAME.failed
  --hours    the most hours of an allocated slice, all together, after which it is deleted
  --reserved, --network, --subnetwork, --service-account   as in `gcloud compute tpus queued-resources create`
TEXT
}

BUCKET="" WATCH=60 HOURS=24
more_options() {
  case $1 in
    --bucket) BUCKET=${2%/} ;;
    --watch) WATCH=$2 ;;
    --hours) HOURS=$2 ;;
    *) return 1 ;;
  esac
}

options "$@"
need_type
need_zone
need_gcloud
[[ $BUCKET == gs://* ]] || fail "--bucket is '$BUCKET'; give a directory in a bucket, gs://…"
[[ $WATCH =~ ^[0-9]+$ ]] || fail "--watch is '$WATCH'; give seconds, or 0"
[[ $HOURS =~ ^[1-9][0-9]*$ ]] || fail "--hours is '$HOURS'; give a whole number of hours"
[ ${#REST[@]} -gt 0 ] || fail "there is no command; give it after --, for example -- train --workdir=gs://bucket/run"

SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
FINISHED=$BUCKET/$NAME.finished FAILED=$BUCKET/$NAME.failed

# The startup script begins with its settings.
{
  echo '#!/usr/bin/env bash'
  printf 'export TAV_SOURCE=%q TAV_COMMAND=%q\n' "$BUCKET/$NAME.tar.gz" "$(quoted "${REST[@]}")"
  printf 'export TAV_FINISHED=%q TAV_FAILED=%q\n' "$FINISHED" "$FAILED"
  tail -n +2 "$HERE/on_vm.sh"
} >"$SCRATCH/startup.sh"

request() {
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" ${SPOT:+--spot} "${MACHINE[@]}" --metadata-from-file=startup-script="$SCRATCH/startup.sh"
}

state() {
  tpus queued-resources describe "$NAME" --format="value(state.state)"
}

pack "$SCRATCH/tav_jax.tar.gz"
run gcloud storage cp "$SCRATCH/tav_jax.tar.gz" "$BUCKET/$NAME.tar.gz"
run gcloud storage rm --quiet "$FINISHED" "$FAILED" 2>/dev/null || true # from an earlier run of this name
request
if [ -n "$DRY_RUN" ] || [ "$WATCH" = 0 ]; then
  exit
fi

stop() {
  echo "$*" >&2
  tpus queued-resources delete "$NAME" --force --quiet
}

SECONDS_LEFT=$((HOURS * 3600))
while sleep "$WATCH"; do
  if gcloud storage ls "$FINISHED" >/dev/null 2>&1; then
    stop "The run has finished. Its log is $FINISHED."
    exit
  fi
  if gcloud storage ls "$FAILED" >/dev/null 2>&1; then
    stop "The run has failed. Its log is $FAILED, which ends with:"
    gcloud storage cat "$FAILED" | tail -n 20 >&2
    exit 1
  fi
  case $(state) in
    ACTIVE)
      SECONDS_LEFT=$((SECONDS_LEFT - WATCH))
      if [ "$SECONDS_LEFT" -le 0 ]; then
        stop "The slice was allocated for $HOURS h and the run has not finished; the same line continues it."
        exit 1
      fi
      ;;
    SUSPENDED | FAILED)
      stop "The slice was preempted; requesting it again."
      request
      ;;
  esac
done
