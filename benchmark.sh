#!/usr/bin/env bash
# Every table and every figure of the paper from one command. Docs: docs/benchmark.md.
#
# In this file: scales (what a run costs), experiments (which runs a figure has), commands,
# pictures and tables, runners, command line.
# shellcheck disable=SC2086  # lists and flags are split into words on purpose
usage="usage: ./benchmark.sh TARGET [--scale paper|cpu|smoke] [--runner local|slurm|dry-run]
                      [--jobs N] [--seeds N]
       ./benchmark.sh plot TARGET [--scale ...] [--seeds N]    draw from the finished runs
       ./benchmark.sh status TARGET [--scale ...] [--seeds N]  how far each run is
       ./benchmark.sh list                                     targets, how many runs they have
       ./benchmark.sh TARGET --help                            this, and what the target is
TARGET: table1 to table5, fig1 to fig18, all (of these), extra-... (not in the paper).
Default: --scale cpu --runner local.

scales:      cpu    no GPU needed: easier tasks, networks an eighth as wide, fewer env steps and
                    seeds; shows at most the direction of an effect
                    (fig3: 240 runs, about 116 core hours)
             paper  the paper's protocol, for a cluster
                    (fig3: 1280 runs, about 646000 core hours)
             smoke  tiny runs of a few hundred decisions that test every step; the numbers mean
                    nothing (all: 106 runs, some 20 minutes on two cores)
runners:     local (on this machine, --jobs runs at a time), slurm (one array job),
             dry-run (prints the commands)
--seeds N:   the first N seeds, in place of the scale's number
Before anything runs, the number of runs and an estimate in core hours are printed.
More: docs/benchmark.md

environment (folders count from this script's):
             RUNS (folder of runs, default runs/SCALE),
             RESULTS (of pictures and tables, default results/SCALE),
             PYTHON (default python),
             THREADS (CPU threads of a run, default cores / jobs; slurm: 1),
             FLAGS (more flags for every agent, such as '--device cuda', split at spaces),
             ONLY (only runs whose command matches this regular expression:
                   '--width-scale 1 .*--sparsity 0.9 '),
             SBATCH_OPTIONS (more options for sbatch),
             MAX_ARRAY (most tasks in one array job, default 1000)"
set -feuo pipefail # -f: a * is a character
{ LC_ALL=C.UTF-8; } 2>/dev/null # names are shown as they are

fail() { # fail MESSAGE [EXIT_CODE]
  echo "error: $1" >&2
  exit "${2:-2}"
}

unset CDPATH # with it, cd prints, and may go elsewhere
cd "$(dirname "$0")"
[[ -d sparse_zoo ]] ||
  fail "no sparse_zoo/ beside this script; in a Slurm job: sbatch --wrap './benchmark.sh TARGET'"

# === SCALES ===

# set_scale NAME: tasks, sizes, seeds and flags of the experiments
set_scale() {
  case $1 in
    paper) set_paper_scale ;;
    cpu) set_cpu_scale ;;
    smoke) set_smoke_scale ;;
    *) fail "--scale $1: must be paper, cpu or smoke" ;;
  esac
  hardest=${two_hardest%% *} # of Figures 4, 7 and 9: Humanoid Run
}

# The agents' defaults are the paper's protocol
set_paper_scale() {
  # Tasks: Table 1. Which four and two are meant is not in the text: those with the lowest
  # published returns of SAC SimBa
  dmc_hard="dog-run dog-trot dog-walk humanoid-run humanoid-stand humanoid-walk"
  four_hardest="humanoid-run dog-run humanoid-walk dog-trot"
  two_hardest="humanoid-run dog-run"
  # The text names the first; the other is a medium task too, as Table 4's schedule
  visual="quadruped-run hopper-hop"
  streaming="Ant-v4 Walker2d-v4" # appendix C.2
  # Atari-100k
  games="Alien Amidar Assault Asterix BankHeist BattleZone Boxing Breakout ChopperCommand
    CrazyClimber DemonAttack Freeway Frostbite Gopher Hero Jamesbond Kangaroo Krull KungFuMaster
    MsPacman Pong PrivateEye Qbert RoadRunner Seaquest UpNDown"

  unit=1        # width scale of the default SimBa network
  simba_seeds=8 # appendix B.1
  other_seeds=5 # Figures 10 and 12; taken for 11, 13, 17 and 18 too

  simba_flags=""
  visual_flags=""
  streaming_flags=""
  atari_flags=""

  reset=200000        # env steps, not in the text: that of Nikishin et al. (2022) for SAC
  small_replay=100000 # frames, of facebookresearch/drqv2 on this task
  dynamic_tasks=$two_hardest
  dynamic_sizes="1:0.3125 5:1.578" # width at sparsity 0.9 : width of a dense one of as many weights
  dynamic_flags=""
  topology_flags=""
  wider_unit=0.5
  wider_flags=""
  wider_runs=""

  bias_flags="--width-scale 5 --grid 300 --inits 10"
  curve_bin=20000
  samples=256
}

# Easier tasks, networks an eighth as wide, fewer steps and seeds: docs/benchmark.md has the list
set_cpu_scale() {
  dmc_hard="cheetah-run walker-run"
  four_hardest=$dmc_hard
  two_hardest=$dmc_hard
  visual="cartpole-swingup"
  streaming="Ant-v4 Walker2d-v4"
  games="Boxing Pong"

  unit=0.125
  simba_seeds=3
  other_seeds=3

  simba_flags="--total-timesteps 100000 --batch-size 128 --learning-starts 5000"
  simba_flags+=" --eval-interval 5000 --eval-episodes 5 --final-eval-episodes 20"
  simba_flags+=" --diagnostics-interval 2000"
  visual_flags="--total-timesteps 100000 --batch-size 32 --std-decay 50000 --buffer-size 50000"
  visual_flags+=" --eval-episodes 3"
  streaming_flags="--total-timesteps 500000 --final-eval-episodes 20"
  atari_flags="--total-timesteps 40000 --eval-interval 20000 --eval-episodes 3"
  atari_flags+=" --final-eval-episodes 10"

  reset=20000
  small_replay=5000
  dynamic_tasks=cartpole-swingup
  dynamic_sizes="0.25:0.07812 0.5:0.1562"
  dynamic_flags="--total-timesteps 24000 --batch-size 128 --learning-starts 2000"
  dynamic_flags+=" --learning-rate 1e-3 --eval-interval 2000 --eval-episodes 5"
  dynamic_flags+=" --final-eval-episodes 20 --diagnostics-interval 2000"
  topology_flags="--topology-interval 250"
  # Half as long as the same runs of Figures 1 and 2, so in a folder of their own
  wider_unit=0.25
  wider_flags=${simba_flags/100000/50000}
  wider_runs=_50000

  bias_flags="--width-scale 0.5 --reach 31.6 --grid 300 --inits 5"
  curve_bin=20000
  samples=256
}

# Does every step of every target work? The numbers mean nothing
set_smoke_scale() {
  dmc_hard="humanoid-run"
  four_hardest="humanoid-run"
  two_hardest="humanoid-run"
  visual="quadruped-run"
  streaming="Walker2d-v4"
  games="Pong"

  unit=0.125
  simba_seeds=1
  other_seeds=1

  local tiny="--eval-episodes 1 --final-eval-episodes 1"
  simba_flags="--total-timesteps 1000 --learning-starts 400 --action-repeat 20 --batch-size 16"
  simba_flags+=" $tiny --eval-interval 500 --diagnostics-interval 200"
  visual_flags="--total-timesteps 300 --learning-starts 100 --action-repeat 20 --batch-size 4"
  visual_flags+=" --buffer-size 100 $tiny --eval-interval 300 --diagnostics-interval 100"
  streaming_flags="--total-timesteps 2000 --eval-interval 1000 --diagnostics-interval 1000 $tiny"
  atari_flags="--total-timesteps 3000 --learning-starts 2000 --action-repeat 20 --batch-size 4"
  atari_flags+=" $tiny --eval-interval 3000 --diagnostics-interval 1000"

  reset=500
  small_replay=50
  dynamic_tasks=humanoid-run
  dynamic_sizes="0.125:0.0391 0.25:0.0703"
  dynamic_flags=$simba_flags
  topology_flags="--topology-interval 10"
  wider_unit=0.125
  wider_flags=$simba_flags
  wider_runs=""

  bias_flags="--width-scale 0.5 --reach 31.6 --grid 30 --inits 2"
  curve_bin=500
  samples=20
}

# === EXPERIMENTS ===
#
# Each function prints one command per run; widths and depths are the paper's Width and Depth Scale.
# The comment above a function is what --help says of it.

sparsities="0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9"

# dense and sparse, wider, then wider and deeper (which widths and depths are combined is not in
# the text)
fig1() {
  for w in 0.5 1 2 3 4 5; do
    simba "sac ddpg" "$four_hardest" $w 1 0
  done
  for w in 3 4 5; do
    simba "sac ddpg" "$four_hardest" $w 1 "1 - 4 / $w^2" # as many active weights as width 2 dense
  done
  for w in 4 5; do
    simba "sac ddpg" "$four_hardest" $w 2 0
    simba "sac ddpg" "$four_hardest" $w 2 "1 - 4 / (2 * $w^2)"
  done
}

# width and depth, the average over DMC Hard
fig2() {
  fig15
  fig16
}

# default and large network against sparsity
fig3() {
  for w in 1 5; do
    for s in $sparsities; do
      simba "sac ddpg" "$four_hardest" $w 1 $s
    done
  done
}

# stable rank, runs of Figure 3
fig4() {
  for w in 1 5; do
    for s in $sparsities; do
      simba sac "$hardest" $w 1 $s
    done
  done
}

# plasticity of small dense, large dense and large sparse networks, runs of Figure 3
fig5() {
  simba "sac ddpg" "$two_hardest" 1 1 0
  for s in 0 0.9; do
    simba "sac ddpg" "$two_hardest" 5 1 $s
  done
}

# large networks with and without resets (tasks, algorithm and interval are not in the text)
fig6() {
  for s in 0 0.9; do
    simba sac "$two_hardest" 5 1 $s
    simba sac "$two_hardest" 5 1 $s --reset-interval $reset
  done
}

# parameter norms, runs of Figure 5
fig7() {
  simba sac "$hardest" 1 1 0
  for s in 0 0.9; do
    simba sac "$hardest" 5 1 $s
  done
}

# gains of the large networks of Figure 3 over dense ones, beside the simplicity bias, which needs
# no runs
fig8() {
  for s in $sparsities; do
    simba "sac ddpg" "$four_hardest" 5 1 $s
  done
}

# gradient interference of large networks before and after training, one run of Figure 3 each
fig9() {
  for s in 0 0.9; do
    seeds=1 simba sac "$hardest" 5 1 $s
  done
}

# DrQ-v2, the critic scaled (of the widths only 1 and 4, of the sparsities only 0.8 are in the text)
fig10() {
  for w in 1 2 4; do
    for s in 0 0.4 0.8; do
      drqv2 "$visual" $w $s
    done
  done
}

# learning curves and active units at width 4, runs of Figure 10
fig11() {
  for s in 0 0.4 0.8; do
    drqv2 "${visual%% *}" 4 $s
  done
}

# Stream AC(lambda), static sparsity (widths and sparsities are not in the text)
fig12() {
  for w in 1 2 4 8; do
    for s in 0 0.4 0.8 0.9; do
      stream $w $s lecun
    done
  done
}

# default width: static sparsity, or SparseInit, or neither
fig13() {
  for s in 0 0.9; do
    stream 1 $s lecun
  done
  stream 1 0 sparse_init
}

# Figure 1 on a linear axis
fig14() {
  fig1
}

# width, task by task
fig15() {
  for w in 0.5 1 2 3 4 5; do
    simba "sac ddpg" "$dmc_hard" $w 1 0
  done
  for w in 3 4 5; do
    simba "sac ddpg" "$dmc_hard" $w 1 "1 - 4 / $w^2"
  done
}

# depth, task by task, at width 2
fig16() {
  for d in 1 2 3 4; do
    simba "sac ddpg" "$dmc_hard" 2 $d 0
  done
  for d in 2 3 4; do
    simba "sac ddpg" "$dmc_hard" 2 $d "1 - 1 / $d"
  done
}

# learning curves of the runs of Figure 12
fig17() {
  fig12
}

# Atari-100k: the default dense network, and 3 times as wide
fig18() {
  der 1 0
  for s in 0 0.4 0.8; do
    der 3 $s
  done
}

# Not in the paper, and not in `all`

# Figures 5 and 7 with pairs of as many active weights: widths 1 and 5 at 0.96, 2 and 5 at 0.84
extra-equal() {
  for w in 1 2; do
    simba "sac ddpg" "$two_hardest" $w 1 0
  done
  for s in 0.96 0.84; do
    simba "sac ddpg" "$two_hardest" 5 1 $s
  done
}

# how sparsity is spread over layers: Erdos-Renyi (runs of Figure 3) or uniform
extra-uniform() {
  for s in 0.5 0.9; do
    simba sac "$two_hardest" 5 1 $s
    simba sac "$two_hardest" 5 1 $s --sparsity-distribution uniform
  done
}

# both networks sparse (runs of Figure 5), the actor alone, the critic alone
extra-actor-critic() {
  for s in 0 0.9; do
    simba sac "$two_hardest" 5 1 $s
  done
  simba sac "$two_hardest" 5 1 0 --actor-sparsity 0.9
  simba sac "$two_hardest" 5 1 0 --critic-sparsity 0.9
}

# width 5 sparse (runs of Figure 3) and dense networks of as many weights, within 1.5 % (2.5 % at
# scale cpu)
extra-dense-active() {
  for s in 0.5 0.8 0.9; do
    simba sac "$two_hardest" 5 1 $s
  done
  for w in 3.531 2.234 1.578; do
    simba sac "$two_hardest" $w 1 0
  done
}

# Stream AC: SparseInit and static sparsity, each and together
extra-sparse-init() {
  for w in 1 4; do
    for s in 0 0.9; do
      for init in lecun sparse_init; do
        stream $w $s $init
      done
    done
  done
}

# at sparsity 0.9: topologies that stay (paper: some are runs of Figure 3) or change; dense networks
extra-dynamic() {
  local unit=1 simba_flags=$dynamic_flags sizes sparse dense topology
  for sizes in $dynamic_sizes; do
    sparse=${sizes%:*}
    dense=${sizes#*:}
    simba sac "$dynamic_tasks" $sparse 1 0.9
    simba sac "$dynamic_tasks" $dense 1 0
    for topology in set rigl magnitude; do
      simba sac_simba_dynamic "$dynamic_tasks" $sparse 1 0.9 --topology $topology $topology_flags
    done
  done
}

# wider with as many active weights as small dense networks (paper: the widths of Figure 2)
extra-constant-active() {
  local unit=$wider_unit simba_flags=$wider_flags runs=$runs$wider_runs
  for w in 1 2 4; do
    simba sac "$two_hardest" $w 1 0
  done
  for w in 2 4 8; do
    simba sac "$two_hardest" $w 1 "1 - 1 / $w^2" # of the smallest dense network
  done
  for w in 4 8; do
    simba sac "$two_hardest" $w 1 "1 - 4 / $w^2" # of the middle one
  done
}

# Quadruped Run with Table 4's replay (runs of Figure 10) and with that of DrQ-v2's own code
extra-replay() {
  for s in 0 0.8; do
    drqv2 "${visual%% *}" 4 $s
    drqv2 "${visual%% *}" 4 $s --buffer-size $small_replay
  done
  drqv2 "${visual%% *}" 1 0
  drqv2 "${visual%% *}" 1 0 --buffer-size $small_replay
}

# === COMMANDS ===

# simba "ALGORITHMS" "TASKS" WIDTH DEPTH SPARSITY [FLAG...]
simba() {
  local size algorithm agent task
  size="--width-scale $(calc "$unit * $3") --depth-scale $4 --sparsity $(calc "$5")"
  for algorithm in $1; do
    agent=${algorithm}_simba_sparse
    [[ $algorithm != *_dynamic ]] || agent=$algorithm
    for task in $2; do
      run "$simba_seeds" "$agent" --env-id "dm_control/$task-v0" $size "${@:6}" $simba_flags
    done
  done
}

# drqv2 "TASKS" WIDTH SPARSITY [FLAG...]
drqv2() {
  local size="--width-scale $2 --sparsity $3"
  for task in $1; do
    run "$other_seeds" drqv2_sparse --env-id "dm_control/$task-v0" $size $visual_flags "${@:4}"
  done
}

# stream WIDTH SPARSITY INIT
stream() {
  local size="--width-scale $1 --sparsity $2 --init $3" given=${FLAGS:-} FLAGS
  FLAGS=$(sed -E 's/--device[= ]+cuda[^ ]*//' <<<"$given") # one sample at a time suits a CPU
  for task in $streaming; do
    run "$other_seeds" stream_ac_sparse --env-id "$task" $size $streaming_flags
  done
}

# der WIDTH SPARSITY
der() {
  local size="--width-scale $1 --sparsity $2"
  for game in $games; do
    run "$other_seeds" der_impala_sparse --env-id "ALE/$game-v5" $size $atari_flags
  done
}

# run SEEDS AGENT FLAG...: one command for each seed, quoted for a shell, if it matches ONLY
run() {
  local line
  for ((seed = 1; seed <= ${seeds:-$1}; seed++)); do
    printf -v line "%q " $python "sparse_zoo/$2.py" "${@:3}" --seed $seed \
      --runs-dir "$runs" --threads "$threads" ${FLAGS:-}
    if [[ $line =~ $only ]]; then
      echo "${line% }"
    fi
  done
}

# commands TARGET...: their runs, shared ones once
commands() {
  for name in "$@"; do
    [[ $name == table* ]] || "$name"
  done | awk '!seen[$0]++'
}

calc() { # calc FORMULA
  LC_ALL=C awk "BEGIN { printf \"%.4g\", $1 }"
}

count() { # the lines on standard input; wc -l has spaces before it on macOS
  awk 'END { print NR }'
}

# === PICTURES AND TABLES ===

analysis() { # analysis SCRIPT FLAG...
  $python "sparse_zoo/analysis/$1.py" "${@:2}"
}

# measure_bias FOLDER: the scores of Figure 8, once, for they take long and need no runs
measure_bias() {
  [[ ! -e $1/scores.csv ]] || return 0
  analysis simplicity_bias $bias_flags --sparsities $sparsities \
    --threads "${THREADS:-$cores}" --output "$1"
}

# plot TARGET: from its finished runs; the others are named
plot() {
  local out=$results/$1 from large variants bias=$results/$1/scores_$scale
  if [[ $1 == table* ]]; then # beside the paper's values, so with the paper's widths and depths
    (only=. && set_scale paper && commands $figures) |
      analysis tables --table "${1#table}" --output "$out"
    return
  fi
  commands "$1" | analysis plan link --output "$out/runs" || return
  from="--runs-dir $out/runs --output $out"
  large=$(calc "5 * $unit")
  variants="--variants $unit:0 $large:0 $large:0.9"
  case $1 in
    fig1) analysis scaling --figure size $from ;;
    fig2) analysis scaling --figure aggregate $from ;;
    fig3) analysis scaling --figure sparsity $from ;;
    fig4) analysis plasticity --figure srank $from $variants ;;
    fig5) analysis plasticity --figure over-training $from $variants ;;
    fig6) analysis plasticity --figure reset $from ;;
    fig7) analysis plasticity --figure param-norm $from $variants ;;
    fig8)
      measure_bias "$bias" &&
        analysis scaling --figure gain $from --scores "$bias/scores.csv"
      ;;
    fig9)
      (set +f && analysis gradient_interference "$out"/runs/* --samples $samples --output "$out")
      ;;
    fig10) analysis scaling --figure bars $from ;;
    fig11) analysis plasticity $from --metrics eval/return_mean diagnostics/critic_active_units ;;
    fig12 | fig13 | fig17) analysis streaming --figures "${1#fig}" $from --bin $curve_bin ;;
    fig14) analysis scaling --figure size-linear $from ;;
    fig15) analysis scaling --figure width $from ;;
    fig16) analysis scaling --figure depth $from ;;
    fig18) analysis atari_scores $from ;;
    extra-equal)
      variants="--variants $unit:0 $(calc "2 * $unit"):0 $large:0.96 $large:0.84"
      analysis plasticity --figure over-training $from $variants &&
        analysis plasticity --figure param-norm $from $variants
      ;;
    extra-sparse-init) analysis streaming $from --bin $curve_bin ;;
    extra-dynamic) analysis topologies $from ;;
    extra-constant-active)
      analysis scaling --figure active $from &&
        analysis plasticity --figure against-sparsity $from
      ;;
    extra-*)
      analysis plasticity $from --metrics eval/return_mean diagnostics/critic_dormant_ratio
      ;;
  esac
}

# === RUNNERS (commands on standard input) ===

# Keeps $jobs runs going until all are done; a signal ends them, and the same command goes on
run_local() {
  local all code command group last left log
  all=$(cat)
  export logs=$runs/logs
  { mkdir -p "$logs" && [[ -w $logs ]]; } 2>/dev/null ||
    fail "cannot write to $logs; make room, or set RUNS"
  export -f run_one log_of
  set -m # the runs get a process group of their own, so that a signal can be sent to all of them
  # shellcheck disable=SC2016
  printf '%s\n' "$all" | tr '\n' '\0' |
    xargs -0 -n 1 -P "$jobs" "$BASH" -c 'run_one "$1" 2>/dev/null' _ &
  last=$!
  group=$(jobs -p %%)
  set +m # but what follows does not: Ctrl-C has to reach this shell
  trap 'interrupted=1; kill -TERM -- "-$group"' INT TERM HUP
  # Here bash would say of killed processes that they were
  {
    while kill -0 -- "-$group"; do sleep 0.2; done
    wait "$last" && code=0 || code=1
  } 2>/dev/null
  trap "$on_signal" INT TERM HUP
  [[ -z ${interrupted:-} ]] ||
    fail "interrupted; the same command goes on from the last checkpoints" 1
  left=$(printf '%s\n' "$all" | analysis plan unfinished 2>/dev/null) || fail \
    "cannot tell which runs are finished; ./benchmark.sh status $target --scale $scale says why" 1
  if [[ -n $left ]]; then
    echo "these runs are not finished, their logs say why:"
    printf '%s\n' "$left" | while read -r command; do
      log=$(log_of "$command")
      [[ -s $log ]] || log="not started"
      echo "$log: $command"
    done
  elif ((code)); then
    echo "all runs have their results, but some ended with an error after writing them: see above"
  fi >&2
  [[ -z $left ]] && ((code == 0))
}

log_of() { # log_of COMMAND
  printf %s "$logs/$(cksum <<<"$1" | cut -d ' ' -f 1).log"
}

run_one() { # run_one COMMAND
  local code=0 log
  log=$(log_of "$1")
  trap 'exit 255' TERM # upon which xargs starts no more
  echo "$ $1" >>"$log"
  eval "$1" >>"$log" 2>&1 </dev/null || code=$?
  if ((code)); then
    echo "failed with exit code $code, see $log: $1"
    exit 1 # xargs goes on
  fi
  echo "finished: ${1#*sparse_zoo/}"
}

# One array job; Slurm restarts preempted tasks, which resume; sbatch reads SBATCH_PARTITION and
# so on. Beyond MAX_ARRAY (1000 is Slurm's default limit), tasks take several runs each
run_slurm() {
  local folder job size max=${MAX_ARRAY:-1000}
  folder=$(mkdir -p "$runs/slurm" && cd "$runs/slurm" && pwd) 2>/dev/null &&
    job=$(mktemp "$folder/$target.XXXXXX" 2>/dev/null) && cat 2>/dev/null >"$job.txt" ||
    fail "cannot write to $runs/slurm; make room, or set RUNS"
  size=$(awk -v max="$max" 'END { print NR < max ? NR : max }' "$job.txt")
  cat >"$job" <<JOB || fail "cannot write to $job; make room, or set RUNS"
#!/usr/bin/env bash
#SBATCH --job-name=$target --array=1-$size${limit:+%$limit} --cpus-per-task=$threads
#SBATCH --requeue --open-mode=append
cd $(printf %q "$PWD") || exit 2
# Compiled loops are kept for each kind of CPU: two kinds that write into one cache at once can
# mix them up
cpu=\$(grep -E '^(model name|flags)' /proc/cpuinfo | sort -u | cksum | cut -d ' ' -f 1)
export NUMBA_CACHE_DIR=\${NUMBA_CACHE_DIR:-$(printf %q "$folder")/compiled/\$cpu}
commands=\$(sed -n "\$SLURM_ARRAY_TASK_ID~${size}p" $(printf %q "$job.txt")) || exit 2
[[ -n \$commands ]] || exit 2
code=0
while read -r command; do
  eval "\$command" </dev/null || code=\$?
done <<<"\$commands"
exit \$code
JOB
  SBATCH_OUTPUT="${job//%/%%}.%a.log" sbatch ${SBATCH_OPTIONS:-} "$job" || return
  echo "when it has ended, with the same FLAGS, ONLY, RUNS and RESULTS:" \
    "./benchmark.sh plot $target --scale $scale${seeds:+ --seeds $seeds};" \
    "where tasks have failed or their time was up: this command again"
}

# === COMMAND LINE ===

number() { # number NAME VALUE MOST
  [[ $2 =~ ^[1-9][0-9]{0,9}$ ]] && (($2 <= $3)) ||
    fail "$1 $2: must be a whole number above 0, at most $3"
}

# comment_above FUNCTION: on one line
comment_above() {
  awk -v name="$1() {" '
    $0 == name { print text }
    { text = /^# / ? text (text ? " " : "") substr($0, 3) : "" }
  ' "${BASH_SOURCE[0]##*/}"
}

# describe TARGET
describe() {
  echo
  if [[ $1 == table* ]]; then
    echo "$1: hyperparameters or environments, printed from the code beside the paper's"
  else
    echo "$1: $(comment_above "$1"); $(commands "$1" | count) runs at --scale $scale"
  fi
}

tables="table1 table2 table3 table4 table5"
figures=$(printf 'fig%d ' {1..18})
extras="extra-equal extra-uniform extra-actor-critic extra-dense-active extra-sparse-init"
extras+=" extra-replay extra-dynamic extra-constant-active"

# Flags
action=run
scale=cpu
runner=""
seeds=""
limit=""
help=""
code=0
on_signal='fail "interrupted; the same command goes on" 1'
trap "$on_signal" INT TERM HUP
names=()
(($#)) || set -- --help
while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    -h | --help)
      help=1
      shift
      continue
      ;;
    --scale | --runner | --jobs | --seeds)
      (($# > 1)) || fail "$1: its value is missing; ./benchmark.sh --help"
      ;;
    -*) fail "$1: unknown flag; ./benchmark.sh --help" ;;
    *)
      names+=("$1")
      shift
      continue
      ;;
  esac
  case $1 in
    --scale) scale=$2 ;;
    --runner) runner=$2 ;;
    --jobs) number "$1" "$2" 1000 && limit=$2 ;;
    --seeds) number "$1" "$2" 1000 && seeds=$2 ;;
  esac
  shift 2
done
if [[ ${names-} == plot || ${names-} == status ]]; then
  action=${names[0]}
  names=("${names[@]:1}")
fi

# What was asked for must exist
target=${names[0]-}
if [[ -n $help ]] && [[ -z $target || " $tables $figures $extras " != *" $target "* ]]; then
  echo "$usage"
  exit
fi
[[ -n $target && " $tables $figures $extras all list " == *" $target "* ]] &&
  [[ $action == run || $target != list ]] ||
  fail "no target '$target' to $action; ./benchmark.sh list names them"
((${#names[@]} == 1)) || fail "$target ${names[1]}: one target at a time"
if [[ $action != run || $target == list ]]; then
  [[ -z $runner$limit ]] || fail "--runner and --jobs: only for a target that is to be run"
fi
runner=${runner:-local}
[[ " local slurm dry-run " == *" $runner "* ]] ||
  fail "--runner $runner: must be local, slurm or dry-run"
[[ $target != table* || $runner == local ]] || fail "--runner $runner: a table has no runs"
set_scale "$scale"

# Environment variables
python=${PYTHON:-python}
only=${ONLY:-.}
runs=${RUNS:-runs/$scale}
runs=${runs/#\~\//${HOME-}/}
results=${RESULTS:-results/$scale}
results=${results/#\~\//${HOME-}/}
FLAGS=${FLAGS:-}
FLAGS=${FLAGS//[[:space:]]/ }
[[ " $FLAGS" != *" --seed"[\ =]* ]] ||
  fail "FLAGS: --seed is not allowed; --seeds N takes the first N seeds"
[[ " $FLAGS" != *" --exp"[-_]"name"[\ =]* ]] ||
  fail "FLAGS: --exp-name is not allowed, figures know agents by it; RUNS keeps runs apart"
[[ $runs$results != *[[:space:]]* ]] ||
  fail "RUNS and RESULTS: no spaces in the names of folders, please"
[[ $(printf %q "$runs$results$python$FLAGS") != "\$'"* ]] ||
  fail "RUNS, RESULTS, PYTHON and FLAGS: only characters that can be printed, in UTF-8, please"
[[ x =~ $only ]] 2>/dev/null || (($? == 1)) ||
  fail "ONLY='$only': not a regular expression (as of grep -E)"
[[ -z ${THREADS:-} ]] || number THREADS "$THREADS" 1000
[[ -z ${MAX_ARRAY:-} ]] || number MAX_ARRAY "$MAX_ARRAY" 4000000

# CPU cores, and the share of each run
cores=$(unset OMP_NUM_THREADS OMP_THREAD_LIMIT && nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
jobs=${limit:-$cores}
threads=$((cores > jobs ? cores / jobs : 1))
[[ $runner != slurm ]] || threads=1
threads=${THREADS:-$threads}

targets=$target
[[ $target != all && $target != list ]] || targets="$tables $figures"
if [[ -n ${ONLY:-} && $target != list && $target != table* && -z $(commands $targets) ]]; then
  fail "ONLY='$only': matches no run of $target; --runner dry-run without ONLY shows their commands"
fi

if [[ -n $help ]]; then
  echo "$usage"
  describe "$target"
elif [[ $target == list ]]; then
  for name in $tables; do echo "$name: from the code"; done
  for name in $figures; do echo "$name: $(commands $name | count) runs"; done
  echo "all: $(commands $figures | count) runs"
  for name in $extras; do echo "$name: $(commands $name | count) runs, not in the paper"; done
elif [[ $action == run && $runner == dry-run ]]; then
  commands $targets
elif ! $python -c "import tyro" 2>/dev/null; then
  fail "$python lacks what requirements.txt lists; activate the virtual environment, or set PYTHON"
elif [[ $action == status ]]; then
  [[ $target != table* ]] || fail "tables have no runs: ./benchmark.sh $target prints one"
  commands $targets | analysis plan status
else
  mkdir -p "$runs" "$results" 2>/dev/null ||
    fail "cannot write to $runs and $results; set RUNS and RESULTS to other folders"
  if [[ $action == run && $target != table* ]]; then
    [[ $runner == local ]] || command -v sbatch >/dev/null ||
      fail "--runner slurm: there is no sbatch here"
    todo=$(commands $targets | analysis plan unfinished) || exit # and prints how long that takes
    [[ -z $todo ]] || "run_$runner" <<<"$todo" || code=1
    [[ $runner == local ]] || exit $code
  fi
  for name in $targets; do
    [[ $name != fig* || -n $(commands $name) ]] || continue # ONLY leaves it without runs
    plot "$name" || code=$((code ? code : $?))
  done
  exit $code
fi
