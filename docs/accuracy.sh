#!/usr/bin/env bash
# Trains every row of docs/accuracy.md and prints its table; an hour on one CPU core.
# Usage: docs/accuracy.sh FOLDER_WITH_CIFAR10 RUNS
set -euo pipefail
data=$1 runs=$2
cifar10=(configs/cifar10.toml --data.name "$data" --federation.rounds 5 --run.threads 1)
for seed in 0 1 2; do
  fedmoe train "${cifar10[@]}" --seed $seed --run.dir "$runs/layer-batch-batch-$seed" \
    --gate.norm layer-batch-batch --training.theta_momentum keep
  fedmoe train "${cifar10[@]}" --seed $seed --run.dir "$runs/paper-$seed" --gate.norm paper
  fedmoe train "${cifar10[@]}" --seed $seed --run.dir "$runs/default-$seed"
  fedmoe train "${cifar10[@]}" --seed $seed --run.dir "$runs/static-$seed" --method static
  fedmoe train "${cifar10[@]}" --seed $seed --run.dir "$runs/local-$seed" --method local
done
python docs/accuracy_table.py "$runs"
