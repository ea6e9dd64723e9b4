# shellcheck shell=bash
# What the sbatch scripts of this folder share. Bash, to be sourced; docs/cluster.md has the settings.
#
#   PRORL_HOME        checkout that holds slurm/ and recipes/        default: where sbatch was called
#   PRORL_CONTAINER   image: *.sqsh or a registry name (enroot/pyxis), *.sif (Apptainer); empty: bare
#   PRORL_MOUNTS      folders to mount into the container beside PRORL_HOME and PRORL_LOGS, with commas
#   PRORL_PYTHON      Python that has prorl_nemo      default: PRORL_HOME/.venv, in a container python
#   PRORL_LOGS        logs of all attempts, on a file system that all nodes see       default: logs
#   PRORL_AGAIN       after an attempt that did not finish: requeue, chain (the next job of that
#                     name goes on: sbatch --dependency=singleton) or never         default: requeue
#   PRORL_MAX_STALLED attempts in a row without a new checkpoint before it gives up     default: 3
#   PRORL_GPUS        GPUs every node must show                  default: what Slurm has given
#   and of prorl_nemo/cluster/node_agent.py: PRORL_INTERFACE, PRORL_MIN_MEMORY_GIB,
#   PRORL_MIN_DISK_GIB, PRORL_JOIN_SECONDS, PRORL_DASHBOARD

set -uo pipefail

say() { printf '%(%F %T)T %s\n' -1 "$*"; }
give_up() { say "error: $1"; exit "${2:-1}"; }

PRORL_HOME=$(realpath -ms "${PRORL_HOME:-$SLURM_SUBMIT_DIR}")
PRORL_LOGS=$(realpath -ms "${PRORL_LOGS:-$PRORL_HOME/logs}")
cd "$PRORL_HOME" || exit 2
mkdir -p "$PRORL_LOGS" || give_up "PRORL_LOGS: $PRORL_LOGS cannot be made" 2
# Ray's processes are to import the same checkout as everybody else, not the image's copy.
export PYTHONPATH=$PRORL_HOME${PYTHONPATH:+:$PYTHONPATH}
[[ ${PRORL_AGAIN:-requeue} =~ ^(requeue|chain|never)$ ]] ||
  give_up "PRORL_AGAIN: $PRORL_AGAIN is none of requeue, chain, never" 2
[[ ${PRORL_MAX_STALLED:-3} =~ ^[1-9][0-9]*$ ]] ||
  give_up "PRORL_MAX_STALLED: $PRORL_MAX_STALLED is no number above 0" 2
# Slurm's signal would end a script that does not wait for it, without a requeue.
stopped=
trap 'stopped=time' USR1

# One srun, in the container if there is one: in_job SRUN'S OPTIONS ... -- PYTHON'S ARGUMENTS ...
# PRORL_SHOW=1: prints the command instead.
in_job() {
  local options=() mounts=() container=() inside=() python=${PRORL_PYTHON:-python} mount all=
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  IFS=, read -ra mounts <<<"${PRORL_MOUNTS:-}"
  [[ $PRORL_LOGS/ == "$PRORL_HOME"/* ]] || mounts=("$PRORL_LOGS" "${mounts[@]}")
  # pyxis wants SOURCE:TARGET of each.
  for mount in "$PRORL_HOME" "${mounts[@]}"; do
    [[ $mount == *:* ]] || mount=$mount:$mount
    [[ ,$all, == *",$mount,"* ]] || all+=${all:+,}$mount
  done
  case ${PRORL_CONTAINER:-} in
    "") python=${PRORL_PYTHON:-$PRORL_HOME/.venv/bin/python} ;;
    *.sif) inside=(apptainer exec --nv --bind "$all" --pwd "$PRORL_HOME" "$PRORL_CONTAINER") ;;
    *) container=("--container-image=$PRORL_CONTAINER" "--container-mounts=$all" "--container-workdir=$PRORL_HOME") ;;
  esac
  # --export: after `sbatch --export=NAME` srun would pass on that name alone.
  local command=(srun --export=ALL --mem=0 --cpu-bind=none "${options[@]}" "${container[@]}" "${inside[@]}" "$python" "$@")
  if [[ -n ${PRORL_SHOW:-} ]]; then echo "${command[*]@Q}"; else "${command[@]}"; fi
}

# Sets finished, step, name and tally of the run of a recipe; leaves them where it cannot be read.
look_at_run() {
  local lines state at run
  # On this node: another one may be why an attempt ended.
  lines=$(in_job --nodes=1 --ntasks=1 "--nodelist=$SLURMD_NODENAME" --overlap -- -m prorl_nemo.training.progress "$@") || return
  # The last line: an image may greet before it.
  read -r state at run <<<"${lines##*$'\n'}"
  [[ $at =~ ^[0-9]+$ && -n $run ]] || return
  finished=$state step=$at name=$run tally=$PRORL_LOGS/$run/stalled
}

# Ends a job whose recipe is wrong, or whose run is finished or was given up by an earlier job.
begin() {
  local last count=0
  look_at_run "$@" || give_up "the recipe, or the environment on $(hostname), is not usable; nothing was started" 2
  if [[ $finished == finished ]]; then say "$name is finished at step $step"; exit 0; fi
  [[ -e $tally ]] && read -r last count <"$tally"
  ((count < ${PRORL_MAX_STALLED:-3})) || give_up "$name was given up at step $last; look at $PRORL_LOGS/$name, then delete $tally"
}

# One command over all nodes of the job: Ray started, watched and ended around it.
# Sets status, why and stopped. On SIGUSR1, which Slurm sends before the time limit, the command is
# asked to save and end.
attempt() {
  local folder=$PRORL_LOGS/$1/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} pid end
  shift
  status=1 why="srun ended before the first node did; see $folder"
  if [[ $stopped == time ]]; then
    why="the time was nearly over before the attempt began"
    say "$why"
    return
  fi
  if ! mkdir -p "$folder" || ! ln -sfn "$(basename "$folder")" "$(dirname "$folder")/latest"; then
    give_up "PRORL_LOGS: $folder cannot be written" 2
  fi
  # Of a job that had this number before Slurm began to count anew.
  rm -f "$folder"/{head,status,stop}
  PRORL_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
  # Slurm before 23 does not say when the job ends; prorl saves in time for it. To date, "" is today.
  end=$(SLURM_TIME_FORMAT=standard squeue --noheader --job "$SLURM_JOB_ID" --format %e)
  [[ -n $end ]] && end=$(date --date "$end" +%s 2>/dev/null)
  SLURM_JOB_END_TIME=${end:-${SLURM_JOB_END_TIME:-}}
  export PRORL_NODES SLURM_JOB_END_TIME
  say "attempt ${SLURM_RESTART_COUNT:-0} on $PRORL_NODES; logs: $folder"
  trap 'stopped=time; touch "$folder/stop"; say "asked to save and end"' USR1
  [[ $stopped == time ]] && touch "$folder/stop"
  trap 'stopped=cancelled; say "cancelled or preempted"' TERM
  in_job "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --overlap \
    --kill-on-bad-exit=0 --wait=0 "--output=${folder//%/%%}/node_%n.log" --open-mode=append \
    -- -m prorl_nemo.cluster.node_guard "$folder" "$@" &
  pid=$!
  local patience=20
  while kill -0 "$pid" 2>/dev/null; do
    if [[ $stopped == time && -n $SLURM_JOB_END_TIME ]] && (($(date +%s) > SLURM_JOB_END_TIME - 30)); then
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
  trap 'stopped=time' USR1
  trap - TERM
  [[ -e $folder/status ]] && read -r status why <"$folder/status"
  say "$why"
  if [[ $status != 0 ]]; then tail -n 15 "$folder/node_0.log" | sed 's/^/  | /'; fi
}

# After an attempt to train: ends the job, or puts it back into the queue.
go_on_or_end() {
  local before=$step count=0 last
  # Slurm itself requeues a preempted job, and a cancelled one is to stay away.
  [[ $stopped == cancelled ]] && exit 143
  # A file system that stumbles must not end a run of weeks.
  look_at_run "$@" || say "the run cannot be read now; taken to be at step $step"
  if [[ $finished == finished ]]; then
    rm -f "$tally"
    say "$name is finished at step $step"
    exit 0
  fi
  [[ $status == 2 && $stopped != time && $step == "$before" ]] &&
    give_up "prorl refused to go on, and made no step: see the message above" 2
  [[ -e $tally ]] && read -r last count <"$tally"
  if ((step > before)); then count=0; else ((count += 1)); fi
  echo "$step $count" >"$tally"
  ((count >= ${PRORL_MAX_STALLED:-3})) &&
    give_up "$count attempts in a row brought no checkpoint beyond step $step; look at $PRORL_LOGS/$name, then delete $tally" 1
  again "at step $step"
}

# Ends a job that stands somewhere, back into the queue if PRORL_AGAIN says so.
again() {
  case ${PRORL_AGAIN:-requeue} in
    requeue)
      say "$1; back into the queue"
      for _ in 1 2 3; do
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        sleep 5
      done
      give_up "Slurm does not requeue this job; submit it again with --requeue, or chain jobs with PRORL_AGAIN=chain"
      ;;
    chain) say "$1; the next job of this name goes on" && exit 0 ;;
    never) say "$1; submit it again to go on" && exit "$status" ;;
  esac
}
