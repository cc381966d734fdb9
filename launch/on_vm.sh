#!/usr/bin/env bash
# Runs on a TPU VM: installs tav_jax with its own Python (the VM's is too old), and runs one `tav` command.
# As a startup script it runs at every boot, so that a run continues after a preemption.
#
#   TAV_SOURCE    an archive of the checkout, local or in a bucket, or any pip requirement
#   TAV_COMMAND   the arguments of `tav`, as one shell line; empty to install only
#   TAV_FINISHED  a bucket path to which the log is written when the command has succeeded
#   TAV_FAILED    a bucket path to which the log is written when it has failed: with status 2 (wrong options) at once,
#                 otherwise at the third time
set -euo pipefail
export HOME=${HOME:-/root}
export PATH=$HOME/.local/bin:$PATH
SOURCE=${TAV_SOURCE:-$HOME/tav_jax.tar.gz}
VENV=$HOME/tav_jax_env
export TAV_WAIT=${TAV_WAIT:-1800} # seconds; the workers of a slice finish booting and installing at different times

if [[ $SOURCE == gs://* ]]; then
  gcloud storage cp "$SOURCE" "$HOME/tav_jax.tar.gz"
  SOURCE=$HOME/tav_jax.tar.gz
fi
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -x "$VENV/bin/python" ] || uv venv --python 3.12 "$VENV"
if [ -f "$SOURCE" ]; then
  uv pip install --python "$VENV/bin/python" "tav_jax[tpu] @ file://$SOURCE"
else
  uv pip install --python "$VENV/bin/python" "$SOURCE"
fi
export PATH=$VENV/bin:$PATH

# A startup script gets no SIGTERM when the VM stops (its service has KillMode=process), so `tav` runs in a unit of its
# own, which stops before the network does.
tav_unit() {
  local unit=()
  if [ "$(ps -p 1 -o comm=)" = systemd ] && [ "$(id -u)" = 0 ]; then
    unit=(systemd-run --unit=tav --collect --wait --pipe --property=After=network-online.target --property=TimeoutStopSec=300)
    unit+=(--setenv=HOME="$HOME" --setenv=PATH="$PATH" --setenv=TAV_WAIT="$TAV_WAIT")
  fi
  "${unit[@]}" bash -c "exec tav $TAV_COMMAND"
}

if [ -n "${TAV_COMMAND:-}" ]; then
  LOG=$HOME/tav.log
  for attempt in 1 2 3; do
    STATUS=0
    tav_unit > >(tee "$LOG") 2>&1 || STATUS=$?
    case $STATUS in
      0) ${TAV_FINISHED:+gcloud storage cp "$LOG" "$TAV_FINISHED"}; exit ;;
      75) exit 75 ;; # stopped by SIGTERM: the VM is going down
      2) break ;;
    esac
    echo "tav exited with status $STATUS, attempt $attempt of 3" >&2
  done
  ${TAV_FAILED:+gcloud storage cp "$LOG" "$TAV_FAILED"}
  exit "$STATUS"
fi
