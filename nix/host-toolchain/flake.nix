{
  description = "The host's compilers under the names of nixpkgs that this project's flake uses, for machines that cannot reach nixpkgs";
  outputs =
    { self }:
    let
      lib = import ./lib.nix;
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
    in
    {
      inherit lib;
      # nix develop takes bashInteractive from here.
      legacyPackages = lib.genAttrs systems (system: import ./. { inherit system; });
    };
}
