#!/usr/bin/env bash
# The recipe of the RigL paper: recipes/rigl.sh ROW GLOBAL_BATCH ARCH MULTIPLIER FLAG...
# Nesterov, LR 1.6 that falls by 10 at three milestones, warm-up. What differs between rows comes
# from results/table.csv: the epochs, for example, which are those nearest to 32,000 steps times
# the multiplier. The multiplier also stretches the milestones, the warm-up and the end of the
# topology updates, and nothing else.
set -euo pipefail
row=$1 batch=$2 arch=$3 multiplier=$4
shift 4
case $arch in
    resnet50) warmup=5 milestones=(30 70 90) model=(--arch resnet50 -c fanin --last-bn-0-init) ;;
    mobilenet_v1) warmup=8 milestones=(40 75 95) model=(--arch mobilenet_v1) ;;
    *) echo "$row: the RigL paper has no recipe for $arch" >&2 && exit 2 ;;
esac
for i in "${!milestones[@]}"; do milestones[i]=$((milestones[i] * multiplier)); done
sparse=()
[[ " $* " != *" --sparse-method rigl "* ]] || sparse=(--t-end $((25000 * multiplier)))
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" "rigl/$row" "$batch" \
    "${model[@]}" --data-backend dali-cpu --interpolation bicubic -j 8 -p 100 \
    --lr 1.6 --lr-schedule step --lr-milestones "${milestones[@]}" \
    --lr-per-step --warmup $((warmup * multiplier)) --mom 0.9 --nesterov --wd 1e-4 \
    "${sparse[@]}" "$@"
