# shellcheck shell=bash
# What the sbatch scripts of this folder share. Bash, to be sourced; docs/cluster.md has the settings.
#
#   PRORL_HOME        checkout that holds slurm/ and recipes/        default: where sbatch was called
#   PRORL_CONTAINER   image: *.sqsh or a registry name (enroot/pyxis), *.sif (Apptainer); empty: bare
#   PRORL_MOUNTS      folders to mount into the container, with commas      default: PRORL_HOME
#   PRORL_PYTHON      Python that has prorl_nemo      default: PRORL_HOME/.venv, in a container python
#   PRORL_LOGS        logs of all attempts, on a file system that all nodes see       default: logs
#   PRORL_AGAIN       after an attempt that did not finish: requeue, chain (the next job of that
#                     name goes on: sbatch --dependency=singleton) or never         default: requeue
#   PRORL_MAX_STALLED attempts in a row without a new checkpoint before it gives up     default: 3
#   PRORL_GPUS        GPUs every node must show                  default: what Slurm has given
#   and of prorl_nemo/cluster/node_agent.py: PRORL_INTERFACE, PRORL_MIN_MEMORY_GIB,
#   PRORL_MIN_DISK_GIB, PRORL_JOIN_SECONDS, PRORL_DASHBOARD

set -uo pipefail
PRORL_HOME=${PRORL_HOME:-$SLURM_SUBMIT_DIR}
PRORL_LOGS=$(realpath -m "${PRORL_LOGS:-$PRORL_HOME/logs}")
cd "$PRORL_HOME" || exit 2

say() { printf '%(%F %T)T %s\n' -1 "$*"; }
give_up() { say "error: $1"; exit "${2:-1}"; }

# One srun, in the container if there is one: in_job "SRUN OPTIONS" PYTHON'S ARGUMENTS ...
# PRORL_SHOW=1: prints the command instead.
in_job() {
  local options=$1 python=${PRORL_PYTHON:-python} container=() inside=() mount mounts=
  shift
  case ${PRORL_CONTAINER:-} in
    "") python=${PRORL_PYTHON:-$PRORL_HOME/.venv/bin/python} ;;
    *.sif)
      inside=(apptainer exec --nv --bind "${PRORL_MOUNTS:-$PRORL_HOME}" --pwd "$PRORL_HOME" "$PRORL_CONTAINER")
      ;;
    *)
      # pyxis wants SOURCE:TARGET of each.
      for mount in $(tr , ' ' <<<"${PRORL_MOUNTS:-$PRORL_HOME}"); do
        [[ $mount == *:* ]] || mount=$mount:$mount
        mounts+=${mounts:+,}$mount
      done
      container=("--container-image=$PRORL_CONTAINER" "--container-mounts=$mounts" "--container-workdir=$PRORL_HOME")
      ;;
  esac
  # The words of $options are meant to be split.
  # shellcheck disable=SC2206
  local command=(srun $options --mem=0 --cpu-bind=none "${container[@]}" "${inside[@]}" "$python" "$@")
  if [[ -n ${PRORL_SHOW:-} ]]; then echo "${command[*]@Q}"; else "${command[@]}"; fi
}

# Sets finished, step, name and tally of the run of a recipe; a wrong recipe ends the job here.
look_at_run() {
  local line
  line=$(in_job "--nodes=1 --ntasks=1 --overlap" -m prorl_nemo.training.progress "$@") ||
    give_up "the recipe, or the environment on $(hostname), is not usable; nothing was started" 2
  read -r finished step name <<<"$line"
  tally=$PRORL_LOGS/$name/stalled
}

# Ends a job that has nothing to do: its run is finished, or was given up by an earlier job.
end_if_over() {
  local last count=0
  if [[ $finished == finished ]]; then say "$name is finished at step $step"; exit 0; fi
  [[ -e $tally ]] && read -r last count <"$tally"
  ((count < ${PRORL_MAX_STALLED:-3})) || give_up "$name was given up at step $last; look at $PRORL_LOGS/$name, then delete $tally"
}

# One command over all nodes of the job: Ray started, watched and ended around it.
# Sets status, why and stopped. On SIGUSR1, which Slurm sends before the time limit, the command is
# asked to save and end.
attempt() {
  local folder=$PRORL_LOGS/$1 pid
  shift
  folder=$folder/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  if ! mkdir -p "$folder" || ! ln -sfn "$(basename "$folder")" "$(dirname "$folder")/latest"; then
    give_up "PRORL_LOGS: $folder cannot be written" 2
  fi
  PRORL_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
  # Slurm before 23 does not say when the job ends; prorl saves in time for it.
  local end
  end=$(squeue --noheader --job "$SLURM_JOB_ID" --format %e)
  SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(date --date "$end" +%s 2>/dev/null)}
  export PRORL_NODES SLURM_JOB_END_TIME
  say "attempt ${SLURM_RESTART_COUNT:-0} on $PRORL_NODES; logs: $folder"
  stopped=
  trap 'stopped=time; touch "$folder/stop"; say "asked to save and end"' USR1
  trap 'stopped=cancelled; say "cancelled or preempted"' TERM
  in_job "--nodes=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --overlap --output=$folder/node_%n.log --open-mode=append" \
    -m prorl_nemo.cluster.node_agent "$folder" "$@" &
  pid=$!
  local patience=20
  while kill -0 "$pid" 2>/dev/null; do
    if [[ $stopped == time && -n $SLURM_JOB_END_TIME ]] && (($(date +%s) > SLURM_JOB_END_TIME - 20)); then
      # A job that runs into its limit is not requeued. The last checkpoint is there.
      say "not saved in time; give --signal more than the seconds it has"
      kill -KILL "$pid"
    fi
    # srun waits for a dead node as long as Slurm does, which is minutes.
    if [[ -e $folder/status ]] && ((patience-- == 0)); then kill -KILL "$pid"; fi
    sleep 1 &
    wait $!
  done
  wait "$pid" 2>/dev/null
  trap - USR1 TERM
  status=1 why="srun ended before the first node did; see $folder"
  [[ -e $folder/status ]] && read -r status why <"$folder/status"
  say "$why"
  if [[ $status != 0 ]]; then tail -n 15 "$folder/node_0.log" | sed 's/^/  | /'; fi
}

# After an attempt to train: ends the job, or puts it back into the queue.
go_on_or_end() {
  local before=$step count=0 last=0
  # Slurm itself requeues a preempted job, and a cancelled one is to stay away.
  [[ $stopped == cancelled ]] && exit 143
  look_at_run "$@"
  if [[ $finished == finished ]]; then
    rm -f "$tally"
    say "$name is finished at step $step"
    exit 0
  fi
  [[ $status == 2 && $stopped != time && $step == "$before" ]] &&
    give_up "prorl refused to go on, and made no step: see the message above" 2
  [[ -e $tally ]] && read -r last count <"$tally"
  if ((step > last)); then count=0; elif [[ $stopped != time || $step == "$before" ]]; then ((count += 1)); fi
  echo "$step $count" >"$tally"
  ((count >= ${PRORL_MAX_STALLED:-3})) &&
    give_up "$count attempts in a row brought no checkpoint beyond step $step; look at $PRORL_LOGS/$name, then delete $tally" 1
  case ${PRORL_AGAIN:-requeue} in
    requeue) say "at step $step; back into the queue" && scontrol requeue "$SLURM_JOB_ID" && exit 0 ;;
    chain) say "at step $step; the next job of this name goes on" && exit 0 ;;
  esac
  exit "$status"
}
