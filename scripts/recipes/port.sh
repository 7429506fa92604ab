#!/usr/bin/env bash
# The recipe of the earlier PyTorch port: recipes/port.sh ROW GLOBAL_BATCH ARCH FLAG...
# SGD without Nesterov, cosine to 0 after 10 epochs of warm-up, MixUp. What differs between rows
# comes from results/table.csv. The port published only its script of 500 epochs; the rows of 100
# and 1200 epochs change the number of epochs and nothing else (docs/reproducing.md).
set -euo pipefail
row=$1 batch=$2 arch=$3
shift 3
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" "$row" "$batch" \
    --arch "$arch" -c fanin --data-backend dali-cpu -j 8 -p 100 \
    --lr 1.2 --lr-schedule cosine --warmup 10 --mom 0.9 --wd 1e-4 \
    --mixup 0.2 "$@"
