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
  config = {
    Entrypoint = [
      "${bashInteractive}/bin/bash"
      "${./entrypoint.sh}"
    ];
    Cmd = [
      "gptoss-verify"
      "env"
    ];
    WorkingDir = "/models";
    Env = [
      "GPTOSS_KERNELS=${kernels}"
      "HF_HOME=/cache"
      "SSL_CERT_FILE=${cacert}/etc/ssl/certs/ca-bundle.crt"
      "NVIDIA_VISIBLE_DEVICES=all"
      "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    ];
  };
}
