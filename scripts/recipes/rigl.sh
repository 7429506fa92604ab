#!/usr/bin/env bash
# The recipe of the RigL paper: recipes/rigl.sh ROW ARCH MULTIPLIER FLAG...
# 32,000 steps of 4,096 images, Nesterov, LR 1.6 that falls by 10 at three milestones, warm-up.
# The multiplier stretches epochs, milestones, warm-up and the end of the topology updates, and
# nothing else.
set -euo pipefail
row=$1 arch=$2 multiplier=$3
shift 3
case $arch in
    resnet50) warmup=5 milestones=(30 70 90) model=(--arch resnet50 -c fanin --last-bn-0-init) ;;
    mobilenet_v1) warmup=8 milestones=(40 75 95) model=(--arch mobilenet_v1) ;;
    *) echo "$row: the RigL paper has no recipe for $arch" >&2 && exit 2 ;;
esac
# An epoch is 312 steps: whole epochs, nearest to 32,000 steps (103, of 32,136 steps, at 1x).
epochs=$(((32000 * multiplier + 156) / 312))
for i in "${!milestones[@]}"; do milestones[i]=$((milestones[i] * multiplier)); done
sparse=()
[[ " $* " != *" --sparse-method rigl "* ]] || sparse=(--t-end $((25000 * multiplier)))
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" "rigl/$row" 4096 \
    "${model[@]}" --data-backend dali-cpu --interpolation bicubic -j 8 -p 100 \
    --epochs "$epochs" --lr 1.6 --lr-schedule step --lr-milestones "${milestones[@]}" \
    --lr-per-step --warmup $((warmup * multiplier)) --mom 0.9 --nesterov --wd 1e-4 \
    --label-smoothing 0.1 "${sparse[@]}" "$@"
