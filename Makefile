# The same recipes without Nix: `make help` says what there is. DOCKER=1 runs every target in the container instead; what lies below MODELS_DIR is
# below /models there, where commands start.

override DOCKER := $(filter-out 0,$(DOCKER))
# A hub id, or a folder.
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
TEXT = $(if $(CALIB),--calib-jsonl '$(CALIB)',--dataset '$(DATASET)') --num-calibration-samples $(SAMPLES) --max-seq-length $(LENGTH)
# Where tools are; they are built unless it is said. A container has its own.
BUILT := $(or $(CARGO_TARGET_DIR),target)/release
BIN ?= $(BUILT)
COMPOSE ?= docker compose
RUN = $(if $(DOCKER),$(COMPOSE) run --rm gptoss ,$(BIN)/)
TOOLS = $(if $(DOCKER),compose,$(if $(filter $(BUILT),$(BIN)),tools))

.PHONY: help $(RECIPES) dequant verify test bench install-kernels build install build-image test-gpu-access gpu-help setup-storage shell tools compose
.DEFAULT_GOAL := help

help: ## This list
	@echo "make TARGET [MODEL=id or folder] [OUT=folder] [CALIB=file | DATASET=name] [SAMPLES=n] [LENGTH=n] [FLAGS=...] [DOCKER=1] [BIN=folder of tools]"
	@sed -nE 's/^([a-z-]+):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "  %-26s %s\n", $$1, $$2 }'
	@echo "recipes, by $(RECIPE_LIST):"
	@for r in $(RECIPES); do echo "  $$r"; done

# A file of this machine is no file of the container's.
ifneq ($(DOCKER),)
ifneq ($(wildcard $(CALIB)),)
$(error CALIB=$(CALIB) is a path of this machine: with DOCKER=1 say where it is below /models, which is MODELS_DIR)
endif
endif

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

test: $(if $(DOCKER),compose) ## Every test
	$(if $(DOCKER),$(COMPOSE) run --rm debug )bash tests/run.sh

build: $(if $(DOCKER),build-image,tools) ## Compile the tools

tools:
	@cargo build --release --locked --workspace --bins

compose:
	@$(COMPOSE) version >/dev/null 2>&1 || { echo "$(COMPOSE) does not work: install Docker with Compose v2, or leave DOCKER=1 out" >&2; exit 1; }

install: ## Install the tools for this user
	cargo install --locked --path bins

build-image: compose ## Build the container image (CUDA_ARCH, INSTALL_KERNELS=1)
	$(if $(CUDA_ARCH),CUDA_ARCH='$(CUDA_ARCH)' )$(if $(INSTALL_KERNELS),INSTALL_KERNELS='$(INSTALL_KERNELS)' )$(COMPOSE) build gptoss

test-gpu-access: compose ## Whether a container sees the GPU
	$(COMPOSE) run --rm -e SKIP_STARTUP_COMMANDS=1 gptoss gptoss-verify env --format table | awk '{ print } /^gpus +none/ { none = 1 } END { exit none }'

gpu-help: ## How containers get at a GPU
	@echo "Install NVIDIA's container toolkit, then: sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
	@echo "Say CONTAINER_RUNTIME=nvidia in the environment or in .env, and GPUS=all (the default), 0,1 or none."
	@echo "make test-gpu-access shows what a container sees."

setup-storage: ## Make the folders that containers keep models, caches and offloaded states in
	bash nix/setup-storage.sh

shell: compose ## A shell in the container
	$(COMPOSE) run --rm shell
