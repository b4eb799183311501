#!/usr/bin/env bash
# Makes the folders that the containers keep things in, and writes where they are, and who asks, into .env, which docker compose reads.
#
#     nix/setup-storage.sh [FOLDER]      (default: MODELS_DIR and CACHE_DIR, or ./models and ~/.cache/huggingface)
set -euo pipefail
cd "$(dirname "$0")/.."
base=${1:-}
models=${MODELS_DIR:-${base:-$PWD}/models}
cache=${CACHE_DIR:-${base:+$base/cache}}
cache=${cache:-${HF_HOME:-$HOME/.cache/huggingface}}
offload=${OFFLOAD_DIR:-$models/offload}
for folder in "$models" "$cache" "$offload"; do
  mkdir -p "$folder"
  if ! [ -w "$folder" ]; then
    echo "$folder cannot be written" >&2
    exit 1
  fi
done
printf 'MODELS_DIR=%s\nCACHE_DIR=%s\nOFFLOAD_DIR=%s\nCONTAINER_USER=%s\n' "$(realpath "$models")" "$(realpath "$cache")" "$(realpath "$offload")" \
  "$(id -u):$(id -g)" >.env
cat .env
free=$(df -Pk "$models" | awk 'NR == 2 { print int($4 / 1048576) }')
echo "$free GiB are free for models: gpt-oss-20b takes 14 GB and its BF16 form 42 GB, gpt-oss-120b 65 GB and 234 GB" >&2
