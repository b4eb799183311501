#!/usr/bin/env bash
# Makes the folders that the containers keep things in, and writes where they are, and who asks, into .env, which docker compose reads. What else is in
# .env stays.
#
#     nix/setup-storage.sh [FOLDER]      (default: MODELS_DIR and CACHE_DIR, or ./models and ~/.cache/huggingface)
set -euo pipefail
base=
if [ -n "${1:-}" ]; then
  base=$(realpath -m "$1")
  unset MODELS_DIR CACHE_DIR OFFLOAD_DIR
fi
cd "$(dirname "$0")/.."
models=${MODELS_DIR:-${base:-$PWD}/models}
cache=${CACHE_DIR:-${base:+$base/cache}}
cache=${cache:-${HF_HOME:-$HOME/.cache/huggingface}}
offload=${OFFLOAD_DIR:-$models/offload}
for folder in "$models" "$cache" "$offload"; do
  if ! mkdir -p "$folder" || ! [ -w "$folder" ]; then
    echo "$folder cannot be written by $(id -un): give it to that user, or name another folder (nix/setup-storage.sh FOLDER)" >&2
    exit 1
  fi
done
others=$(grep -vE '^(MODELS_DIR|CACHE_DIR|OFFLOAD_DIR|CONTAINER_USER)=' .env 2>/dev/null || true)
printf '%sMODELS_DIR=%s\nCACHE_DIR=%s\nOFFLOAD_DIR=%s\nCONTAINER_USER=%s\n' "${others:+$others$'\n'}" "$(realpath "$models")" "$(realpath "$cache")" \
  "$(realpath "$offload")" "$(id -u):$(id -g)" >.env
grep -E '^(MODELS_DIR|CACHE_DIR|OFFLOAD_DIR|CONTAINER_USER)=' .env
free=$(df -Pk "$models" | awk 'NR == 2 { print int($4 / 1048576) }')
echo "$free GiB are free for models: gpt-oss-20b takes 14 GB and its BF16 form 42 GB, gpt-oss-120b 65 GB and 234 GB" >&2
