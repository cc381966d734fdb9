#!/usr/bin/env bash
# Runs on a TPU VM: installs tav_jax with its own Python (the VM's is too old), and runs one `tav` command.
# As a startup script it runs at every boot, so that a run continues after a preemption.
#
#   TAV_SOURCE    an archive of the checkout, local or in a bucket, or any pip requirement
#   TAV_COMMAND   the arguments of `tav`, as one shell line; empty to install only
#   TAV_FINISHED  a bucket path that is written when the command has succeeded
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

if [ -n "${TAV_COMMAND:-}" ]; then
  eval "tav $TAV_COMMAND"
  if [ -n "${TAV_FINISHED:-}" ]; then
    gcloud storage cp - "$TAV_FINISHED" <<<"$(date -u)" # not a pipe, which would fail if gcloud stopped reading
  fi
fi
