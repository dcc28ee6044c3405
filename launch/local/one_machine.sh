#!/usr/bin/env bash
# Pretraining on one machine, without Slurm: started by hand, in tmux, or by a systemd unit. Copy and edit.
# After a fault the run starts again from its last save, at most three times; the same script goes on after a stop.
set -euo pipefail

# The software: a virtual environment, modules.
# source /path/to/venv/bin/activate

run_folder=$HOME/runs/esm2_8m
gpus=8 # ranks; without GPUs a number of processes that share the cores

exec megaprot launch local --nproc "$gpus" --max_restarts 3 --bind_cores --log_dir "$run_folder/logs" \
    -- pretrain --config esm2_8m --data.path "$HOME/corpora/pfam" --run.dir "$run_folder"
