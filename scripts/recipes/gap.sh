#!/usr/bin/env bash
# Our recipe for GaP: recipes/gap.sh ROW GLOBAL_BATCH ARCH FLAG...
# The authors have not published theirs for ResNet-50. The optimizer and the learning rate are those
# of another run of theirs. The number of phases, their length, the fine-tuning after them, and that
# every phase has the whole cosine with its warm-up, are ours (docs/reproducing.md).
set -euo pipefail
row=$1 batch=$2 arch=$3
shift 3
# shellcheck disable=SC2046 # a word for each of the 28 phases of 30 epochs
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" "$row" "$batch" \
    --arch "$arch" -c fanin --data-backend dali-cpu -j 8 -p 100 \
    --lr 2.048 --lr-schedule cosine --lr-restarts $(seq 30 30 840) --warmup 8 \
    --mom 0.875 --wd 3.0517578125e-5 --mixup 0.2 "$@"
