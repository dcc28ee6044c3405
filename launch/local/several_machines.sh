#!/usr/bin/env bash
# Pretraining on several machines without a scheduler: every host is reached by ssh without a password, and all see the
# same folders. Copy and edit. Ctrl-C ends all of them; the same script goes on from the last save.
# shellcheck disable=SC2029 # commands are put together here and run there
set -euo pipefail

hosts=(node1 node2) # the first one has rank 0
gpus=8              # ranks of each host
port=29400
run_folder=/shared/runs/esm2_650m
environment='source /shared/venv/bin/activate'
command="pretrain --config esm2_650m --data.path /shared/corpora/pfam --run.dir $run_folder"

# Wrong input is said once, before any rank starts.
ssh "${hosts[0]}" "$environment; megaprot $command --check_processes $((${#hosts[@]} * gpus))"

connections=()
for number in "${!hosts[@]}"; do
    # -tt: the ranks of a host end with the connection.
    ssh -tt "${hosts[$number]}" "$environment; megaprot launch node --nodes ${#hosts[@]} --node $number --nproc $gpus \
        --address ${hosts[0]} --port $port --bind_cores --log_dir $run_folder/logs -- $command" < /dev/null &
    connections+=($!)
done
status=0
for _ in "${hosts[@]}"; do
    wait -n || { status=$?; kill "${connections[@]}" 2> /dev/null || true; }
done
exit "$status"
