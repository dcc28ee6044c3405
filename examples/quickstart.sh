#!/usr/bin/env bash
# Train a small protein BERT on the Pfam domains that ship with the repository, over four processes: preprocess, pretrain
# under TP2 x PP2 with the distributed optimizer, stop half-way, resume, evaluate, draw; then turn it into a Hugging Face
# folder, check that transformers alone gives the same loss, embed the domains, draw a map of them, and fine-tune on
# secondary structure. Needs no GPU.
# usage: examples/quickstart.sh [FOLDER]      (FOLDER must not exist yet; default: quickstart)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-quickstart}
if [ -e "$folder" ]; then
    echo "quickstart: $folder is there from an earlier run; move it away or name another folder." >&2
    exit 2
fi
# Fewer than four GPUs: the four processes run on the CPU.
[ "$(python -c 'import torch; print(torch.cuda.device_count())')" -ge 4 ] || export CUDA_VISIBLE_DEVICES=

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
pretrain() {
    megaprot launch local --nproc 4 -- pretrain --config quickstart --data.path "$folder/corpus" --run.dir "$folder/run" \
        --parallel.tensor 2 --parallel.pipeline 2 --parallel.sequence true --parallel.distributed_optimizer true "$@"
}

say "FASTA to indexed corpus"
mkdir -p "$folder"
megaprot preprocess --input examples/pfam/Pfam-A.cut.fasta.gz --output "$folder/corpus"

say "pretrain over four processes: 2 tensor-parallel x 2 pipeline stages; stops after half a minute"
pretrain --train.max_minutes 0.5

say "the same command again goes on from the checkpoint"
pretrain

say "evaluate on the validation domains, in one process this time"
megaprot evaluate --model "$folder/run" --data "$folder/corpus" --output "$folder/evaluation.json"

read -r perplexity frequencies < <(python - "$folder/evaluation.json" <<'PYTHON'
import json, sys

numbers = json.load(open(sys.argv[1]))
print(f"{numbers['mask_perplexity']:.3f} {numbers['residue_frequency_perplexity']:.3f}")
PYTHON
)
megaprot plot --run "$folder/run" --output "$folder/loss.png" --baseline "$frequencies"

say "convert the run to a Hugging Face folder"
megaprot convert --input "$folder/run" --output "$folder/hf" --to hf

say "transformers alone reproduces the validation loss"
python examples/check_with_transformers.py "$folder/run" "$folder/corpus" "$folder/hf" "$folder/evaluation.json"

say "embed the domains and draw a map of them, coloured by Pfam clan"
megaprot embed --model "$folder/hf" --input examples/pfam/Pfam-A.cut.fasta.gz --output "$folder/embeddings.h5"
python examples/plot_embedding_map.py "$folder/embeddings.h5" examples/pfam/Pfam-A.cut.fasta.gz \
    examples/pfam/Pfam-A.clans.cut.tsv "$folder/map.png"

say "fine-tune the encoder on secondary structure and measure it on test chains"
megaprot finetune --config secondary_structure --model "$folder/hf" --data examples/tape --output "$folder/finetuned" \
    --train.num_steps 60
megaprot evaluate --task secondary_structure --model "$folder/finetuned" --data examples/tape --split test
echo "open $folder/finetuned/evaluation_test/report.html"

say "done: validation perplexity on [MASK] positions $perplexity; residue frequencies alone give $frequencies"
python -c "import sys; sys.exit(not $perplexity < $frequencies)" || {
    echo "quickstart: the model did not get below the residue frequencies" >&2
    exit 1
}
