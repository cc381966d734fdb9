#!/usr/bin/env bash
# Ask for a TPU slice, run a `tav` command on it when it comes, and ask again whenever it is taken away.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
launch/queued.sh --type=v5e-8 --zone=us-west4-a --bucket=gs://bucket/place [--name=tav] [--spot] [--watch=60]
                 [--project=ID] [--dry-run] -- train --config=… --workdir=gs://…

Google queues the request; when the slice is there, every worker installs this checkout and runs `tav …`. The command is
the VM's startup script, so a VM that restarts goes on by itself. A slice that is taken away for good is asked for again
by this script, which looks every --watch seconds until the run has finished (0: ask once and leave).
  --bucket   where this checkout is put for the workers to fetch, and the mark that the run has finished
TEXT
}

BUCKET="" WATCH=60
more_options() {
  case $1 in
    --bucket) BUCKET=${2%/} ;;
    --watch) WATCH=$2 ;;
    *) return 1 ;;
  esac
}

options "$@"
need_type
need_zone
need_gcloud
[[ $BUCKET == gs://* ]] || fail "--bucket is '$BUCKET'; give a place in a bucket, gs://…"
[[ $WATCH =~ ^[0-9]+$ ]] || fail "--watch is '$WATCH'; give seconds, or 0"
[ ${#REST[@]} -gt 0 ] || fail "there is no command; give it after --, for example -- train --workdir=gs://bucket/run"

SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
FINISHED=$BUCKET/$NAME.finished

# The startup script carries its settings in front.
{
  echo '#!/usr/bin/env bash'
  printf 'export TAV_SOURCE=%q TAV_COMMAND=%q TAV_FINISHED=%q\n' "$BUCKET/$NAME.tar.gz" "$(quoted "${REST[@]}")" "$FINISHED"
  tail -n +2 "$HERE/on_vm.sh"
} >"$SCRATCH/startup.sh"

ask() {
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" ${SPOT:+--spot} --metadata-from-file=startup-script="$SCRATCH/startup.sh"
}

state() {
  tpus queued-resources describe "$NAME" --format="value(state.state)"
}

pack "$SCRATCH/tav_jax.tar.gz"
run gcloud storage cp "$SCRATCH/tav_jax.tar.gz" "$BUCKET/$NAME.tar.gz"
run gcloud storage rm --quiet "$FINISHED" 2>/dev/null || true # of an earlier run of this name
ask
if [ -n "$DRY_RUN" ] || [ "$WATCH" = 0 ]; then
  exit
fi

while sleep "$WATCH"; do
  if gcloud storage ls "$FINISHED" >/dev/null 2>&1; then
    echo "The run has finished." >&2
    tpus queued-resources delete "$NAME" --force --quiet
    exit
  fi
  case $(state) in
    SUSPENDED | FAILED)
      echo "The slice was taken away; asking again." >&2
      tpus queued-resources delete "$NAME" --force --quiet
      ask
      ;;
  esac
done
