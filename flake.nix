{
  description = "Makes gpt-oss models smaller and faster, and proves what it did";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";
    cutlass = {
      url = "github:NVIDIA/cutlass/v4.2.1";
      flake = false;
    };
  };

  outputs =
    {
      self,
      nixpkgs,
      cutlass,
    }:
    let
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      of = nixpkgs.lib.genAttrs systems (
        system:
        import ./nix {
          inherit nixpkgs cutlass system;
        }
      );
      pick = name: nixpkgs.lib.mapAttrs (_: all: all.${name}) of;
    in
    {
      packages = pick "packages";
      apps = pick "apps";
      checks = pick "checks";
      devShells = pick "devShells";
      overlays.default =
        final: prev:
        let
          packages = self.packages.${prev.stdenv.hostPlatform.system};
        in
        {
          inherit (packages) gptoss gptoss-cuda;
          gptoss-kernels = packages.kernels;
        };
    };
}
