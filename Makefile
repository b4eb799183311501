# The same recipes without Nix: `make help` says what there is. DOCKER=1 runs every target in the container instead.

# A hub id, or a folder (with DOCKER=1: below MODELS_DIR, which is /models there).
MODEL ?= openai/gpt-oss-20b
# Where outputs go; a recipe's is a folder of its name in it.
OUT ?= $(if $(DOCKER),/models,models)
# Calibration text: a file, or a dataset by its name.
CALIB ?=
DATASET ?= open_platypus
SAMPLES ?= 256
LENGTH ?= 2048
# More flags for the tool, such as --dry-run.
FLAGS ?=
# GPUs that the kernels are built for, such as "8.6;9.0a"; those that are here where empty.
CUDA_ARCH ?=

RECIPE_LIST := nix/recipes.txt
RECIPES := $(shell cut -d' ' -f1 $(RECIPE_LIST) | tr - _)
TEXT = $(if $(CALIB),--calib-jsonl '$(CALIB)',--dataset $(DATASET)) --num-calibration-samples $(SAMPLES) --max-seq-length $(LENGTH)
# Tools are built where they are not; a container has its own.
BIN ?= $(or $(CARGO_TARGET_DIR),target)/release
RUN = $(if $(DOCKER),docker compose run --rm gptoss ,$(BIN)/)
TOOLS = $(if $(DOCKER),,$(BIN)/gptoss-quant)

.PHONY: help $(RECIPES) dequant verify test bench install-kernels build install build-image test-gpu-access gpu-help setup-storage shell
.DEFAULT_GOAL := help

help: ## This list
	@echo "make TARGET [MODEL=...] [OUT=...] [CALIB=FILE] [FLAGS=...] [DOCKER=1]"
	@sed -nE 's/^([a-z-]+):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "  %-26s %s\n", $$1, $$2 }'
	@echo "recipes, by $(RECIPE_LIST):"
	@for r in $(RECIPES); do echo "  $$r"; done

$(RECIPES): $(TOOLS)
	$(RUN)gptoss-quant --model-in '$(MODEL)' --output-dir '$(OUT)/$(subst _,-,$@)' $(shell sed -n 's/^$(subst _,-,$@) //p' $(RECIPE_LIST)) $(TEXT) $(FLAGS)

dequant: $(TOOLS) ## MXFP4 to BF16
	$(RUN)gptoss-dequant --src '$(MODEL)' --dst '$(OUT)/bf16' $(FLAGS)

verify: $(TOOLS) ## Describe the machine and its kernels; with DIR=... check that output against its manifest and headers
	$(RUN)gptoss-verify $(if $(DIR),check '$(DIR)',env) $(FLAGS)

bench: $(TOOLS) ## Measure linear layers of 20b
	$(RUN)gptoss-bench gemm --shapes gpt-oss-20b $(FLAGS)

install-kernels: $(TOOLS) ## Build the CUDA kernels for CUDA_ARCH, or the GPUs that are here
	$(RUN)gptoss-kernel-install --yes $(if $(CUDA_ARCH),--arch '$(CUDA_ARCH)') $(FLAGS)

test: ## Every test
	$(if $(DOCKER),docker compose run --rm debug )bash tests/run.sh

build: $(if $(DOCKER),build-image,$(BIN)/gptoss-quant) ## Compile the tools

$(BIN)/gptoss-quant:
	cargo build --release --locked --workspace --bins

install: ## Install the tools for this user
	cargo install --locked --path bins

build-image: ## Build the container image (CUDA_ARCH, INSTALL_KERNELS=1)
	docker compose build --build-arg CUDA_ARCH='$(CUDA_ARCH)' --build-arg INSTALL_KERNELS='$(or $(INSTALL_KERNELS),0)' gptoss

test-gpu-access: ## Whether a container sees the GPU
	docker compose run --rm -e SKIP_STARTUP_COMMANDS=1 gptoss gptoss-verify env --format table

gpu-help: ## How containers get at a GPU
	@echo "Install NVIDIA's container toolkit, then: sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
	@echo "Say CONTAINER_RUNTIME=nvidia in the environment or in .env, and GPUS=all (the default), 0,1 or none."
	@echo "make test-gpu-access shows what a container sees."

setup-storage: ## Make the folders that containers keep models, caches and offloaded states in
	bash nix/setup-storage.sh

shell: ## A shell in the container
	docker compose run --rm shell
