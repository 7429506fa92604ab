#!/usr/bin/env bash
# The recipe of the earlier PyTorch port: recipes/port.sh ROW FLAG...
# SGD without Nesterov, cosine to 0 after 10 epochs of warm-up, MixUp, label smoothing; topology
# updates stop at 80 % of the run. Only its 500-epoch script was published; the rows of 100 and 1200
# epochs change the number of epochs and nothing else (docs/reproducing.md).
set -euo pipefail
row=$1
shift
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" "$row" 2048 \
    --arch resnet50 -c fanin --data-backend dali-cpu -j 8 -p 100 \
    --lr 1.2 --lr-schedule cosine --warmup 10 --mom 0.9 --wd 1e-4 \
    --label-smoothing 0.1 --mixup 0.2 "$@"
