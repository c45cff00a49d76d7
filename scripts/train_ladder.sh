#!/usr/bin/env bash
# Pre-trains a rung of the ladder of small T5s that studies/mini_power_of_scale and
# studies/mini_ablations compare: span corruption, prefix LM (LM adaptation), pairs
# of question and answer, the same text, steps and rates for every size.
#
#   scripts/train_ladder.sh 500k            # or 2m, 8m; TEXT and PAIRS say where
#                                           # the token arrays are
#   LM_STEPS=250 scripts/train_ladder.sh 2m # fewer steps of LM adaptation, or 0
# Makes ladder/SIZE/{span,adapted,paired} (adapted_250 and paired_250 with LM_STEPS=250);
# goes on where it was stopped. The token arrays are made as the card of t5_1_1_mini
# says (prompt_tuning/bundled/t5_1_1_mini/README.md), with its vocabulary.
set -euo pipefail
cd "$(dirname "$0")/.."

SIZE="${1:?which model: 500k, 2m or 8m}"
LM_STEPS="${LM_STEPS:-1000}"
TEXT="${TEXT:-arrays}"
PAIRS="${PAIRS:-pair_arrays}"
LADDER="${LADDER:-ladder}/$SIZE"
OTHER=""
[ "$LM_STEPS" = 1000 ] || OTHER="_$LM_STEPS"

train() { prompt-tuning train "models/t5_1_1_$SIZE" "$@"; }

train runs/pretrain TOKEN_ARRAYS="$TEXT" BATCH_SIZE=32 \
  TASK_FEATURE_LENGTHS="{'inputs': 128, 'targets': 34}" \
  create_learning_rate_scheduler.warmup_steps=1000 \
  create_learning_rate_scheduler.base_learning_rate=0.5 \
  TRAIN_STEPS_RELATIVE=600 MODEL_DIR="$LADDER/span"
ADAPTED="$LADDER/span"
if [ "$LM_STEPS" != 0 ]; then
  ADAPTED="$LADDER/adapted$OTHER"
  train runs/lm_adapt schedules/cosine TOKEN_ARRAYS="$TEXT" BATCH_SIZE=16 \
    INITIAL_CHECKPOINT_PATH="$LADDER/span" \
    TASK_FEATURE_LENGTHS="{'inputs': 128, 'targets': 64}" \
    TokenArrayData.window=160 \
    create_learning_rate_scheduler.base_learning_rate=0.01 \
    TRAIN_STEPS_RELATIVE="$LM_STEPS" MODEL_DIR="$ADAPTED"
fi
train runs/text_to_text schedules/cosine TOKEN_ARRAYS="$PAIRS" BATCH_SIZE=64 \
  INITIAL_CHECKPOINT_PATH="$ADAPTED" \
  TASK_FEATURE_LENGTHS="{'inputs': 56, 'targets': 12}" \
  create_learning_rate_scheduler.base_learning_rate=0.008 \
  TRAIN_STEPS_RELATIVE=2000 MODEL_DIR="$LADDER/paired$OTHER"
