#!/usr/bin/env bash
# Run one `tav` command on all workers of a TPU VM. The command continues if the connection breaks.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
launch/run.sh --zone=us-west4-a [--name=tav] [--project=ID] [--dry-run] -- train --config=… --workdir=gs://…
launch/run.sh --zone=us-west4-a [--name=tav] --log=follow

Starts `tav …` on all workers, each with its log in ~/tav.log, and returns. The same line again continues the run.
  --log=follow   follow the log of worker 0
  --log=all      print the end of the logs of all workers
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
  *) fail "--log is '$LOG'; it must be follow or all" ;;
esac
[ ${#REST[@]} -gt 0 ] || fail "there is no command; give it after --, for example -- train --workdir=gs://bucket/run"
for word in "${REST[@]}"; do
  case $word in
    --workdir=gs://*) ;;
    --workdir=*) fail "$word is on the disk of one worker; a run on a TPU VM needs a bucket, --workdir=gs://…" ;;
  esac
done
COMMAND="export PATH=\$HOME/tav_jax_env/bin:\$PATH; nohup tav $(quoted "${REST[@]}")>tav.log 2>&1 </dev/null &"
tpus tpu-vm ssh "$NAME" --worker=all --command="$COMMAND"
echo "Started. To follow the log: launch/run.sh --name=$NAME --zone=$ZONE --log=follow" >&2
