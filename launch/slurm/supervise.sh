# From here on the same in every script: check once, run, start again after faults, requeue when asked to stop.
warned=0     # Slurm has warned of the limit, or of preemption
cancelled=0  # somebody has ended the job
step_pid=
interrupted=0
status=1
pass_on() { [ -z "$step_pid" ] || kill -s "$1" "$step_pid" 2> /dev/null; }
trap 'warned=1; interrupted=1; pass_on USR1' USR1
trap 'cancelled=1; interrupted=1; pass_on TERM' TERM

# Wait for the step; a signal to this script interrupts the wait, and the step is waited for again.
wait_for_step() {
    local ended
    while true; do
        interrupted=0
        wait "$step_pid"
        ended=$?
        [ "$ended" = 127 ] || status=$ended # 127: waited for already
        [ "$interrupted" = 1 ] || break
    done
    step_pid=
}

# Of an array this one job: the number alone of its last job means all of them.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-0}}
job=${job:-$SLURM_JOB_ID}
say() { echo "megaprot launch: $*"; }
nodes=${SLURM_JOB_NUM_NODES:-1}
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A node's address on the network may differ from its name.
reachable=$(scontrol show node "$address" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
address=${reachable:-$address}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from the job since Slurm 22.05
attempt_name=${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}

say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $nodes node(s) $SLURM_JOB_NODELIST, $nproc ranks each"
is_checked=0
for ((attempt = 0; attempt <= max_restarts; attempt++)); do
    if [ "$is_checked" = 0 ]; then
        # Wrong input and a layout that does not fit the nodes end here, before any rank is started.
        LOCAL_WORLD_SIZE=$nproc srun --nodes=1 --ntasks=1 "${container[@]}" "${program[@]}" megaprot.tools.cli \
            "${command[@]}" --check_processes $((nodes * nproc)) &
        step_pid=$!
        wait_for_step
        [ "$status" != 0 ] || is_checked=1
    fi
    if [ "$is_checked" = 1 ]; then
        # Another port each time: the old one may still be taken.
        port=$((20000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0} * 4 + attempt) % 12000))
        srun --nodes="$nodes" --ntasks="$nodes" --kill-on-bad-exit=1 "${container[@]}" "${program[@]}" megaprot.launch \
            node --nodes "$nodes" --nproc "$nproc" --address "$address" --port "$port" \
            --log_dir "$log_folder/${attempt_name}_$attempt" "${watch[@]}" -- "${command[@]}" &
        step_pid=$!
        [ "$warned" = 0 ] || pass_on USR1
        wait_for_step
    fi
    # 0 done or saved, 2 wrong input, 5 a rank gave up on purpose; what else there is may be a fault of the machine.
    case $status in 0 | 2 | 5) break ;; esac
    [ "$warned$cancelled" = 00 ] || break
    [ "$attempt" = "$max_restarts" ] || say "starting again from the last save ($((attempt + 1)) of at most $max_restarts)"
done

# A marker counts only if this start has left it: ranks that start remove an older one.
goes_on=0
case $status in
    0) [ -z "$run_folder" ] || [ ! -e "$run_folder/REQUEUE" ] || goes_on=1 ;;
    2 | 5) ;;
    *) goes_on=$warned ;;
esac
if [ "$cancelled" = 1 ]; then
    say "the job was ended; unless Slurm requeues it, submit it again to go on"
elif [ "$goes_on" = 1 ]; then
    if [ "$requeues" = 1 ]; then
        say "requeueing the job: $(cat "$run_folder/REQUEUE" 2> /dev/null || echo 'stopped before its first step')"
        if scontrol requeue "$job"; then
            sleep 60 # Slurm ends this script
            exit 0
        fi
        say "this site refuses to requeue; submit the job again, or use --chain"
        exit 1
    fi
    say "stopped at $(cat "$run_folder/REQUEUE" 2> /dev/null || echo 'no step yet'); the next job goes on"
    status=0
fi
exit "$status"
