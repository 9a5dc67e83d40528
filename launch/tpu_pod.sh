#!/bin/bash
# Starts a command on every host of a TPU pod slice; the hosts find each other by the slice's
# metadata. The repository must lie in the same place on all of them, and --workdir on a disk that
# they share (Filestore, or a bucket mounted by gcsfuse).
#
#   TPU=pod ZONE=europe-west4-b launch/tpu_pod.sh launch/train.py \
#     --config=configs/coco.py --workdir=/mnt/runs/coco
#
# After a maintenance event or a preemption the same command resumes. Exit code 75 means: stopped by
# a signal after a checkpoint.
set -euo pipefail

: "${TPU:?name of the TPU VM}" "${ZONE:?zone of the TPU VM}"
folder=${FOLDER:-trm_jax}    # the checkout, from the home folder
python=${PYTHON:-python3}    # of an environment with trm_jax[tpu]
[ $# -gt 0 ] || { echo "usage: TPU=NAME ZONE=ZONE $0 launch/train.py --config=... --workdir=..." >&2; exit 2; }

gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd $(printf %q "$folder") && exec $(printf %q "$python") $(printf '%q ' "$@")"
