#!/usr/bin/env bash
# The recipe of the AC/DC repository: recipes/acdc.sh ROW GLOBAL_BATCH ARCH FLAG...
# SGD without Nesterov, cosine to 0 after 5 epochs of warm-up, no label smoothing and no MixUp. The
# phases are the defaults of --sparse-method acdc, which are the published ones. What differs
# between rows comes from results/table.csv.
set -euo pipefail
row=$1 batch=$2 arch=$3
shift 3
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" "$row" "$batch" \
    --arch "$arch" -c classic --data-backend dali-cpu -j 8 -p 100 \
    --lr 0.256 --lr-schedule cosine --warmup 5 --mom 0.875 --wd 3.0517578125e-5 \
    --bn-weight-decay "$@"
