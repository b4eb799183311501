# A container image, as layers: `nix build .#image && ./result | docker load`. The driver comes from NVIDIA's container toolkit.
{
  dockerTools,
  bashInteractive,
  coreutils,
  cacert,
  gptoss,
  kernels,
  ...
}:
dockerTools.streamLayeredImage {
  name = "gptoss";
  tag = gptoss.version;
  contents = [
    bashInteractive
    coreutils
    cacert
    gptoss
  ];
  # For whoever it runs as.
  extraCommands = "mkdir -m 1777 tmp models cache";
  config = {
    Entrypoint = [
      "${bashInteractive}/bin/bash"
      "${./entrypoint.sh}"
    ];
    Cmd = [
      "gptoss-quant"
      "--help"
    ];
    WorkingDir = "/models";
    Env = [
      # Compiled already, and read only: AUTO_INSTALL_KERNELS is for images that have a compiler.
      "GPTOSS_KERNELS=${kernels}"
      "HF_HOME=/cache"
      # The store's C library does not look where NVIDIA's container toolkit puts the driver.
      "LD_LIBRARY_PATH=/usr/lib64:/usr/lib/x86_64-linux-gnu:/usr/lib/aarch64-linux-gnu"
      "PATH=/bin"
      "SSL_CERT_FILE=${cacert}/etc/ssl/certs/ca-bundle.crt"
      "NVIDIA_VISIBLE_DEVICES=all"
      "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    ];
  };
}
