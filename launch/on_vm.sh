#!/usr/bin/env bash
# Runs on a TPU VM: installs tav_jax beside a Python of its own (the VM's is too old), and runs one `tav` command.
# As a startup script it does so again at every boot, so a run goes on by itself after a preemption.
#
#   TAV_SOURCE    what to install: a packed checkout here or in a bucket, or anything that pip takes
#   TAV_COMMAND   what to run, as a line for the shell; empty to install only
#   TAV_FINISHED  a bucket path that is written when the command has succeeded
set -euo pipefail
export HOME=${HOME:-/root}
export PATH=$HOME/.local/bin:$PATH
SOURCE=${TAV_SOURCE:-$HOME/tav_jax.tar.gz}
VENV=$HOME/tav_jax_env
export TAV_WAIT=${TAV_WAIT:-1800} # the workers of a slice boot and install at their own pace

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
    gcloud storage cp - "$TAV_FINISHED" <<<"$(date -u)" # no pipe: it would fail if gcloud stopped reading
  fi
fi
