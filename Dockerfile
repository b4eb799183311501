# The tools in a container. Build arguments: INSTALL_KERNELS=1 brings the pinned CUDA compiler and CUTLASS (from PyPI, by their hashes) and builds
# the kernels for CUDA_ARCH, such as "8.6;9.0a"; the default is every GPU from the A100 on. The driver comes from NVIDIA's container toolkit.
ARG RUST=1.95
FROM rust:${RUST}-bookworm AS builder
WORKDIR /src
COPY . .
# Crates and what is compiled of them stay in the builder's cache from one build to the next.
# Cargo goes by times, and they may be those of another checkout.
RUN --mount=type=cache,id=gptoss-registry,target=/usr/local/cargo/registry --mount=type=cache,id=gptoss-target,sharing=locked,target=/src/target \
  find bins lib kernels tests -type f -exec touch {} + \
  && cargo build --release --locked --workspace --bins \
  && install -D -t /out target/release/gptoss-dequant target/release/gptoss-quant target/release/gptoss-verify \
     target/release/gptoss-run target/release/gptoss-bench target/release/gptoss-kernel-install

FROM debian:bookworm-slim AS runtime
ARG INSTALL_KERNELS=0
ARG CUDA_ARCH=
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
COPY --from=builder /out/ /usr/local/bin/
COPY nix/entrypoint.sh /usr/local/bin/gptoss-entrypoint
COPY kernels/requirements.txt /opt/gptoss/requirements.txt
ENV GPTOSS_KERNELS=/opt/gptoss/kernels \
    CUDA_HOME=/opt/gptoss/cuda/nvidia/cu13 \
    HF_HOME=/cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Debian keeps one version of a package, so none is named. Who a container runs as may write kernels; the entry point puts those of the image there.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends ca-certificates \
  && install -d -m 1777 "$GPTOSS_KERNELS" \
  && if [ "$INSTALL_KERNELS" = 1 ]; then \
       apt-get install -y --no-install-recommends g++ python3-pip \
       && python3 -m pip install --no-cache-dir --no-deps --require-hashes --target /opt/gptoss/cuda -r /opt/gptoss/requirements.txt \
       && GPTOSS_KERNELS=/opt/gptoss/built gptoss-kernel-install --yes ${CUDA_ARCH:+--arch "$CUDA_ARCH"} > /opt/gptoss/kernels.json; \
     fi \
  && rm -rf /var/lib/apt/lists/*
WORKDIR /models
ENTRYPOINT ["gptoss-entrypoint"]
CMD ["gptoss-quant", "--help"]
