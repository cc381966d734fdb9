#!/usr/bin/env bash
# Run one `tav` command on all workers of a TPU VM. It goes on when the connection breaks.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
launch/run.sh --zone=us-west4-a [--name=tav] [--project=ID] [--dry-run] -- train --config=… --workdir=gs://…
launch/run.sh --zone=us-west4-a [--name=tav] --log=follow

Starts `tav …` on all workers, each writing ~/tav.log, and comes back at once; the same line again continues the run.
  --log=follow   show the first worker's log as it grows, --log=all the end of every worker's
TEXT
}

LOG=""
more_options() {
  [ "$1" = --log ] && LOG=$2
}

options "$@"
need_zone
need_gcloud

case $LOG in
  follow) tpus tpu-vm ssh "$NAME" --worker=0 --command="tail -n 50 -F tav.log"; exit ;;
  all) tpus tpu-vm ssh "$NAME" --worker=all --command="tail -n 20 tav.log"; exit ;;
  "") ;;
  *) fail "--log is '$LOG'; it is follow or all" ;;
esac
[ ${#REST[@]} -gt 0 ] || fail "there is no command; give it after --, for example -- train --workdir=gs://bucket/run"
for word in "${REST[@]}"; do
  case $word in
    --workdir=gs://*) ;;
    --workdir=*) fail "$word is a folder of one worker; a run on a TPU VM needs a bucket, --workdir=gs://…" ;;
  esac
done
COMMAND="export PATH=\$HOME/tav_jax_env/bin:\$PATH; nohup tav $(quoted "${REST[@]}")>tav.log 2>&1 </dev/null &"
tpus tpu-vm ssh "$NAME" --worker=all --command="$COMMAND"
echo "Started. To watch it: launch/run.sh --name=$NAME --zone=$ZONE --log=follow" >&2
