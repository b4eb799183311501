{
  description = "The host's compilers under the names of nixpkgs that this project's flake uses, for machines that cannot reach nixpkgs";
  outputs =
    { self }:
    {
      lib = import ./lib.nix;
    };
}
