#!/usr/bin/env bash
# Trains the paper's settings on CIFAR-10 (10, 50 and 100 clients, 500 rounds of ten epochs) with both controls beside
# each, and prints a comparison for every number of clients. Made for a GPU; called again it goes on where it stopped.
# Usage: docs/paper.sh FOLDER_WITH_CIFAR10 RUNS [OPTIONS OF ALL RUNS, AS --seeds 3]
# ROUNDS and EPOCHS in the environment make it shorter.
set -euo pipefail
data=$1 runs=$2
for setting in "10 1.0" "50 0.2" "100 0.1"; do
  read -r clients fraction <<<"$setting"
  fedmoe sweep configs/cifar10.toml --data.name "$data" --dir "$runs/$clients" --method fedmoe,local,static \
    --federation.clients "$clients" --federation.fraction "$fraction" --federation.rounds "${ROUNDS:-500}" \
    --federation.epochs "${EPOCHS:-10}" --evaluation.every 10 "${@:3}"
done
