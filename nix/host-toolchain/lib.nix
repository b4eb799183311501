# The part of nixpkgs' lib that is used.
rec {
  inherit (builtins)
    concatStringsSep
    mapAttrs
    filter
    elem
    ;
  genAttrs =
    names: f:
    builtins.listToAttrs (
      map (name: {
        inherit name;
        value = f name;
      }) names
    );
  optionals = condition: list: if condition then list else [ ];
  optionalAttrs = condition: set: if condition then set else { };
  assertMsg = condition: message: if condition then true else throw message;
  hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
  removeSuffix =
    suffix: text:
    let
      kept = builtins.stringLength text - builtins.stringLength suffix;
    in
    if kept >= 0 && builtins.substring kept (-1) text == suffix then builtins.substring 0 kept text else text;
  removePrefix = prefix: text: if hasPrefix prefix text then builtins.substring (builtins.stringLength prefix) (-1) text else text;
  # Of letters and digits.
  hasInfix = part: text: builtins.length (builtins.split part text) > 1;
  subtractLists = without: filter (one: !elem one without);
  importTOML = file: builtins.fromTOML (builtins.readFile file);
  getOutput = output: package: package.${output} or package.out;
  getBin = getOutput "bin";
  getExe' = package: name: "${package}/bin/${name}";
  licenses.mit = "MIT";
  fileset = {
    unions = paths: paths;
    toSource =
      { root, fileset }:
      let
        kept = map toString fileset;
        within = folder: path: path == folder || hasPrefix (folder + "/") path;
      in
      builtins.path {
        name = "source";
        path = root;
        filter = path: _: builtins.any (k: within k path || within path k) kept;
      };
  };
}
