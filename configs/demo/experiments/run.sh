#!/usr/bin/env bash
# The demo's experiments, one seed after the other; finished stages are skipped. Results and their reading: README.md here.
#   on-policy  reward model that has also seen the SFT model's own replies, PPO against it
#   tax        PPO-ptx against a higher KL penalty: gold utility and perplexity (after on-policy)
#   sharing    separate models, a value head on the policy's trunk, one LoRA base for all roles (after on-policy)
#   rules      preference reward with and without rule classifiers (after on-policy)
#   features   a new head on good features: all at once, head first (LP-FT), unfrozen from the top; seeds 1 to 5
#   adapters   LoRA on 2.5 % of the parameters beside all weights: reward model, PPO, what is forgotten (after on-policy)
#   frozen     SFT of all weights, and without the embeddings and the lower half of the blocks
#   weak       reward models on labels out of noisy votes: majority, Dawid-Skene, the truth (after on-policy)
# Run: bash configs/demo/experiments/run.sh on-policy 1 2 3      2 CPU cores, no GPU, no network
set -euo pipefail
here=configs/demo/experiments
what=$1
shift

on_policy() {
  rlhf sft configs/demo/sft.yaml seed="$1" output_dir="$top/sft"
  [ -f "$top/rated.jsonl" ] || rlhf rate "$top/sft" "$top/rated.jsonl" --seed "$1" --rows 12000
  rlhf reward $here/reward-on-policy.yaml seed="$1" model.path="$top/sft/model" data.train.1.path="$top/rated.jsonl" \
    output_dir="$top/reward"
  rlhf ppo $here/ppo-on-policy.yaml seed="$1" "${models[@]}" output_dir="$top/ppo"
  judge evaluate models.ppo.path="$top/ppo/model" "$1" 8
}

tax() {
  rlhf ppo configs/demo/ppo.yaml seed="$1" "${models[@]}" output_dir="$top/tax-penalty"
  rlhf ppo configs/demo/ppo.yaml seed="$1" "${models[@]}" kl.target=1.2 output_dir="$top/tax-higher-penalty"
  rlhf ppo $here/ppo-ptx.yaml seed="$1" "${models[@]}" output_dir="$top/tax-ptx"
  for name in penalty higher-penalty ptx; do
    judge "evaluate-tax-$name" models.ppo.path="$top/tax-$name/model" "$1" 0
  done
}

sharing() {
  rlhf reward $here/reward-on-policy.yaml seed="$1" model.path="$top/sft/model" data.train.1.path="$top/rated.jsonl" \
    peft.method=lora optim.learning_rate=1.5e-3 output_dir="$top/reward-lora"
  adapters=(peft.method=lora reward_model.path="$top/reward-lora/model" roles=shared optim.learning_rate=3e-3
    optim.value_learning_rate=1e-2)
  rlhf ppo configs/demo/ppo.yaml seed="$1" "${models[@]}" output_dir="$top/sharing-separate"
  rlhf ppo configs/demo/ppo.yaml seed="$1" "${models[@]}" ppo.value_model=trunk output_dir="$top/sharing-trunk"
  rlhf ppo configs/demo/ppo.yaml seed="$1" "${models[@]}" "${adapters[@]}" output_dir="$top/sharing-lora"
  rlhf ppo configs/demo/ppo.yaml seed="$1" "${models[@]}" "${adapters[@]}" ppo.value_model=trunk \
    output_dir="$top/sharing-lora-trunk"
  for name in separate trunk lora lora-trunk; do
    judge "evaluate-sharing-$name" models.ppo.path="$top/sharing-$name/model" "$1" 0
  done
}

rules() {
  [ -f data/rules/replies.jsonl ] || rlhf data rules
  rlhf reward $here/reward-answers.yaml seed="$1" model.path="$top/sft/model" output_dir="$top/reward-answers"
  rlhf classify $here/classify-rules.yaml seed="$1" model.path="$top/sft/model" output_dir="$top/classify-rules"
  for name in preference rules; do
    classifier=()
    if [ $name = rules ]; then
      classifier=(rewards.0.classifier.path="$top/classify-rules/model")
    fi
    rlhf ppo $here/ppo-$name.yaml seed="$1" policy.path="$top/sft/model" reward_model.path="$top/reward-answers/model" \
      "${classifier[@]}" output_dir="$top/ppo-$name"
  done
  rlhf evaluate $here/evaluate-rules.yaml seed="$1" models.sft.path="$top/sft/model" \
    models.preference.path="$top/ppo-preference/model" models.rules.path="$top/ppo-rules/model" \
    output_dir="$top/evaluate-rules"
}

features() {
  [ -f data/features/ood.jsonl ] || rlhf data features
  # One source model for all seeds: they differ in the head's initialisation and in the training records.
  rlhf classify $here/classify-traits.yaml
  for name in ft lp-ft gradual; do
    rlhf classify $here/classify-$name.yaml seed="$1" data.train.0.path="data/features/train_$1.jsonl" \
      output_dir="$top/features-$name"
  done
  rlhf classify $here/classify-ft.yaml seed="$1" data.train.0.path="data/features/train_$1.jsonl" \
    optim.learning_rate=1e-3 output_dir="$top/features-ft-high"
}

adapters() {
  data=$top/weak-data
  [ -f "$data/truth.jsonl" ] || rlhf data annotators --seed "$1" --output "$data"
  small=(peft.method=lora peft.r=3 peft.alpha=6) # 2.5 % of the parameters
  for name in full lora; do
    changes=()
    if [ $name = lora ]; then
      changes=("${small[@]}" optim.learning_rate=1.5e-3)
    fi
    rlhf reward $here/reward-weak.yaml seed="$1" model.path="$top/sft/model" data.train.0.path="$data/truth.jsonl" \
      data.validation.0.path="$data/truth_valid.jsonl" probe.text='[{path: data/demo/corpus_valid.jsonl, format: text}]' \
      "${changes[@]}" output_dir="$top/adapters-$name"
  done
  rlhf ppo configs/demo/ppo.yaml seed="$1" "${models[@]}" "${small[@]}" optim.learning_rate=3e-3 \
    optim.value_learning_rate=1e-2 output_dir="$top/adapters-ppo"
  judge evaluate-adapters models.ppo.path="$top/adapters-ppo/model" "$1" 0
}

frozen() {
  for name in all half; do
    changes=()
    if [ $name = half ]; then
      changes=(freeze.first=50% freeze.parts=[embeddings])
    fi
    rlhf sft configs/demo/sft.yaml seed="$1" "${changes[@]}" output_dir="$top/frozen-$name"
  done
}

weak() {
  data=$top/weak-data
  [ -f "$data/pairs.jsonl" ] || rlhf data annotators --seed "$1" --output "$data"
  for model in majority dawid-skene; do
    [ -f "$top/weak-$model.jsonl" ] || rlhf data weak $here/weak.yaml data.path="$data/pairs.jsonl" \
      label_model.kind=$model output="$top/weak-$model.jsonl"
  done
  for name in majority dawid-skene truth; do
    labels=$top/weak-$name.jsonl
    if [ $name = truth ]; then
      labels=$data/truth.jsonl
    fi
    rlhf reward $here/reward-weak.yaml seed="$1" model.path="$top/sft/model" data.train.0.path="$labels" \
      data.validation.0.path="$data/truth_valid.jsonl" output_dir="$top/weak-reward-$name"
  done
}

judge() { # folder, model, seed, best of how many SFT samples
  rlhf evaluate configs/demo/evaluate.yaml seed="$3" models.sft.path="$top/sft/model" "$2" best_of="$4" \
    reward_model.path="$top/reward/model" output_dir="$top/$1"
}

for seed in "$@"; do
  top=runs/experiments/seed$seed
  mkdir -p "$top"
  models=(policy.path="$top/sft/model" reward_model.path="$top/reward/model")
  case $what in
    on-policy) on_policy "$seed" ;;
    tax) tax "$seed" ;;
    sharing) sharing "$seed" ;;
    rules) rules "$seed" ;;
    features) features "$seed" ;;
    adapters) adapters "$seed" ;;
    frozen) frozen "$seed" ;;
    weak) weak "$seed" ;;
    *) echo "no experiment called $what: on-policy, tax, sharing, rules, features, adapters, frozen or weak" >&2; exit 2 ;;
  esac
done
